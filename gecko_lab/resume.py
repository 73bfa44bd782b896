"""Where a run begins: at its start, or at a checkpoint that is known to be whole and to fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint
from .errors import RunError
from .lit import check_architecture
from .model import ModelConfig

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """``path`` None: from the beginning."""

    path: Path | None
    step: int


def find(resume: str | None, folder: Path, model: ModelConfig) -> Start:
    """The checkpoint that ``resume`` (auto, a path or None) stands for; ``folder`` holds the run's own.

    RunError: no such file, damaged, not a training checkpoint, or of another architecture.
    """
    if resume is None:
        return Start(None, 0)
    if resume == "auto":
        found = checkpoint.newest(folder)
        if found is None:
            log.warning("resume=auto: %s was stopped before its first checkpoint; it starts anew", folder.parent)
            return Start(None, 0)
        path, saved = found
    else:
        path = Path(resume)
        saved = checkpoint.load(path)
    check_training_checkpoint(path, saved)
    check_architecture(saved, model)
    return Start(path.absolute(), int(saved["global_step"]))


def check_training_checkpoint(path: Path, saved: Any) -> None:
    """RunError for a file that can be read but is no point from which training can go on."""
    missing = [k for k in ("gecko_lab", "state_dict", "optimizer_states", "loops") if k not in saved]
    if missing:
        raise RunError(f"resume={path}: not a checkpoint of a training run; it has no {', '.join(missing)}")


def say(start: Start, max_steps: int, changed: list[str], aside: list[Path]) -> None:
    """Tell the user where the run goes on, and with what that is not as it was."""
    print(f"resumed   at step {start.step} of {max_steps}" + (f" from {start.path}" if start.path else ""))
    for line in changed:
        print(f"          changed: {line}")
    for path in aside:
        print(f"          set aside, as it lies after that step: {path}.old")
    if start.step >= max_steps:
        print(f"          The run is complete; nothing is trained. Raise trainer.max_steps={max_steps} to go on.")
