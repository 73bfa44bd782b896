"""How TensorBoard arranges a run: one page of charts a theme, and one row in the table of runs (HPARAMS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import summary_v2 as columns  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

Layout = dict[str, dict[str, list[Any]]]


def layout(probe_names: list[str]) -> Layout:
    """Theme -> chart -> ["Multiline", patterns of tags]; a chart for each probe, its layers as lines."""

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    themes: Layout = {
        "loss": {
            "loss": chart("train/loss", "val/loss"),
            "bits per byte": chart("train/bits_per_byte", "val/bits_per_byte"),
            "accuracy": chart("val/accuracy", "val/exact"),
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


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values as dotted names, as HPARAMS shows them."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def write_hyperparameters(writer: SummaryWriter, values: dict[str, Any]) -> None:
    """The run's row in HPARAMS: its options, flat. The columns are chosen where runs meet: ``write_columns``."""
    _, *session = hparams(values, {})
    for summary in session:
        writer._get_file_writer().add_summary(summary)


def write_columns(folder: Path, runs: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    """Choose the columns of HPARAMS for all runs below ``folder``: the options that differ, and ``metrics``.

    ``runs`` are the flat options of each; an option that some do not have (of a part that they lack) counts by the
    others alone. Without this, TensorBoard lists every option and every scalar. Returns the names that differ.
    """
    names = dict.fromkeys(name for run in runs for name in run)
    values = {name: [run[name] for run in runs if name in run] for name in names}
    differ = {name: column for name, column in values.items() if len({(type(v), v) for v in column}) > 1}
    chosen = [columns.HParam(name, _domain(column)) for name, column in differ.items()]
    with SummaryWriter(str(folder)) as writer:
        summary = columns.hparams_config_pb(chosen, [columns.Metric(name) for name in metrics])
        writer._get_file_writer().add_summary(summary)
    return list(differ)


def _domain(values: list[Any]) -> Any:
    """What a filter in HPARAMS offers; None for values of several kinds."""
    if all(isinstance(v, bool) for v in values) or all(isinstance(v, str) for v in values):
        return columns.Discrete(sorted(set(values)))
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return columns.RealInterval(float(min(values)), float(max(values)))
    return None


def write_restart(writer: SummaryWriter, step: int) -> None:
    """Tell TensorBoard to forget what an earlier process of this run wrote from ``step`` on."""
    event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    writer._get_file_writer().add_event(event, step=step)
