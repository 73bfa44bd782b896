"""The study as workers share it: claim a trial, keep it alive, say how it ended, notice the workers that are gone."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from ..errors import LabError
from . import plan, space
from .sweepfile import Sweep

OWNERLESS = 6  # a claim that was not followed by its owner's name within this part of the patience is lost
ENDS = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


class Lost(Exception):
    """Another worker took this one for dead and its trial away."""


@dataclass
class Outcome:
    """How a trial ended: complete, pruned, failed (for good), lost (killed; done again once), stopped (done again)."""

    state: str
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    error: str | None = None


@dataclass
class Claim:
    """A trial that this worker runs."""

    id: int
    number: int
    arm: str
    seed: int
    run: str  # name of the run's folder; that of an attempt that was killed or stopped, which is then continued
    overrides: list[str]
    beats: int = 0
    beaten: float = 0.0


class _OfArm(optuna.Study):
    """A study that shows sampler and pruner the trials of one arm."""

    arm: str = ""

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [t for t in super()._get_trials(deepcopy, states, use_cache) if t.user_attrs.get("arm") == self.arm]


class Ledger:
    """One worker's view of the study. ``patience``: seconds without a beat after which a worker is taken for dead."""

    def __init__(
        self, storage: BaseStorage, name: str, sweep: Sweep, arms: dict[str, list[str]], *, patience: float = 90.0
    ) -> None:
        self.storage, self.name, self.sweep, self.arms, self.patience = storage, name, sweep, arms, patience
        self.study = optuna.load_study(study_name=name, storage=storage)
        self.seen: dict[int, tuple[Any, float]] = {}

    def trials(self) -> list[FrozenTrial]:
        """What the storage holds now."""
        return self.study.get_trials(deepcopy=False)

    def fill(self, trials: list[FrozenTrial], *, failed: bool = False) -> bool:
        """Add the trials that are missing; whether there were any."""
        return plan.fill(self.study, self.sweep, list(self.arms), trials, failed=failed)

    def claim(self, trials: list[FrozenTrial]) -> Claim | None:
        """One of the waiting trials, now this worker's, with its parameters chosen; None when others took them all.

        Trials are numbered as they are stored: whoever sees one sees those that came before it.
        """
        earlier = {t.number: row[:i] for row in plan.attempts(trials).values() for i, t in enumerate(row)}
        for trial in trials:
            if trial.state != TrialState.WAITING:
                continue
            try:
                if not self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
            except UpdateFinishedTrialError:
                continue
            if trial.number in earlier:
                try:
                    return self._begin(trial, earlier[trial.number])
                except UpdateFinishedTrialError:
                    continue  # taken for dead meanwhile
            self.storage.set_trial_user_attr(trial._trial_id, "duplicate", True)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return None

    def _begin(self, trial: FrozenTrial, earlier: list[FrozenTrial]) -> Claim:
        facts, key = trial.user_attrs, trial._trial_id
        view = self._view(facts["arm"], trial.number)
        if self.sweep.kind == "search":
            suggested = Trial(view, key)
            params = {d.key: d.suggest(suggested) for d in self.sweep.dimensions()}
        else:
            params = facts["params"]
        changes = [*self.sweep.base, *self.arms[facts["arm"]], *space.overrides(params), f"seed={facts['seed']}"]
        label = f"{facts['arm']}-seed{facts['seed']}" if facts["stage"] == "main" else f"tune-{facts['arm']}"
        run = facts.get("continues") or f"{label}-{trial.number:04d}"
        if facts.get("continues"):  # what the interrupted attempt reported holds for this one
            for step, value in earlier[-1].intermediate_values.items():
                self.storage.set_trial_intermediate_value(key, step, value)
        self.storage.set_trial_user_attr(key, "began", {"worker": here(), "overrides": changes, "run": run})
        return Claim(key, trial.number, facts["arm"], facts["seed"], run, changes, beaten=time.monotonic())

    def beat(self, claim: Claim) -> None:
        """Say that the trial is alive, when it is time to. Raises Lost when it was taken away."""
        if time.monotonic() - claim.beaten < self.patience / 6:
            return
        claim.beats, claim.beaten = claim.beats + 1, time.monotonic()
        try:
            self.storage.set_trial_user_attr(claim.id, "beat", claim.beats)
        except UpdateFinishedTrialError as error:
            raise Lost(f"trial {claim.number}") from error

    def report(self, claim: Claim, step: int, value: float) -> bool:
        """Record the metric at a step; whether the trial should be given up."""
        try:
            self.storage.set_trial_intermediate_value(claim.id, step, value)
        except UpdateFinishedTrialError as error:
            raise Lost(f"trial {claim.number}") from error
        if self.sweep.pruner["name"] == "none":
            return False
        view = self._view(claim.arm, claim.number)
        return view.pruner.prune(view, self.storage.get_trial(claim.id))

    def end(self, claim: Claim, outcome: Outcome) -> None:
        """Close the trial. Raises Lost when it was taken away."""
        facts: dict[str, Any] = {"metrics": outcome.metrics, "parameters": outcome.parameters, "error": outcome.error}
        if outcome.state in (plan.LOST, plan.STOPPED):
            facts["again"] = outcome.state
        state = ENDS.get(outcome.state, TrialState.FAIL)
        try:
            self.storage.set_trial_user_attr(claim.id, "ended", facts)
            values = [outcome.value] if state == TrialState.COMPLETE and outcome.value is not None else None
            self.storage.set_trial_state_values(claim.id, state, values)
        except UpdateFinishedTrialError as error:
            raise Lost(f"trial {claim.number}") from error

    def reap(self, trials: list[FrozenTrial]) -> bool:
        """Close the trials of workers that are gone: at once on this machine, elsewhere when the beat stands still."""
        closed = False
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            owner, beat = trial.user_attrs.get("began", {}).get("worker", {}), trial.user_attrs.get("beat", 0)
            before, since = self.seen.get(trial.number, (None, 0.0))
            if trial.number not in self.seen or before != beat:
                self.seen[trial.number] = (beat, time.monotonic())
                since = time.monotonic()
            patience = self.patience if owner else self.patience / OWNERLESS
            if gone(owner) or time.monotonic() - since > patience:
                claim = Claim(trial._trial_id, trial.number, "", 0, "", [])
                host = owner.get("host", "unnamed").split()[0]
                try:
                    self.end(claim, Outcome(plan.LOST, error=f"its worker is gone ({host})"))
                    closed = True
                except Lost:
                    continue  # another worker was faster, or it ended after all
        return closed

    def check_fuse(self, trials: list[FrozenTrial]) -> None:
        """Raise LabError when the first trials all failed: the rest would, too."""
        ended = [t for t in trials if t.state.is_finished()]
        done = [t for t in ended if not (plan.why_again(t) or t.user_attrs.get("duplicate"))]
        if len(done) >= 3 and all(t.state == TrialState.FAIL for t in done):
            raise LabError(
                f"every trial so far failed ({len(done)}), so the study stops. The last said: "
                f"{done[-1].user_attrs['ended']['error']}"
            )

    def _view(self, arm: str, number: int) -> _OfArm:
        view = _OfArm(self.name, self.storage, make_sampler(self.sweep, number), make_pruner(self.sweep))
        view.arm = arm
        return view


def make_sampler(sweep: Sweep, number: int) -> BaseSampler:
    """Seeded by the trial's number, so that no two workers draw alike."""
    options = {k: v for k, v in sweep.sampler.items() if k != "name"}
    seed = options.pop("seed", sweep.seeds[0]) * 100_003 + number
    try:
        if sweep.sampler["name"] == "tpe":
            return TPESampler(**{"constant_liar": True, **options}, seed=seed)
        return RandomSampler(seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise LabError(f"sampler={sweep.sampler}: {error}") from error


def make_pruner(sweep: Sweep) -> BasePruner:
    """Optuna's, with the options that stand beside the name."""
    options = {k: v for k, v in sweep.pruner.items() if k != "name"}
    kinds: dict[str, type[BasePruner]] = {
        "none": NopPruner,
        "median": MedianPruner,
        "halving": SuccessiveHalvingPruner,
        "hyperband": HyperbandPruner,
    }
    try:
        return kinds[sweep.pruner["name"]](**options)
    except (TypeError, ValueError) as error:
        raise LabError(f"pruner={sweep.pruner}: {error}") from error


def here() -> dict[str, Any]:
    """This process, as another on the same machine can look for it."""
    return {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}


def gone(owner: dict[str, Any]) -> bool:
    """Whether the process is of this machine and no longer runs."""
    return owner.get("host") == _host() and _born(owner["pid"]) != owner["born"]


def _host() -> str:
    try:
        space_of_pids = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        space_of_pids = boot = ""
    return f"{platform.node()} {boot} {space_of_pids}".strip()


def _born(pid: int) -> str | None:
    """When the process began, which tells it from a later one with its number; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else stat[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
