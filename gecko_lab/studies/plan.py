"""Which trials a study must hold: its slots, each filled by one trial at a time, whoever plans and how often.

Every worker plans again and again from what the storage says. Two that plan at once may both add a trial for the same
slot and generation; the one with the lower number counts and the other is set aside before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from . import space
from .sweepfile import Sweep

RETRIES = 1  # of a trial whose process or worker was killed
LOST, STOPPED = "lost", "stopped"  # why a failed trial is done again


@dataclass(frozen=True)
class Slot:
    """One cell of a study: what exactly one complete trial answers."""

    key: str
    arm: str
    seed: int
    stage: str = "main"
    fixed: dict[str, Any] = field(default_factory=dict)  # parameters that the sampler does not choose


def slots(sweep: Sweep, arms: list[str], trials: list[FrozenTrial]) -> list[Slot]:
    """The slots known now: an arm that is tuned gets its seeds once the tuning trials are done."""
    if sweep.kind == "search":
        return _search(sweep, arms)
    if not sweep.tune:
        return [Slot(f"{arm}/{seed}", arm, seed) for seed in sweep.seeds for arm in arms]
    points = space.grid(sweep.dimensions())
    found = []
    for arm in arms:
        tuning = [Slot(f"tune/{arm}/{i}", arm, sweep.tune_seed, "tune", point) for i, point in enumerate(points)]
        found += tuning
        best = _best(sweep, tuning, trials)
        if best is not None:
            found += [Slot(f"{arm}/{seed}", arm, seed, "main", best) for seed in sweep.seeds]
    return found


def _search(sweep: Sweep, arms: list[str]) -> list[Slot]:
    points: list[dict[str, Any]] = [{}] * sweep.trials
    if sweep.sampler["name"] == "grid":
        points = space.grid(sweep.dimensions())
    return [Slot(f"{arm}/{i}", arm, sweep.seeds[0], "main", point) for i, point in enumerate(points) for arm in arms]


def _best(sweep: Sweep, tuning: list[Slot], trials: list[FrozenTrial]) -> dict[str, Any] | None:
    """The point of the best tuning trial when none is left to run; None before, or when all failed."""
    by_slot = attempts(trials)
    done = []
    for slot in tuning:
        row = by_slot.get(slot.key)
        if not row or again(row) or not row[-1].state.is_finished():
            return None
        value = row[-1].value
        if row[-1].state == TrialState.COMPLETE and value is not None:
            done.append((value, slot.fixed))
    pick = min if sweep.direction == "minimize" else max
    return pick(done, key=lambda pair: pair[0])[1] if done else None


def attempts(trials: list[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """Trials of each slot in order of generation, without those set aside."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        row = found.setdefault(trial.user_attrs.get("slot", ""), [])
        if trial.user_attrs.get("generation") == len(row):
            row.append(trial)
    return found


def why_again(trial: FrozenTrial) -> str | None:
    """lost or stopped for a trial that ended without an answer, else None."""
    return trial.user_attrs.get("ended", {}).get("again") if trial.state == TrialState.FAIL else None


def again(row: list[FrozenTrial]) -> bool:
    """Whether a slot's last trial ended in a way that asks for another."""
    last = row[-1]
    if last.state != TrialState.FAIL:
        return False
    why = why_again(last)
    lost = sum(why_again(trial) == LOST for trial in row)
    return why == STOPPED or (why == LOST and lost <= RETRIES)


def fill(
    study: optuna.Study, sweep: Sweep, arms: list[str], trials: list[FrozenTrial], *, failed: bool = False
) -> bool:
    """Add a waiting trial for every slot that needs one, with ``failed`` also where one failed; whether any did."""
    by_slot, added = attempts(trials), False
    for slot in slots(sweep, arms, trials):
        row = by_slot.get(slot.key, [])
        if row and not again(row) and not (failed and row[-1].state == TrialState.FAIL):
            continue
        fixed, added = row[-1].params if row else {}, True
        begun = row[-1].user_attrs.get("began") if row and why_again(row[-1]) else None
        study.enqueue_trial(
            {**slot.fixed, **fixed},
            user_attrs={
                "continues": begun and begun["run"],
                "slot": slot.key,
                "generation": len(row),
                "arm": slot.arm,
                "seed": slot.seed,
                "stage": slot.stage,
                "params": slot.fixed,
            },
        )
    return added
