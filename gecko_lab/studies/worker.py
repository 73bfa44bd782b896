"""A worker: takes trials from the study until none is left, and runs each in a process of its own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from optuna.trial import TrialState

from ..errors import LabError
from . import plan
from .code import fingerprint
from .ledger import Claim, Ledger, Lost, Outcome

Report = Callable[[int, float], bool]
Runner = Callable[[Claim, Report, Callable[[], None], threading.Event], Outcome]
"""Runs a claimed trial: (claim, report, alive, stop); calls ``alive`` every few seconds, ends soon after ``stop``."""

GRACE = 60.0  # seconds that a stopped trial has to save a checkpoint


def work(ledger: Ledger, run: Runner, stop: threading.Event, *, code: str | None = None, poll: float = 1.0) -> None:
    """Run trials until the study is done or ``stop`` is set; a trial in progress is then told to stop and queued again.

    While others still run, waits for them: should one die, its trial is done here. Raises LabError when the source is
    no longer that of ``code``, and when every trial fails.
    """
    while not stop.is_set():
        trials = ledger.trials()
        ledger.check_fuse(trials)
        if ledger.reap(trials) or ledger.fill(trials):
            continue
        states = {trial.state for trial in trials}
        if TrialState.WAITING not in states:
            if TrialState.RUNNING not in states:
                return
            stop.wait(poll)
            continue
        if code is not None and fingerprint() != code:
            raise LabError("the source code changed since the study began; go on with allow_code_change=true")
        claim = ledger.claim(trials)
        if claim is None:
            continue
        try:
            outcome = run(
                claim,
                lambda step, value, claim=claim: ledger.report(claim, step, value),  # type: ignore[misc]
                lambda claim=claim: ledger.beat(claim),  # type: ignore[misc]
                stop,
            )
            ledger.end(claim, outcome)
        except Lost:
            continue


class Process:
    """Runs a trial as ``python -m gecko_lab.studies.trial`` on one device."""

    command = (sys.executable, "-m", "gecko_lab.studies.trial")

    def __init__(self, folder: Path, metric: str, budget: dict[str, float], device: str | None, threads: int) -> None:
        self.folder, self.metric, self.budget = folder, metric, budget
        self.env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if device is not None:
            self.env["CUDA_VISIBLE_DEVICES"] = device
        source = str(Path(__file__).absolute().parents[2])
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))

    def __call__(self, claim: Claim, report: Report, alive: Callable[[], None], stop: threading.Event) -> Outcome:
        runs = self.folder / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        assignment = {
            "overrides": [*claim.overrides, "trainer.progress=false"],
            "budget": self.budget,
            "metric": self.metric,
            "run_dir": str(runs / claim.run),
        }
        log = runs / f"{claim.run}.log"
        with log.open("a") as file:
            child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=self.env,
                text=True,
                start_new_session=True,  # Ctrl-C is for the sweep, which tells its trials
            )
        try:
            return self._follow(child, json.dumps(assignment), report, alive, stop)
        finally:
            child.kill()
            child.wait()

    def _follow(
        self, child: subprocess.Popen[str], first: str, report: Report, alive: Callable[[], None], stop: threading.Event
    ) -> Outcome:
        events: queue.Queue[str | None] = queue.Queue()
        assert child.stdin is not None
        assert child.stdout is not None
        threading.Thread(target=_pump, args=(child.stdout, events), daemon=True).start()
        _tell(child.stdin, first)
        asked = 0.0
        while True:
            alive()
            try:
                line = events.get(timeout=0.2 if asked else 1.0)
            except queue.Empty:
                if stop.is_set():
                    asked += 0.2
                    if asked == 0.2:
                        child.terminate()
                    if asked > GRACE:
                        child.kill()
                continue
            if line is None:
                return _killed(child.wait(), stop)
            event: dict[str, Any] = json.loads(line)
            if event.pop("event") == "report":
                _tell(child.stdin, "prune" if report(event["step"], event["value"]) else "go")
            else:
                if event["state"] == plan.STOPPED and not stop.is_set():
                    event["state"] = plan.LOST
                return Outcome(**event)


def _pump(source: IO[str], events: queue.Queue[str | None]) -> None:
    for line in source:
        events.put(line)
    events.put(None)


def _tell(sink: IO[str], line: str) -> None:
    try:
        sink.write(line + "\n")
        sink.flush()
    except BrokenPipeError:
        pass  # it is gone; the end of its events says so


def _killed(code: int, stop: threading.Event) -> Outcome:
    """The trial ended without a word: by a signal (the kernel for want of memory, a person, this sweep) or a crash."""
    if stop.is_set():
        return Outcome(plan.STOPPED, error="stopped with the sweep")
    if code < 0:
        return Outcome(plan.LOST, error=f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else ""))
    return Outcome("failed", error=f"ended with code {code}; its log says why")
