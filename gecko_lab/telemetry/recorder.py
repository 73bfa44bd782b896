"""The callback that writes a run's curves to TensorBoard and metrics.jsonl (names and units: docs/telemetry.md)."""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..config import LogConfig
from . import kinds, layout, peak, probes
from .curves import PositionLoss
from .flops import TRAINING, flops_per_token
from .record import MetricsFile


class Recorder(L.Callback):
    """Records once every ``log.every_n_steps`` optimiser steps, and at every validation.

    ``folder`` is the run's. Counters and the sums of an unfinished interval are in the checkpoints, so that a resumed
    run records what the uninterrupted one would (on several devices, that interval's sums are those of the first).
    """

    def __init__(self, folder: Path, config: LogConfig) -> None:
        self.folder, self.config = folder, config
        self.file = MetricsFile(folder / "metrics.jsonl")
        self.tokens = self.flops = self.seconds = 0.0  # of all processes since the run began; seconds of training alone
        self.nats: Tensor | float = 0.0  # of the interval since the last record, in this process
        self.bytes: Tensor | float = 0.0
        self.interval_tokens, self.interval_seconds = 0, 0.0
        self.clock = self.paused_since = time.perf_counter()
        self.curve = PositionLoss()
        self.fixed: Tensor | None = None
        self.gradients: dict[str, float] = {}
        self.peak = math.nan
        self.validated = -1
        self._flops: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        self._tick()
        interval = [float(self.nats), float(self.bytes), self.interval_tokens, self.interval_seconds]
        return {"totals": [self.tokens, self.flops, self.seconds], "interval": interval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.flops, self.seconds = state_dict["totals"]
        self.nats, self.bytes, self.interval_tokens, self.interval_seconds = state_dict["interval"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        probe_names = probes.names(pl_module.model, pl_module.device, pl_module.bos_id) if self.config.probes else []
        if trainer.is_global_zero:
            kept = self.file.rewind(trainer.global_step)
            self.validated = max((r["step"] for r in kept if "val/loss" in r), default=-1)
            for writer in _writers(trainer):
                if trainer.global_step:
                    layout.write_restart(writer, trainer.global_step + 1)
                writer.add_custom_scalars(layout.layout(probe_names))
            self.peak = peak.of_run(self.folder / "environment.json", pl_module.device)
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows, length = batch["targets"].shape
        size = rows * length
        self.nats = self.nats + pl_module.last_loss.double() * size
        self.bytes = self.bytes + torch.as_tensor(batch["bytes"]).double().sum()
        self.interval_tokens += size
        self.tokens += size * trainer.world_size
        self.flops += size * trainer.world_size * self._training_flops(pl_module.model, length)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.config.every_n_steps == 0:
            self._record_training(trainer, pl_module, length)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        following = trainer.global_step + 1
        if following % self.config.validate_every_n_steps == 0 or following == trainer.max_steps:
            self.gradients = kinds.gradient_norms(pl_module.model)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._tick()
        self.curve = PositionLoss().to(pl_module.device)
        self.fixed = None

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.curve.update(outputs, batch["tokens"], pl_module.bos_id, batch.get("scored"))
        if self.fixed is None:
            self.fixed = batch["tokens"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self.validated and not trainer.sanity_checking:
            self._record_validation(trainer, pl_module)
            self.validated = trainer.global_step
        self.clock = time.perf_counter()

    def _tick(self) -> None:
        """Count the time since the clock was last read as time of training."""
        now = time.perf_counter()
        self.interval_seconds += now - self.clock
        self.seconds += now - self.clock
        self.clock = now

    def _training_flops(self, model: Any, length: int) -> float:
        if length not in self._flops:
            self._flops[length] = TRAINING * flops_per_token(model, length)
        return self._flops[length]

    def _progress(self) -> dict[str, float]:
        return {"progress/tokens": self.tokens, "progress/flops": self.flops, "progress/seconds": self.seconds}

    def _record_training(self, trainer: L.Trainer, pl_module: Any, length: int) -> None:
        sums = torch.tensor([float(self.nats), float(self.bytes)], dtype=torch.float64, device=pl_module.device)
        nats, size = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._tick()  # after the numbers: they waited for the device
        tokens = self.interval_tokens * trainer.world_size
        speed = tokens / self.interval_seconds
        flops = speed * self._training_flops(pl_module.model, length)
        values = {
            "train/loss": nats / tokens,
            "train/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "speed/tokens_per_second": speed,
            "speed/flops_per_second": flops,
            "speed/mfu": flops / (self.peak * trainer.world_size),
            "memory/peak_gib": peak_memory(pl_module.device) / 2**30,
            **self._progress(),
        }
        if size:
            values["train/bits_per_byte"] = nats / math.log(2) / size
        if pl_module.gradient_norm is not None:
            values["train/gradient_norm"] = float(pl_module.gradient_norm)
        self._write(trainer, values)
        self.nats = self.bytes = self.interval_seconds = 0.0
        self.interval_tokens = 0

    def _record_validation(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        curve = self.curve.compute()
        values |= {f"val_position/{int(point['position']):05}": point["loss"] for point in curve}
        values |= self.gradients | kinds.weight_norms(model)
        populations: dict[str, Tensor] = {}
        if self.config.probes and self.fixed is not None:
            with trainer.precision_plugin.forward_context():
                populations = probes.gather(model, self.fixed, pl_module.bos_id)
        spread = {name: probes.summary(p) for name, p in populations.items() if p.numel()}
        values |= {f"probe/{name}": quantiles["median"] for name, quantiles in spread.items()}
        self._write(trainer, values, {**self._progress(), "position_curve": curve, "probe_quantiles": spread})
        for writer in _writers(trainer):
            for name, population in populations.items():
                finite = population[population.isfinite()]
                if finite.numel():
                    writer.add_histogram(f"probe_histogram/{name}", finite, trainer.global_step)

    def _write(self, trainer: L.Trainer, values: dict[str, float], structured: dict[str, Any] | None = None) -> None:
        """The numbers to both; what has more structure than a number only to metrics.jsonl."""
        if trainer.is_global_zero:
            self.file.append(trainer.global_step, values | (structured or {}))
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


def _writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """TensorBoard's, in the first process."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
