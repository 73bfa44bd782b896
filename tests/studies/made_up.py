"""Made-up studies with known answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from gecko_lab.studies.records import Arm, StudyRecord, TrialRecord

EFFECTS = {"gecko": 0.0, "no_awm": 0.12, "real_ema": 0.015, "a<b> & long_name": -0.003}


def history(end: float, seed: int, flops: float) -> list[dict[str, Any]]:
    lines = []
    for step in range(10, 210, 10):
        loss = end + 3.0 * math.exp(-step / 40)
        progress = {"tokens": step * 512, "flops": step * 512 * flops, "seconds": step * (0.2 + 0.01 * seed)}
        axes = {f"progress/{k}": float(v) for k, v in progress.items()}
        lines.append({"step": step, "train/loss": loss + 0.02, **axes})
        if step % 20 == 0:
            lines.append({"step": step, "val/loss": loss, "position_curve": [], **axes})
    return lines


def trial(number: int, arm: str, seed: int, value: float | None, folder: Path, **more: Any) -> TrialRecord:
    facts: dict[str, Any] = {
        "number": number,
        "state": "complete" if value is not None else "failed",
        "arm": arm,
        "seed": seed,
        "overrides": [f"seed={seed}", "model=gecko", f"+ablation={arm}"],
        "params": {},
        "value": value,
        "metrics": {"val/bits_per_byte": 1.4 * value} if value is not None else {},
        "run_dir": folder / "runs" / f"{number:04d}",
        "history": history(value, seed, 3e5) if value is not None else [],
        "started": None,
        "ended": None,
        "parameters": 123456,
        "error": None,
    }
    return TrialRecord(**facts | more)


def ablation(folder: Path, seeds: int) -> StudyRecord:
    """Made-up numbers with known differences."""
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 0.05, seeds)
    trials = [
        trial(i * seeds + s, arm, s, 2.0 + effect + hard[s] + rng.normal(0, 0.01), folder)
        for i, (arm, effect) in enumerate(EFFECTS.items())
        for s in range(seeds)
    ]
    return StudyRecord(
        name="components",
        kind="ablation",
        question="Which components does the loss need?",
        metric="val/loss",
        direction="minimize",
        arms=[Arm(name, [f"+ablation={name}"], 120000) for name in EFFECTS],
        trials=trials,
        folder=folder,
    )


def search(folder: Path, trials: int = 20, arms: tuple[str, ...] = ("search",)) -> StudyRecord:
    """A real Optuna study of a made-up function in which only the learning rate matters."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(t: optuna.Trial) -> float:
        lr = t.suggest_float("optim.lr", 1e-4, 1e-1, log=True)
        t.set_user_attr("arm", arms[t.number % len(arms)])
        t.suggest_categorical("model.norm", ["timestep", "layer"])
        if t.number % 5 == 4:
            t.report(3.0, 20)
            raise optuna.TrialPruned
        return 2.0 + (math.log10(lr) + 2.5) ** 2

    study.optimize(objective, n_trials=trials)
    records = [
        trial(
            t.number,
            arms[t.number % len(arms)],
            0,
            t.value if t.state.name == "COMPLETE" else 3.0,
            folder,
            state=t.state.name.lower(),
            params=t.params,
            intermediate=dict(t.intermediate_values),
        )
        for t in study.trials
    ]
    return StudyRecord(
        "lr",
        "search",
        "Which rate?",
        "val/loss",
        "minimize",
        [Arm(name, []) for name in arms],
        records,
        folder,
        study=study,
    )
