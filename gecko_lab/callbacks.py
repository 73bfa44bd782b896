"""What happens around the steps of a run: saving, and stopping cleanly."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

from . import checkpoint
from .config import CheckpointConfig

log = logging.getLogger(__name__)


def optimizer_stepped(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch completed an optimiser step (the last of an accumulation)."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes between this batch and the next."""
    every = trainer.val_check_batch
    return every is not None and (batch_idx + 1) % every == 0


class Saver(L.Callback):
    """Keeps the last few step checkpoints and the best one, in ``folder``.

    Where a validation follows a step, its checkpoint is written after it: a run that resumes there has the
    validation's numbers and does not skip it.
    """

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
            checkpoint.rotate(self.folder, self.config.keep_last)
        return path

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.config.every_n_steps == 0 or trainer.global_step == trainer.max_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if optimizer_stepped(trainer, batch_idx) and self._due(trainer) and not validation_follows(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get("val/loss")
        value = math.inf if loss is None else float(loss)
        better = self.config.keep_best and value < self.best
        if better:
            self.best = value
        saved = self.save(trainer) if self._due(trainer) else None
        if better and saved is None:
            trainer.save_checkpoint(self.folder / "best.ckpt")
        elif better and saved is not None and trainer.is_global_zero:
            checkpoint.publish(saved, self.folder / "best.ckpt")


class Interrupted(Exception):
    """A signal ended the run after a checkpoint."""


class Interrupt(L.Callback):
    """SIGTERM and SIGINT end the run after the step in progress, with a checkpoint: exit code 75, resumable.

    In a Slurm job SIGUSR1 (``sbatch --signal=SIGUSR1@120``) does the same and puts the job back into the queue. A
    second signal ends the run at once.
    """

    EXIT_CODE = 75

    def __init__(self, saver: Saver) -> None:
        self.saver = saver
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Lightning has put its own handlers in place by now; they would end the run in the middle of a step."""
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt  # asked twice: now
        self.received = number
        log.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any process got a signal: all must agree, as a checkpoint is written by all of them together."""
        here = self.received is not None
        return here if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(here, all=False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if optimizer_stepped(trainer, batch_idx) and self._asked(trainer):
            self.saver.save(trainer)
            if not validation_follows(trainer, batch_idx):
                self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and self._asked(trainer):
            self.saver.save(trainer)
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if self.received == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise Interrupted(f"stopped at step {trainer.global_step}")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def requeue() -> None:
    """Put this Slurm job back into the queue; its script starts again with SLURM_RESTART_COUNT set."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.error("cannot requeue the job %s: %s; the checkpoint is saved", job, error)
