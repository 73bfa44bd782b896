"""The bar of a run: steps, the loss of the last one, and the last validation."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar

EVERY = 1.0  # seconds between two looks at numbers on a GPU: each look waits for the step that made them


class ProgressBar(RichProgressBar):
    """Lightning's Rich bar without the epoch and version numbers, which mean nothing in a run counted in steps."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, Any] = {}
        self._looked = -EVERY

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        loss, now = pl_module.last_loss, time.monotonic()
        if loss is None or not loss.is_cuda or now - self._looked >= EVERY:
            self._shown = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
            if loss is not None:
                self._shown = {"loss": f"{float(loss):.3f}", **self._shown}
            self._looked = now
        return dict(self._shown)
