"""One trial in a process of its own: ``python -m gecko_lab.studies.trial``, started by a worker.

The worker writes the assignment as one line of JSON to its standard input, then an answer to every report; the trial
writes events to its standard output, one JSON object a line:

    {"event": "report", "step": 100, "value": 2.1}      answered with go or prune
    {"event": "end", "state": "complete", "value": 2.0, "metrics": {...}, "parameters": 123, "error": null}

Everything that the run prints goes to standard error, which is the trial's log. When the worker dies, the trial ends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

Ask = Callable[[int, float], bool]  # (step, metric) -> whether to prune
LEAVES = 120.0  # seconds in which a worker notices that its trial was taken away
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class Link:
    """The two pipes to the worker."""

    def __init__(self, events: IO[str], answers: IO[str]) -> None:
        self.events, self.answers = events, answers
        self.inbox: queue.Queue[str] = queue.Queue()

    def listen(self) -> None:
        """From now on the end of the worker is the end of this process."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.answers:
            self.inbox.put(line.strip())
        os.kill(os.getpid(), signal.SIGKILL)

    def send(self, event: str, **values: Any) -> None:
        self.events.write(json.dumps({"event": event, **values}) + "\n")
        self.events.flush()

    def ask(self, step: int, value: float) -> bool:
        self.send("report", step=step, value=value)
        return self.inbox.get() == "prune"


def run(assignment: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """Train as assigned; what became of it, in the terms of the ``end`` event."""
    import torch

    from .. import train
    from ..errors import LabError
    from . import arms
    from .callbacks import Pruned, Reporter, measured

    facts: dict[str, Any] = {"value": None, "metrics": {}, "parameters": 0, "error": None}
    try:
        config, model = arms.built(assignment["overrides"])
        config.trainer.max_steps = arms.steps(assignment["budget"], config, model)
        facts["parameters"] = model.num_parameters()
        config.resume = _resume(assignment["run_dir"])
        reporter = Reporter(assignment["metric"], ask, assignment["budget"].get("seconds", math.inf))
        facts["metrics"] = train.train(config, assignment["run_dir"], callbacks=[reporter])
        facts["value"] = measured(facts["metrics"], assignment["metric"])
        if not math.isfinite(facts["value"]):
            error = f"{assignment['metric']} is {facts['value']} at the end"
            return facts | {"state": "failed", "value": None, "error": error}
        return facts | {"state": "complete"}
    except Pruned as pruned:
        return facts | {"state": "pruned", "value": pruned.value}
    except SystemExit:
        return facts | {"state": "stopped", "error": "stopped by a signal"}
    except LabError as refused:
        return facts | {"state": "failed", "error": str(refused)}
    except Exception as error:
        traceback.print_exc()
        line = (str(error).splitlines() or [""])[0]
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in line.lower() for w in MEMORY_WORDS)
        return facts | {"state": "failed", "error": f"{'out of memory' if memory else type(error).__name__}: {line}"}


def _resume(run_dir: str) -> str | None:
    """auto where an attempt began that was killed or stopped, once that process is gone: it may have been taken for
    dead and not know yet."""
    from ..errors import RunError
    from ..run import RunFolder

    folder, until = RunFolder(run_dir), time.monotonic() + LEAVES
    while folder.began():
        try:
            folder.claim()
            folder.release()
            return "auto"
        except RunError:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)
    return None


def main() -> int:
    """Read the assignment, run it, tell the worker."""
    events, answers = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    # a thread waits in answers and holds its lock: a forked process (data.workers) closes sys.stdin and would wait too
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s %(levelname)s] %(name)s: %(message)s")
    assignment = json.loads(answers.readline())
    link = Link(events, answers)
    link.listen()
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(assignment['overrides'])}", flush=True)
    link.send("end", **run(assignment, link.ask))
    return 0


if __name__ == "__main__":
    sys.exit(main())
