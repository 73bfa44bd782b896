"""What happens around the steps of a run: saving, recording, stopping cleanly."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import lightning as L

from . import checkpoint
from .config import CheckpointConfig
from .lit import LitLanguageModel

log = logging.getLogger(__name__)


def optimizer_stepped(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch completed an optimiser step (the last of an accumulation)."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Saver(L.Callback):
    """Keeps the last few step checkpoints and the best one, in ``folder``."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.best: float = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def save(self, trainer: L.Trainer) -> Path:
        """Write the checkpoint of the current step and drop the oldest beyond ``keep_last``."""
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in checkpoint.steps(self.folder)[max(1, self.config.keep_last) :]:
                old.unlink(missing_ok=True)
        return path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if optimizer_stepped(trainer, batch_idx) and (step % self.config.every_n_steps == 0 or step == trainer.max_steps):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or not self.config.keep_best or loss is None or not float(loss) < self.best:
            return
        if trainer.state.fn == "fit":
            self.best = float(loss)
            trainer.save_checkpoint(self.folder / "best.ckpt")


class Interrupt(L.Callback):
    """SIGTERM and SIGINT end the run after the step in progress, with a checkpoint: exit code 75, resumable."""

    EXIT_CODE = 75

    def __init__(self, saver: Saver) -> None:
        self.saver = saver
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt  # asked twice: now
        self.received = number
        log.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitLanguageModel, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        if self.received is not None and optimizer_stepped(trainer, batch_idx):
            self.saver.save(trainer)
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
