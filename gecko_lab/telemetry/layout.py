"""How TensorBoard arranges a run: one page of charts a theme, and one row in the table of runs (HPARAMS)."""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

METRICS = ("val/loss", "val/bits_per_byte")
Layout = dict[str, dict[str, list[Any]]]


def layout(probe_names: list[str]) -> Layout:
    """Theme -> chart -> ["Multiline", patterns of tags]; a chart for each probe, its layers as lines."""

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    themes: Layout = {
        "loss": {
            "loss": chart("train/loss", "val/loss"),
            "bits per byte": chart("train/bits_per_byte", "val/bits_per_byte"),
            "loss by position in the document": chart("val_position/.*"),
        },
        "optimisation": {
            "gradient norm": chart("train/gradient_norm"),
            "gradient norm by kind": chart("gradient/.*"),
            "weight norm by kind": chart("weight/.*"),
            "learning rate": chart("train/learning_rate"),
        },
        "speed": {
            "tokens per second": chart("speed/tokens_per_second"),
            "FLOPs per second": chart("speed/flops_per_second"),
            "model FLOPs utilisation": chart("speed/mfu"),
            "peak memory (GiB)": chart("memory/peak_gib"),
        },
        "progress": {name: chart(f"progress/{name}") for name in ("tokens", "flops", "seconds")},
    }
    if probe_names:
        themes["probes (medians)"] = {name.replace("_", " "): chart(f"probe/{name}/.*") for name in probe_names}
    return themes


def write_hyperparameters(writer: SummaryWriter, values: dict[str, Any]) -> None:
    """The run's row in HPARAMS: its options, and METRICS as columns (which show the scalars of these names)."""
    for summary in hparams(values, dict.fromkeys(METRICS, 0.0)):
        writer._get_file_writer().add_summary(summary)


def write_restart(writer: SummaryWriter, step: int) -> None:
    """Tell TensorBoard to forget what an earlier process of this run wrote from ``step`` on."""
    event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    writer._get_file_writer().add_event(event, step=step)
