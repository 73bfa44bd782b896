"""Loss curves of a study against tokens, FLOPs and seconds."""

from __future__ import annotations

from typing import Any

import numpy as np

from .analysis import Analysis, ArmResult
from .figures import Curve
from .records import TrialRecord

BEST_CURVES = 6  # trials of a search that are drawn


def curves(analysis: Analysis, metric: str, axis: str) -> list[Curve]:
    """``metric`` against progress on ``axis``: the mean over seeds of each arm; in a search the best trial of each
    arm, or the best few where there is one arm."""
    if analysis.baseline is None:
        if len(analysis.arms) > 1:
            return [
                Curve(a.name, _points(next(iter(a.trials.values())), metric, axis)) for a in analysis.arms if a.trials
            ]
        best = list(analysis.arms[0].trials.values())[:BEST_CURVES]
        return [Curve(f"trial {t.number}", _points(t, metric, axis)) for t in best]
    return [_mean_curve(arm, metric, axis) for arm in analysis.arms if arm.trials]


def _mean_curve(arm: ArmResult, metric: str, axis: str) -> Curve:
    by_step: dict[int, list[tuple[float, float]]] = {}
    for trial in arm.trials.values():
        for line in _lines(trial, metric, axis):
            by_step.setdefault(line["step"], []).append((line[f"progress/{axis}"], line[metric]))
    everyone = {s: p for s, p in by_step.items() if len(p) == len(arm.trials)}
    mean = [tuple(np.mean(everyone[s], axis=0).tolist()) for s in sorted(everyone)]
    seeds = [_points(t, metric, axis) for t in arm.trials.values()] if len(arm.trials) > 1 else []
    return Curve(arm.name, [(x, y) for x, y in mean], seeds)


def _points(trial: TrialRecord, metric: str, axis: str) -> list[tuple[float, float]]:
    return [(line[f"progress/{axis}"], line[metric]) for line in _lines(trial, metric, axis)]


def _lines(trial: TrialRecord, metric: str, axis: str) -> list[dict[str, Any]]:
    """The last record of each step that has both numbers."""
    found = {h["step"]: h for h in trial.history if h.get(metric) is not None and h.get(f"progress/{axis}") is not None}
    return list(found.values())
