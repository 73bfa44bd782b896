"""What a study says so far: arms, paired comparisons, importances, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from ..errors import LabError
from . import statistics
from .records import StudyRecord, TrialRecord, steps_spent
from .repeat import recorded
from .svg import number

AXES = {"tokens": "tokens read in training", "flops": "training FLOPs of the model", "seconds": "seconds of training"}
SAID = 3  # arms that the answer names
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
    arms: list[ArmResult]  # the baseline first; in a search trials are keyed by number, the best first
    baseline: str | None
    comparisons: list[statistics.Comparison]
    answer: str
    warnings: list[str]
    missing: list[str]
    best: TrialRecord
    counts: dict[str, int]
    importances: dict[str, float] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def better(self) -> str:
        """The side of a figure on which lies what is better."""
        return "left" if self.record.direction == "minimize" else "right"

    @property
    def tuned(self) -> dict[str, dict[str, Any]]:
        """The parameters that tuning chose for each arm of an ablation."""
        if self.baseline is None:
            return {}
        return {t.arm: t.params for t in self.record.trials if t.stage == "main" and t.params}

    @property
    def unfinished(self) -> list[TrialRecord]:
        return [t for t in self.record.trials if t.state != "complete"]


def analyse(record: StudyRecord, baseline: str | None = None) -> Analysis:
    """Raises LabError when no trial is complete or ``baseline`` is no arm; a partial study is analysed so far."""
    counts = Counter(t.state for t in record.trials)
    complete = [t for t in record.trials if t.state == "complete" and t.value is not None and math.isfinite(t.value)]
    main = [t for t in complete if t.stage == "main"]
    if not main:
        states = ", ".join(f"{n} {state}" for state, n in counts.items()) or "none at all"
        reasons = sorted({t.error.strip().splitlines()[-1] for t in record.trials if t.error and t.error.strip()})
        none = "only trials that tune an arm complete, none" if complete else "no complete trial"
        raise LabError(
            f"the study {record.name} has {none} to report (trials: {states}); run it further with "
            "the command that began it" + (f". Trials failed with: {'; '.join(reasons[:3])}" if reasons else "")
        )
    best = (min if record.direction == "minimize" else max)(main, key=lambda t: t.value or 0.0)
    environments = recorded(main)
    shared = {
        "record": record,
        "best": best,
        "counts": dict(counts),
        "environments": environments,
    }
    if record.kind == "search":
        return _search(main, shared)
    return _ablation(main, baseline, shared)


def _search(complete: list[TrialRecord], shared: dict[str, Any]) -> Analysis:
    record: StudyRecord = shared["record"]
    names = [arm.name for arm in record.arms] or sorted({t.arm for t in complete})
    arms = []
    for name in names:
        trials = ranked([t for t in complete if t.arm == name], record.direction)
        arms.append(ArmResult(name, {t.number: t for t in trials}, trials[0].parameters if trials else 0, []))
    importances = _importances(record, names)
    warnings = [
        "Every trial has the same seed: neighbours of the best may be as good. Compare the best few over several seeds "
        "(an ablation study) before relying on their order."
    ]
    if not importances:
        warnings.append(f"Importances need {ENOUGH_FOR_IMPORTANCE} complete trials of an arm; there are too few.")
    return Analysis(
        arms=arms,
        baseline=None,
        comparisons=[],
        answer=_best_settings(record, arms, shared["counts"]),
        warnings=warnings,
        missing=[f"{arm.name}: no complete trial" for arm in arms if not arm.trials] + _unfinished(record),
        importances=importances,
        **shared,
    )


def ranked(trials: Iterable[TrialRecord], direction: str) -> list[TrialRecord]:
    """Complete trials, the best first."""
    return sorted(trials, key=lambda t: t.value or 0.0, reverse=direction == "maximize")


def _best_settings(record: StudyRecord, arms: list[ArmResult], counts: dict[str, int]) -> str:
    found = ranked((next(iter(arm.trials.values())) for arm in arms if arm.trials), record.direction)
    said = []
    for t in found:
        settings = " ".join(f"{k}={_plain(v)}" for k, v in t.params.items())
        arm = f"{t.arm}: " if len(arms) > 1 else ""
        said.append(f"{arm}{number(t.value or 0.0, 4)} at {settings or 'the base setting'} (trial {t.number})")
    pruned = f" and {counts['pruned']} pruned ones" if counts.get("pruned") else ""
    spent = steps_spent(record)
    saved = "" if spent is None else f" Pruning spent {spent:.0%} of the steps that all to the end would take."
    each = " of each arm" if len(arms) > 1 else ""
    return f"The best {record.metric}{each}, of {counts['complete']} complete trials{pruned}: {'; '.join(said)}.{saved}"


def _ablation(complete: list[TrialRecord], baseline: str | None, shared: dict[str, Any]) -> Analysis:
    record: StudyRecord = shared["record"]
    names = [arm.name for arm in record.arms]
    if baseline is not None and baseline not in names:
        raise LabError(f"--baseline {baseline}: the arms of {record.name} are {', '.join(names)}")
    baseline = baseline or ("baseline" if "baseline" in names else names[0])
    facts = {arm.name: arm for arm in record.arms}
    warnings = []
    arms = []
    for name in sorted(names, key=lambda n: n != baseline):
        trials = {t.seed: t for t in sorted((t for t in complete if t.arm == name), key=lambda t: t.number)}
        parameters = next((t.parameters for t in trials.values() if t.parameters), facts[name].parameters)
        arms.append(ArmResult(name, trials, parameters, facts[name].overrides))
    values = {arm.name: arm.values for arm in arms}
    comparisons = statistics.compare(values, baseline)
    if comparisons:
        warning = statistics.seeds_warning(max(len(c.seeds) for c in comparisons), len(comparisons))
        warnings += [warning] if warning else []
    same = [c.arm for c in comparisons if c.seeds and not any(c.differences)]
    if same:
        warnings.append(
            f"{', '.join(same)}: exactly the values of {baseline} on every seed. At these sizes it has no effect "
            "(for instance a memory that no document is long enough to reach)."
        )
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
    clear, likely, rest = (
        sorted((c for c in paired if choose(c)), key=lambda c: -abs(c.mean))
        for choose in (lambda c: c.clear, lambda c: c.likely, lambda c: not c.clear and not c.likely)
    )
    sentences = []
    if clear:
        sentences.append(f"Against {baseline}: {_several(record, clear)}")
    if likely:
        lead = (
            "Only if differences between seeds are normally distributed"
            if not clear
            else "If they are normally distributed also"
        )
        sentences.append(f"{lead}: {_several(record, likely)}")
    if rest:
        names = ", ".join(c.arm for c in rest[:SAID]) + (f" and {len(rest) - SAID} more" if len(rest) > SAID else "")
        far = rest[0]
        interval = f" [{far.low:+.3g}, {far.high:+.3g}]" if math.isfinite(far.low) else ""
        which = "difference" if len(rest) == 1 else f"largest difference ({far.arm})"
        sentences.append(
            f"Not told from {baseline} with {_seeds(len(far.seeds))}: {names}; {which} {far.mean:+.3g}{interval}"
        )
    return ". ".join(sentences) + "."


def _several(record: StudyRecord, comparisons: list[statistics.Comparison]) -> str:
    """Arm by arm, the largest difference first."""
    said = []
    for c in comparisons[:SAID]:
        worse = (c.mean > 0) == (record.direction == "minimize")
        p = c.p_holm if c.clear else c.p_t_holm
        verb, interval = "worsens" if worse else "improves", f"[{c.low:+.3g}, {c.high:+.3g}]"
        said.append(f"{c.arm} {verb} {record.metric} by {abs(c.mean):.3g} {interval} (corrected p {number(p, 3)})")
    more = len(comparisons) - SAID
    return "; ".join(said) + (f"; and {more} more" if more > 0 else "")


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _missing_pairs(record: StudyRecord, arms: list[ArmResult]) -> list[str]:
    planned = sorted({*record.sweep.get("seeds", []), *(t.seed for t in record.trials if t.stage == "main")})
    return [
        f"{arm.name}: no complete trial with seed {', '.join(str(s) for s in gone)}"
        for arm in arms
        if (gone := [s for s in planned if s not in arm.trials])
    ]


def _unfinished(record: StudyRecord) -> list[str]:
    found = Counter(t.state for t in record.trials if t.state in ("running", "waiting"))
    return [f"{n} trial{'s are' if n > 1 else ' is'} still {state}" for state, n in found.items()]


def _importances(record: StudyRecord, arms: list[str]) -> dict[str, float]:
    """Optuna's PED-ANOVA, which needs no scikit-learn, within each arm; {} where there is too little to go by."""
    if record.study is None:
        return {}
    found: dict[str, float] = {}
    done = record.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    for arm in arms:
        mine = [t for t in done if len(arms) == 1 or t.user_attrs.get("arm") == arm]
        if len(mine) < ENOUGH_FOR_IMPORTANCE or len({t.value for t in mine}) == 1:
            continue
        part = optuna.create_study(direction=record.study.direction)
        part.add_trials(mine)
        shares = get_param_importances(part, evaluator=PedAnovaImportanceEvaluator())
        found |= {f"{arm}: {name}" if len(arms) > 1 else name: share for name, share in shares.items()}
    return found


def _last(trial: TrialRecord, name: str) -> float | None:
    return next((h[name] for h in reversed(trial.history) if h.get(name) is not None), None)


def _plain(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)
