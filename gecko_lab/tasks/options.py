"""``task=NAME field=value ...`` to a checked task, in the grammar and with the types of every other command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..cli import fields
from ..components.registry import nearest
from ..errors import ConfigError
from .base import TASKS, Task


def configure(overrides: Sequence[str]) -> Task:
    """The task that ``overrides`` describe, not yet run.

    Raises ConfigError for no or an unknown task, an unknown field or a value of the wrong type.
    """
    values = _parse(overrides)
    name = values.pop("task", None)
    if name is None:
        raise ConfigError(
            f"{' '.join(overrides)}: fields belong to a task; add task=NAME. {nearest('', TASKS.names())}"
        )
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}. {nearest(str(name), TASKS.names())}")
    node = OmegaConf.structured(TASKS[name].Config)
    known = [f.name for f in dataclasses.fields(TASKS[name].Config) if f.name != "name"]
    for field, value in values.items():
        if field not in known:
            raise ConfigError(f"unknown field {field!r} of task={name}. {nearest(field, known)}")
        try:
            OmegaConf.update(node, field, value, merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{field}={value}: {str(error).splitlines()[0]}") from None
    config: Any = OmegaConf.to_object(node)
    task: Task = TASKS[name](config)
    return task


def listing() -> list[tuple[str, str, list[tuple[str, Any, str]]]]:
    """(name, sentence, fields as (name, default, help)) of every task."""
    found = []
    for name in TASKS:
        (_, _, text), *rest = fields(TASKS[name].Config())
        found.append((name, text, rest))
    return found


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ConfigError(f"{text}: cannot be read; write FIELD=VALUE, or FIELD='VALUE' with quotes") from None
        if override.is_sweep_override():
            raise ConfigError(f"{text}: one value is needed; a list is {override.key_or_group}=[...]")
        if override.is_add() or override.is_delete() or override.is_force_add():
            raise ConfigError(f"{text}: write {override.key_or_group}=VALUE")
        if override.key_or_group in values:
            raise ConfigError(f"{text}: {override.key_or_group} is given twice")
        values[override.key_or_group] = override.value()
    return values
