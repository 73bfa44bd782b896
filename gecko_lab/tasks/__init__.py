"""Evaluations, one file a task: ``python -m gecko_lab.evaluate RUN task=NAME field=value ...``.

Every module of this package is imported here, so that a new file with ``@TASKS.register("name")`` is a task at once.
A module must import optional packages only when its task runs.
"""

import importlib
import pkgutil

from .base import TASKS, Column, Sheet, Task, nothing
from .options import configure, listing
from .runner import run_task
from .subject import Scored, Subject

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["TASKS", "Column", "Scored", "Sheet", "Subject", "Task", "configure", "listing", "nothing", "run_task"]
