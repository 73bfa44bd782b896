"""The study at a glance, while it runs."""

from __future__ import annotations

from datetime import datetime

from rich.table import Table
from rich.text import Text

from .records import StudyRecord, TrialRecord

STYLES = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan", "waiting": "dim"}


def table(record: StudyRecord, rows: int = 30) -> Table:
    """Trials that run, then the latest that ended; at most ``rows``."""
    counts = {state: sum(t.state == state for t in record.trials) for state in STYLES}
    title = f"{record.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    names = ("trial", "arm", "seed", "choice", "state", "step", record.metric, "time", "")
    view = Table(*names, title=title, caption=best_line(record))
    order = {"running": 0, "complete": 1, "pruned": 1, "failed": 1, "waiting": 2}
    for trial in sorted(record.trials, key=lambda t: (order[t.state], -t.number))[:rows]:
        step = max(trial.intermediate, default=None)
        value = trial.value if trial.value is not None else trial.intermediate.get(step or -1)
        view.add_row(
            str(trial.number),
            trial.arm,
            str(trial.seed),
            choice(trial),
            Text(trial.state, style=STYLES[trial.state]),
            "" if step is None else str(step),
            "" if value is None else f"{value:.4f}",
            _time(trial),
            Text(trial.error or "", overflow="ellipsis", no_wrap=True),
        )
    return view


def choice(trial: TrialRecord) -> str:
    """The parameters that the sampler chose, short."""
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    return " ".join(f"{k.rsplit('.', 1)[-1]}={show(v)}" for k, v in trial.params.items())


def best_line(record: StudyRecord) -> str:
    """The best complete trial, in words; empty when there is none."""
    done = [t for t in record.trials if t.state == "complete" and t.value is not None and t.stage == "main"]
    if not done:
        return ""
    best = (min if record.direction == "minimize" else max)(done, key=lambda t: t.value or 0.0)
    arm = best.arm if len(record.arms) > 1 else ""
    what = " ".join(filter(None, [arm, choice(best), f"seed {best.seed}"]))
    return f"best: trial {best.number}, {what}: {best.value:.4f}"


def _time(trial: TrialRecord) -> str:
    if trial.started is None:
        return ""
    seconds = int(((trial.ended or datetime.now()) - trial.started).total_seconds())
    return f"{seconds // 60}:{seconds % 60:02d}"
