"""Show a study while its workers work: a live table on a terminal, else a line for every trial that ended."""

from __future__ import annotations

import threading
import time

from optuna.storages import BaseStorage
from rich.console import Console
from rich.live import Live

from .records import load_study
from .table import choice, table

EVERY = 2.0  # seconds


def watch(storage: BaseStorage, name: str, threads: list[threading.Thread]) -> None:
    """Returns when no thread is alive."""
    console = Console(soft_wrap=True, highlight=False)
    if console.is_terminal:
        with Live(console=Console(), auto_refresh=False) as live:
            while _wait(threads):
                live.update(table(load_study(storage, name), rows=max(5, console.height - 8)), refresh=True)
            live.update(table(load_study(storage, name), rows=max(5, console.height - 8)), refresh=True)
        return
    said: set[int] = {t.number for t in load_study(storage, name).trials if t.ended}
    alive = True
    while alive:
        alive = _wait(threads)
        record = load_study(storage, name)
        for trial in record.trials:
            if trial.ended and trial.number not in said:
                said.add(trial.number)
                value = "" if trial.value is None else f" {trial.value:.4f}"
                arm = trial.arm if len(record.arms) > 1 else ""
                what = " ".join(filter(None, [arm, f"seed {trial.seed}", choice(trial)]))
                console.print(f"trial {trial.number:4d} {trial.state}{value}: {what} {trial.error or ''}", markup=False)


def _wait(threads: list[threading.Thread]) -> bool:
    """Wait a while; whether any is alive."""
    until = time.monotonic() + EVERY
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return any(thread.is_alive() for thread in threads)
