"""Accuracy against the size of the state, for studies of ``data=mqar``, beside what others published.

The state is measured: the model of a trial reads a row, and what it carries then is counted, in numbers (as the
published figure counts) and in bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..components import state as states
from ..config import TrainConfig
from ..data.synthetic import SyntheticConfig
from ..errors import LabError
from ..model import LanguageModel
from .records import TrialRecord
from .svg import number

if TYPE_CHECKING:
    from .analysis import Analysis

# (numbers in the state, accuracy), read by eye to +-0.02 from the figure in the README of HazyResearch/zoology: trained
# on 64 to 256 tokens with up to 64 pairs, tested to 1,024 tokens with 256 pairs, each hybrid with a short convolution
PUBLISHED = {
    "sliding window": [(1.0e4, 0.08), (1.8e4, 0.145), (3.4e4, 0.31), (6.7e4, 0.51), (1.3e5, 0.655), (2.6e5, 0.80),
                       (5.2e5, 0.935), (1.0e6, 1.0)],
    "Mamba-2": [(8e3, 0.52), (1.6e4, 0.69), (3.3e4, 0.785), (6.5e4, 0.83), (1.0e5, 0.845)],
    "Based": [(9e3, 0.67), (2.4e4, 0.84), (4e4, 0.91), (8e4, 0.985)],
    "GLA": [(5e3, 0.53), (1.8e4, 0.77), (6.9e4, 0.95)],
    "DeltaNet": [(9e3, 0.79), (3.4e4, 0.963), (1.3e5, 0.994)],
    "Gated DeltaNet": [(1.7e4, 0.89), (6.7e4, 0.988)],
    "RWKV-7": [(1.7e4, 0.815), (1.3e5, 0.915)],
}  # fmt: skip


def applies(analysis: Analysis) -> bool:
    """Whether the study compares the accuracy of MQAR runs."""
    ablation = analysis.baseline is not None and analysis.record.metric == "val/accuracy"
    return ablation and any("data=mqar" in t.overrides for t in analysis.record.trials)


def state_size(config: TrainConfig) -> tuple[int, int]:
    """(numbers, bytes) that a stream carries in float32 after a row of the run's data; of its end or one before, the
    larger, as a chunk's buffer is empty when the chunk is whole."""
    if not isinstance(config.data, SyntheticConfig):
        raise LabError(f"data={config.data.name}: the state's size is measured on a synthetic task")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model, sizes = LanguageModel(config.model).eval(), []
        tokens = torch.zeros(1, config.data.seq_len, dtype=torch.int64)
        for row in (tokens, tokens[:, 1:]):
            state = model.features(row)[1] if row.shape[1] else None
            sizes.append((sum(t.numel() for t in states.tensors(state)), states.nbytes(state)))
    return max(sizes)


def figure(analysis: Analysis) -> tuple[str, str]:
    """(SVG, note). Arms called LINE-SIZE make a line each; one without a dash belongs to the line of its family."""
    from ..tasks.figures import Line, lines
    from .arms import built

    points: dict[str, list[tuple[float, float]]] = {}
    facts, rows = [], set()
    for arm in analysis.arms:
        if not arm.trials:
            continue
        first: TrialRecord = next(iter(arm.trials.values()))
        config, _ = built(first.overrides)
        numbers, size = state_size(config)
        name = arm.name.rpartition("-")[0] or config.model.family
        points.setdefault(name, []).append((numbers, arm.mean))
        spread = f" \u00b1 {arm.spread:.3f}" if math.isfinite(arm.spread) else ""
        facts.append(f"{arm.name} {number(numbers)} numbers ({number(size / 1024)} KiB): {arm.mean:.3f}{spread}")
        rows.add(f"{config.data.seq_len} tokens with {config.data.answers} pairs")  # type: ignore[attr-defined]
    ours = [Line(name, sorted(found)) for name, found in points.items()]
    theirs = [Line(f"{name} (published)", found, dashed=True, marks=False) for name, found in PUBLISHED.items()]
    svg = lines(
        "MQAR: accuracy against the state",
        [*ours, *theirs],
        "numbers that a stream carries",
        "accuracy",
        y_range=(0.0, 1.0),
    )
    note = (
        f"Here: {' and '.join(sorted(rows))}, mean over seeds, the state after a row in float32. {'; '.join(facts)}. "
        "Dashed: published for another protocol (trained on 64 to 256 tokens with up to 64 pairs, tested to 1,024 with "
        "256; best of several learning rates), read by eye to \u00b10.02 from the figure of Zoology "
        "(github.com/HazyResearch/zoology)."
    )
    return svg, note
