"""NaN and infinities: known before they reach the weights, and kept as a dump from which the step can be repeated."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checkpoint
from .components import state as states
from .config import TrainerConfig
from .errors import RunError
from .precision import resolve
from .strategies import whole
from .telemetry.record import MetricsFile

log = logging.getLogger(__name__)


class NonFinite(RunError):
    """A loss or gradient was NaN or infinite; the message names the dump that repeats the step."""


class NonFiniteGuard(L.Callback):
    """Looks at loss and gradient norm once an optimiser step, before the update (one wait for the device).

    ``trainer.on_nonfinite``: stop writes FOLDER/nonfinite-step-N.ckpt and raises NonFinite; skip leaves the update
    and the step's stream state out, counted in ``train/skipped_steps``, and stops beyond ``trainer.max_skipped``.
    """

    def __init__(self, folder: Path, options: TrainerConfig, kernels: str = "auto") -> None:
        self.folder, self.options, self.kernels = folder, options, kernels
        self.skipped = 0
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []
        self.before: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.check_gradient = lambda norm: self.check(trainer, pl_module, norm)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches, self.losses = [], []
            cuda = torch.cuda.get_rng_state(pl_module.device) if pl_module.device.type == "cuda" else None
            self.before = {"rng": {"torch": torch.get_rng_state(), "cuda": cuda}, "stream_state": pl_module.state}
        self.batches.append(batch)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.losses.append(pl_module.last_loss)

    def check(self, trainer: L.Trainer, module: Any, norm: Tensor) -> None:
        """``norm`` is that of the step's gradient. Raises NonFinite, or clears the gradients so that nothing moves."""
        loss = torch.stack([x.float() for x in self.losses]).sum()
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="sum")  # every process decides alike
        if bool(torch.isfinite(norm + loss)):
            return
        step, skip = trainer.global_step + 1, self.options.on_nonfinite == "skip"
        mean = float(loss) / len(self.losses) / trainer.world_size
        what = f"step {step}: loss {mean:g}, gradient norm {float(norm):g}"
        if skip and self.skipped < self.options.max_skipped:
            self._skip(trainer, module, step, what)
            return
        path = self.dump(trainer, module, step, norm)
        limit = f" after {self.skipped} skipped updates (trainer.max_skipped)" if skip else ""
        raise NonFinite(
            f"{what}: the run stops{limit}, before this update. See where it begins with "
            f"python -m gecko_lab.replay {path} ; or go on with resume=auto trainer.on_nonfinite=skip"
        )

    def _skip(self, trainer: L.Trainer, module: Any, step: int, what: str) -> None:
        self.skipped += 1
        for parameter in module.model.parameters():
            parameter.grad = None
        module.state = self.before["stream_state"]
        log.warning("%s: update skipped (%d of at most %d)", what, self.skipped, self.options.max_skipped)
        if trainer.is_global_zero:
            values = {"train/skipped_steps": float(self.skipped)}
            MetricsFile(self.folder / "metrics.jsonl").append(step, values)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def dump(self, trainer: L.Trainer, module: Any, step: int, norm: Tensor) -> Path:
        """Everything that the step read, as it was before the step; each process writes its own batches."""
        state = self.before["stream_state"]
        rank = f"-rank-{trainer.global_rank}" if trainer.global_rank else ""
        path = self.folder / f"nonfinite-step-{step}{rank}.ckpt"
        options = self.options
        content = {
            "gecko_lab": {
                "model": dataclasses.asdict(module.config.model),
                "stream_state": states.flatten(state)[0] if state is not None else None,
                "rng": self.before["rng"],
            },
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "nonfinite": {
                "step": step,
                "batches": self.batches,
                "losses": self.losses,
                "gradient_norm": norm,
                "bos_id": module.bos_id,
                "stream": module.stream,
                "device": module.device.type,
                "precision": resolve(options.precision, options.accelerator),
                "kernels": self.kernels,
                "loss_chunk": options.loss_chunk,
                "piece_len": options.piece_len,
            },
        }
        checkpoint.save(path, pytree.tree_map(lambda x: whole(x) if isinstance(x, Tensor) else x, content))
        return path
