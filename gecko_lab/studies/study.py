"""Begin a study, or join one that exists if it asks the same with the same code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from ..errors import LabError
from ..run import git_commit, write_atomic
from .code import fingerprint
from .records import ATTRIBUTE, Arm, plain
from .storage import redacted
from .sweepfile import GROWING, Sweep


def join(
    storage: BaseStorage, name: str, sweep: Sweep, arms: list[Arm], folder: Path, *, allow_code_change: bool = False
) -> tuple[Sweep, list[Arm]]:
    """The study's sweep and arms; what an earlier worker stored goes first.

    Raises LabError when the study asks something else, was not made here, or began with other code.
    """
    direction = StudyDirection[sweep.direction.upper()]
    study = optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    facts = study.user_attrs.get(ATTRIBUTE)
    if facts is None:
        if study.get_trials(deepcopy=False):
            raise LabError(f"name={name}: the storage holds a study of this name that gecko_lab.sweep did not make")
        facts = _facts(sweep, arms, folder)
        study.set_user_attr(ATTRIBUTE, facts)
        return sweep, arms
    _check_same(name, facts["sweep"], sweep)
    code, changed = fingerprint(), False
    if code not in facts["codes"]:
        if not allow_code_change:
            raise LabError(
                f"name={name}: the study began with other code ({facts['commit']}; fingerprint {facts['codes'][0]}, "
                f"here {code}). Check that code out, take another name=..., or accept it with allow_code_change=true"
            )
        facts["codes"].append(code)
        changed = True
    before = Sweep(**facts["sweep"])
    grown = dataclasses.replace(
        before,
        trials=max(before.trials, sweep.trials),
        seeds=[*before.seeds, *(s for s in sweep.seeds if s not in before.seeds)],
    )
    if changed or grown != before:
        study.set_user_attr(ATTRIBUTE, facts | {"sweep": dataclasses.asdict(grown)})
    return grown, [Arm(**arm) for arm in facts["arms"]]


def known_arms(storage: BaseStorage, name: str) -> list[Arm]:
    """The arms of a study that began before; empty when there is none, or none of gecko_lab's."""
    if name not in optuna.get_all_study_names(storage):
        return []
    facts = optuna.load_study(study_name=name, storage=storage).user_attrs.get(ATTRIBUTE, {})
    return [Arm(**arm) for arm in facts.get("arms", [])]


def note_folder(folder: Path, name: str, storage: str) -> None:
    """Say in the study's folder where the study is, so that the folder alone leads to it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "study.json", json.dumps({"name": name, "storage": redacted(storage)}) + "\n")


def _facts(sweep: Sweep, arms: list[Arm], folder: Path) -> dict[str, Any]:
    return {
        "kind": sweep.kind,
        "question": sweep.question,
        "metric": sweep.metric,
        "direction": sweep.direction,
        "arms": [plain(arm) for arm in arms],
        "folder": str(folder.absolute()),
        "commit": git_commit(),
        "codes": [fingerprint()],
        "sweep": dataclasses.asdict(sweep),
    }


def _check_same(name: str, stored: dict[str, Any], sweep: Sweep) -> None:
    here = json.loads(json.dumps(dataclasses.asdict(sweep)))
    different = [k for k in here if k not in (*GROWING, "question") and stored.get(k) != here[k]]
    if different:
        lines = "; ".join(f"{k}: there {stored.get(k)}, here {here[k]}" for k in different)
        raise LabError(f"name={name}: belongs to another study, which differs in {lines}. Choose another name=...")
