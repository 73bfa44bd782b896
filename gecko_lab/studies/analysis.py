"""What a study says so far: arms, paired comparisons, curves, importances, and what is missing."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from ..errors import LabError
from . import statistics
from .figures import Curve, number
from .records import StudyRecord, TrialRecord

AXES = {"tokens": "tokens read in training", "flops": "training FLOPs of the model", "seconds": "seconds of training"}
ENOUGH_FOR_IMPORTANCE = 8  # complete trials; with fewer, the densities that PED-ANOVA compares are noise


@dataclass
class ArmResult:
    """The complete trials of an arm, one a seed; ``spread`` is the standard deviation over seeds."""

    name: str
    trials: dict[int, TrialRecord]
    parameters: int
    overrides: list[str]

    @property
    def values(self) -> dict[int, float]:
        return {seed: t.value for seed, t in self.trials.items() if t.value is not None}

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.trials else math.nan

    @property
    def spread(self) -> float:
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.trials) > 1 else math.nan

    def total(self, axis: str) -> float:
        """Mean over seeds of the FLOPs, tokens or seconds of a whole run; NaN when no run recorded them."""
        ends = [e for t in self.trials.values() if (e := _last(t, f"progress/{axis}")) is not None]
        return float(np.mean(ends)) if ends else math.nan


@dataclass
class Analysis:
    """Everything that the pages print."""

    record: StudyRecord
    arms: list[ArmResult]  # the baseline first; one, "search", in a search
    baseline: str | None
    comparisons: list[statistics.Comparison]
    answer: str
    warnings: list[str]
    missing: list[str]
    best: TrialRecord
    counts: dict[str, int]
    importances: dict[str, float] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""

    @property
    def better(self) -> str:
        """The side of a figure on which lies what is better."""
        return "left" if self.record.direction == "minimize" else "right"

    @property
    def unfinished(self) -> list[TrialRecord]:
        return [t for t in self.record.trials if t.state != "complete"]


def analyse(record: StudyRecord, baseline: str | None = None) -> Analysis:
    """Raises LabError when no trial is complete or ``baseline`` is no arm; a partial study is analysed as far as it goes."""
    counts = Counter(t.state for t in record.trials)
    complete = [t for t in record.trials if t.state == "complete" and t.value is not None and math.isfinite(t.value)]
    main = [t for t in complete if t.stage == "main"]
    if not main:
        states = ", ".join(f"{n} {state}" for state, n in counts.items()) or "none at all"
        reasons = sorted({t.error.strip().splitlines()[-1] for t in record.trials if t.error and t.error.strip()})
        raise LabError(
            f"the study {record.name} has no complete trial to report (trials: {states}); run it further with the command "
            "that began it" + (f". Trials failed with: {'; '.join(reasons[:3])}" if reasons else "")
        )
    best = (min if record.direction == "minimize" else max)(main, key=lambda t: t.value)
    environments = _environments(main)
    shared = {
        "record": record,
        "best": best,
        "counts": dict(counts),
        "environments": environments,
        "command": _command(record),
    }
    if record.kind == "search":
        return _search(main, shared)
    return _ablation(main, baseline, shared)


def _search(complete: list[TrialRecord], shared: dict[str, Any]) -> Analysis:
    record: StudyRecord = shared["record"]
    best: TrialRecord = shared["best"]
    arm = ArmResult("search", {t.number: t for t in complete}, best.parameters, [])
    settings = " ".join(f"{k}={_plain(v)}" for k, v in best.params.items())
    answer = f"The best {record.metric} is {number(best.value or 0.0, 4)}, at {settings or 'the base setting'} (trial {best.number}"
    answer += f"), of {len(complete)} complete trials"
    answer += f" and {shared['counts']['pruned']} pruned ones." if shared["counts"].get("pruned") else "."
    importances = _importances(record)
    warnings = []
    if not importances and best.params:
        warnings.append(f"Importances need {ENOUGH_FOR_IMPORTANCE} complete trials that differ; there are {len(complete)}.")
    if len({t.seed for t in complete}) == 1:
        warnings.append(
            "Every trial has the same seed: close neighbours of the best may be as good. "
            "Compare the best few over several seeds before relying on their order."
        )
    return Analysis(
        arms=[arm],
        baseline=None,
        comparisons=[],
        answer=answer,
        warnings=warnings,
        missing=_unfinished(record),
        importances=importances,
        **shared,
    )


def _ablation(complete: list[TrialRecord], baseline: str | None, shared: dict[str, Any]) -> Analysis:
    record: StudyRecord = shared["record"]
    names = [arm.name for arm in record.arms]
    if baseline is not None and baseline not in names:
        raise LabError(f"--baseline {baseline}: the arms of {record.name} are {', '.join(names)}")
    baseline = baseline or names[0]
    facts = {arm.name: arm for arm in record.arms}
    warnings = []
    arms = []
    for name in sorted(names, key=lambda n: n != baseline):
        trials = {t.seed: t for t in sorted((t for t in complete if t.arm == name), key=lambda t: t.number)}
        parameters = next((t.parameters for t in trials.values() if t.parameters), facts[name].parameters)
        arms.append(ArmResult(name, trials, parameters, facts[name].overrides))
    values = {arm.name: arm.values for arm in arms}
    comparisons = statistics.compare(values, baseline)
    pairs = [len(c.seeds) for c in comparisons if c.seeds]
    if comparisons:
        warning = statistics.seeds_warning(max(pairs, default=0), len(comparisons))
        warnings += [warning] if warning else []
    return Analysis(
        arms=arms,
        baseline=baseline,
        comparisons=comparisons,
        answer=_answer(record, baseline, comparisons),
        warnings=warnings,
        missing=_missing_pairs(record, arms) + _unfinished(record),
        **shared,
    )


def _answer(record: StudyRecord, baseline: str, comparisons: list[statistics.Comparison]) -> str:
    paired = [c for c in comparisons if c.seeds]
    if not paired:
        return f"Nothing can be compared yet: no seed is complete in both {baseline} and another arm."
    clear = sorted((c for c in paired if c.clear), key=lambda c: -abs(c.mean))
    said = [f"{c.arm} {_verb(record, c)} {record.metric} by {_amount(c)} (corrected p {number(c.p_holm, 2)})" for c in clear]
    rest = [c for c in paired if not c.clear]
    if said:
        tail = f" {len(rest)} other arm{'s' if len(rest) > 1 else ''} cannot be told from it." if rest else ""
        return f"Against {baseline}: " + "; ".join(said) + "." + tail
    far = max(rest, key=lambda c: abs(c.mean))
    several = f"None of the {len(rest)} arms can" if len(rest) > 1 else f"{far.arm} cannot"
    lead = "Its difference" if len(rest) == 1 else f"The largest difference is that of {far.arm}"
    is_ = " is " if len(rest) == 1 else ", "
    return f"{several} be told from {baseline} with {max(len(c.seeds) for c in rest)} seeds. {lead}{is_}{_amount(far, signed=True)}."


def _verb(record: StudyRecord, c: statistics.Comparison) -> str:
    word = "worsens" if (c.mean > 0) == (record.direction == "minimize") else "improves"
    return word


def _amount(c: statistics.Comparison, signed: bool = False) -> str:
    if signed:
        interval = f" [{c.low:+.3g}, {c.high:+.3g}]" if math.isfinite(c.low) else ""
        return f"{c.mean:+.3g}{interval}"
    low, high = sorted((abs(c.low), abs(c.high))) if c.low * c.high > 0 else (c.low, c.high)
    return f"{abs(c.mean):.3g} [{low:.3g}, {high:.3g}]"


def _missing_pairs(record: StudyRecord, arms: list[ArmResult]) -> list[str]:
    planned = sorted({t.seed for t in record.trials if t.stage == "main"})
    return [
        f"{arm.name}: no complete trial with seed {', '.join(str(s) for s in gone)}"
        for arm in arms
        if (gone := [s for s in planned if s not in arm.trials])
    ]


def _unfinished(record: StudyRecord) -> list[str]:
    found = Counter(t.state for t in record.trials if t.state in ("running", "waiting"))
    return [f"{n} trial{'s are' if n > 1 else ' is'} still {state}" for state, n in found.items()]


def _importances(record: StudyRecord) -> dict[str, float]:
    """Optuna's PED-ANOVA, which needs no scikit-learn; {} where there is too little to go by."""
    if record.study is None:
        return {}
    done = record.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(done) < ENOUGH_FOR_IMPORTANCE or len({t.value for t in done}) == 1:
        return {}
    return dict(get_param_importances(record.study, evaluator=PedAnovaImportanceEvaluator()))


def curves(analysis: Analysis, metric: str, axis: str) -> list[Curve]:
    """Per arm the mean over seeds of ``metric`` against progress on ``axis``; in a search one curve a trial, the best first."""
    record = analysis.record
    if analysis.baseline is None:
        order = sorted(analysis.arms[0].trials.values(), key=lambda t: t.value or 0.0, reverse=record.direction == "maximize")
        return [Curve(f"trial {t.number}", _points(t, metric, axis)) for t in order[:6]]
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


def _last(trial: TrialRecord, name: str) -> float | None:
    return next((h[name] for h in reversed(trial.history) if h.get(name) is not None), None)


def _environments(trials: list[TrialRecord]) -> list[dict[str, Any]]:
    """The distinct machines and versions that the runs recorded, with the number of runs of each."""
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        facts = _environment(trial.run_dir)
        if facts is None:
            continue
        kept = {k: facts.get(k) for k in ("git_commit", "python", "platform", "gpu", "cpu_threads", "kernels", "versions")}
        kept["fingerprint"] = (facts.get("data") or {}).get("fingerprint")
        entry = found.setdefault(json.dumps(kept, sort_keys=True), {**kept, "runs": 0})
        entry["runs"] += 1
    return list(found.values())


def _environment(run_dir: Path) -> dict[str, Any] | None:
    try:
        history = json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        return None
    return history[-1] if isinstance(history, list) and history and isinstance(history[-1], dict) else None


def _command(record: StudyRecord) -> str:
    return f"python -m gecko_lab.sweep {shlex.quote(record.name)}"


def _plain(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)


def run_command(trial: TrialRecord) -> str:
    """The command that repeats one run by itself."""
    return shlex.join(["python", "-m", "gecko_lab.train", *trial.overrides])
