"""The bar of a run: steps, the loss of the last one, and the last validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's Rich bar without the epoch and version numbers, which mean nothing in a run counted in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        if pl_module.last_loss is not None:
            metrics = {"loss": f"{float(pl_module.last_loss):.3f}", **metrics}
        return metrics
