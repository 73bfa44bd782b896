"""What a reader needs to repeat a study: where its runs ran, and the commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from .records import TrialRecord


def recorded(trials: list[TrialRecord]) -> list[dict[str, Any]]:
    """The distinct machines and versions that the runs recorded, with the number of runs of each."""
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        facts = _environment(trial.run_dir)
        if facts is None:
            continue
        kept = {
            k: facts.get(k) for k in ("git_commit", "python", "platform", "gpu", "cpu_threads", "kernels", "versions")
        }
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


def run_command(trial: TrialRecord) -> str:
    """The command that repeats one run by itself."""
    return shlex.join(["python", "-m", "gecko_lab.train", *trial.overrides])
