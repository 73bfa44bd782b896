"""What happens around the steps of a run: saving, recording, stopping cleanly."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

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


class Recorder(L.Callback):
    """Training curves, to TensorBoard and to metrics.jsonl, once every ``every_n_steps`` optimiser steps."""

    def __init__(self, file: Path, every_n_steps: int) -> None:
        self.file, self.every_n_steps = file, every_n_steps
        self.validation_began = 0.0
        self._clear()

    def _clear(self) -> None:
        self.losses: list[Tensor] = []
        self.bytes = self.tokens = 0
        self.since, self.paused = time.perf_counter(), 0.0

    def write(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers to the logger."""
        if not trainer.is_global_zero:
            return
        with self.file.open("a") as out:
            out.write(json.dumps({"step": trainer.global_step, **values}) + "\n")
        if trainer.logger is not None:
            trainer.logger.log_metrics(values, step=trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and self.file.exists():  # a resumed run repeats what came after its checkpoint
            lines = self.file.read_text().splitlines()
            keep = [line for line in lines if _step(line) is not None and _step(line) <= trainer.global_step]  # type: ignore[operator]
            self.file.write_text("".join(line + "\n" for line in keep))
        self._clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(pl_module.last_loss)
        self.tokens += batch["targets"].numel()
        self.bytes += int(batch["bytes"].sum()) if isinstance(batch["bytes"], Tensor) else int(batch["bytes"])
        if not optimizer_stepped(trainer, batch_idx) or trainer.global_step % self.every_n_steps:
            return
        mean = float(torch.stack(self.losses).mean())
        seconds = time.perf_counter() - self.since - self.paused  # without the validations in between
        values = {
            "train/loss": mean,
            "train/bits_per_byte": mean * self.tokens / math.log(2) / max(1, self.bytes),
            "train/tokens_per_second": self.tokens * trainer.world_size / seconds,
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if pl_module.gradient_norm is not None:
            values["train/gradient_norm"] = float(pl_module.gradient_norm)
        if pl_module.device.type == "cuda":
            values["train/peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        self.write(trainer, values)
        self._clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.write(trainer, found)
        self.paused += time.perf_counter() - self.validation_began

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.validation_began = time.perf_counter()


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


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
