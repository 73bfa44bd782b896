"""What a trial's training tells its worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from ..errors import LabError


class Pruned(Exception):
    """The study gave this trial up; ``value`` is its metric at the last validation."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"pruned at step {step}")
        self.value = value


class Reporter(L.Callback):
    """Reports the metric by global step at every validation; ends the run when told, or after ``seconds`` in all."""

    def __init__(self, metric: str, ask: Callable[[int, float], bool], seconds: float) -> None:
        self.metric, self.ask, self.seconds = metric, ask, seconds
        self.began, self.before = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["seconds"]

    def _spent(self) -> float:
        return self.before + time.perf_counter() - self.began

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._spent() > self.seconds:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step >= trainer.max_steps:
            return
        value = measured(trainer.callback_metrics, self.metric)
        if self.ask(trainer.global_step, value):
            raise Pruned(trainer.global_step, value)


def measured(metrics: Mapping[str, Any], name: str) -> float:
    """The metric of that name; LabError when this run's validation has no such metric."""
    if name not in metrics:
        known = ", ".join(sorted(k for k in metrics if k.startswith("val/")))
        raise LabError(f"metric={name}: is not measured on this data; the validation measures {known}")
    return float(metrics[name])
