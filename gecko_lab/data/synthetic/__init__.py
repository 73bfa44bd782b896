"""Synthetic tasks that are made as they are read: ``data=mqar``, ``induction``, ``selective_copy``, ``listops``."""

from .induction import InductionConfig
from .listops import ListopsConfig
from .mqar import MqarConfig
from .selective_copy import SelectiveCopyConfig
from .task import Examples, SyntheticConfig, TaskTokenizer

TASKS: dict[str, type[SyntheticConfig]] = {
    "mqar": MqarConfig,
    "induction": InductionConfig,
    "selective_copy": SelectiveCopyConfig,
    "listops": ListopsConfig,
}

__all__ = ["TASKS", "Examples", "SyntheticConfig", "TaskTokenizer"]
