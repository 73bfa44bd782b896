"""What a study holds, read back as plain values for reports; reading changes nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ..errors import LabError
from .storage import open_storage

ATTRIBUTE = "gecko_lab"
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass
class Arm:
    """A named variant that a study compares: what it changes, and its size at the study's base."""

    name: str
    overrides: list[str]
    parameters: int = 0
    flops_per_token: float = 0.0  # forward


@dataclass
class TrialRecord:
    """One run of a study. ``value`` is the metric at the end, or at the last validation of a pruned trial.

    ``stage`` is "tune" for the trials that chose an arm's learning rate, else "main". ``error`` says why a trial
    failed; ``retried`` that it was killed or stopped, so that another does its work again (a killed one: once).
    ``history`` are the lines of metrics.jsonl; empty for an attempt that another continued in the same folder.
    """

    number: int
    state: str  # complete, pruned, failed, running or waiting
    arm: str
    seed: int
    overrides: list[str]
    params: dict[str, Any]
    value: float | None
    metrics: dict[str, float]
    run_dir: Path
    history: list[dict[str, Any]]
    started: datetime | None
    ended: datetime | None
    parameters: int
    error: str | None
    stage: str = "main"
    retried: bool = False
    intermediate: dict[int, float] = field(default_factory=dict)  # metric at each validation, by global step


@dataclass
class StudyRecord:
    """A study: its question and every trial, failed attempts among them, by number."""

    name: str
    kind: str  # search or ablation
    question: str
    metric: str
    direction: str  # minimize or maximize
    arms: list[Arm]
    trials: list[TrialRecord]
    folder: Path
    commit: str | None = None
    sweep: dict[str, Any] = field(default_factory=dict)  # the sweep file, as the study began
    study: optuna.Study | None = None  # for Optuna's importances and plots


def steps_spent(record: StudyRecord) -> float | None:
    """Steps of the complete and pruned trials, as a share of what all to the end would be; None: nothing was pruned."""
    complete = [t.history[-1]["step"] for t in record.trials if t.state == "complete" and t.history]
    pruned = [max(t.intermediate) for t in record.trials if t.state == "pruned" and t.intermediate]
    if not complete or not pruned:
        return None
    return (sum(complete) + sum(pruned)) / (max(complete) * (len(complete) + len(pruned)))


def load_study(where: str | Path | BaseStorage, name: str | None = None) -> StudyRecord:
    """The study in a folder (``studies/NAME``), a journal file or a database; ``name`` where there are several.

    Raises LabError when there is none, or when it was not made by gecko_lab.
    """
    storage = where if isinstance(where, BaseStorage) else open_storage(_location(where))
    names = optuna.get_all_study_names(storage)
    if name is None and not isinstance(where, BaseStorage) and (Path(where) / "study.json").is_file():
        name = json.loads((Path(where) / "study.json").read_text())["name"]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        asked = f", not {name}" if name else ""
        raise LabError(f"{where}: holds {', '.join(names) or 'no study'}; name one of them{asked}")
    study = optuna.load_study(study_name=name, storage=storage)
    facts = study.user_attrs.get(ATTRIBUTE)
    if facts is None:
        raise LabError(f"{where}: the study {name} was not made by gecko_lab.sweep")
    folder = Path(where) if not isinstance(where, BaseStorage) and Path(where).is_dir() else Path(facts["folder"])
    if not isinstance(where, BaseStorage) and Path(where).suffix == ".log":
        folder = Path(where).parent
    arms = [Arm(**arm) for arm in facts["arms"]]
    found = [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get("duplicate")]
    trials = [_record(trial, {arm.name: arm for arm in arms}, folder) for trial in found]
    last = {t.run_dir: t.number for t in trials}
    for t in trials:
        if t.number != last[t.run_dir]:
            t.history = []  # it is the history of the attempt that continued this one
    return StudyRecord(
        name=name,
        kind=facts["kind"],
        question=facts["question"],
        metric=facts["metric"],
        direction=facts["direction"],
        arms=arms,
        trials=trials,
        folder=folder,
        commit=facts["commit"],
        sweep=facts["sweep"],
        study=study,
    )


def _location(where: str | Path) -> str | Path:
    """A folder whose study lives in a database has a study.json that says where (without a password)."""
    file = Path(where) / "study.json"
    if "://" not in str(where) and file.is_file():
        storage = json.loads(file.read_text())["storage"]
        return storage if "://" in storage else where
    return where


def _record(trial: FrozenTrial, arms: dict[str, Arm], folder: Path) -> TrialRecord:
    facts = {**trial.user_attrs, **trial.user_attrs.get("began", {}), **trial.user_attrs.get("ended", {})}
    state = STATES[trial.state]
    value = trial.value if state == "complete" else None
    if state == "pruned" and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    run_dir = folder / "runs" / facts.get("run", f"{trial.number:04d}")
    arm = facts.get("arm", "search")
    return TrialRecord(
        number=trial.number,
        state=state,
        arm=arm,
        seed=facts.get("seed", 0),
        overrides=facts.get("overrides", []),
        params=dict(trial.params) or facts.get("params", {}),
        value=value,
        metrics=facts.get("metrics", {}),
        run_dir=run_dir,
        history=read_history(run_dir / "metrics.jsonl"),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
        parameters=facts.get("parameters") or (arms[arm].parameters if arm in arms else 0),
        error=facts.get("error"),
        stage=facts.get("stage", "main"),
        retried=state == "failed" and "again" in facts,
        intermediate=dict(trial.intermediate_values),
    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a half-written last one; empty when there is none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plain(arm: Arm) -> dict[str, Any]:
    """An arm as the study stores it."""
    return dataclasses.asdict(arm)
