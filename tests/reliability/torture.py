"""Kill a run at random moments, damage its files, continue it, and compare it with the run that nothing happened to.

    python -m tests.reliability.torture --kills 200 --seed 0

Every attempt is a real process (forked from this one, which has imported everything) that ends by SIGKILL at a random
time, by a signal, by a full disk or because it is done. A finished run must have the reference's weights, optimiser
state, random state, stream state, losses and validations bit for bit. Exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import gecko_lab.run
from gecko_lab import checkpoint, cli
from gecko_lab.config import TrainConfig
from gecko_lab.prepare import main as prepare
from gecko_lab.train import train

from .runs import STEPS, configure, differences, outcome, record, write_text

for name in (  # what a run imports late: once here, not in every attempt
    "lightning.pytorch.loggers", "lightning.pytorch.callbacks", "torch.utils.tensorboard", "gecko_lab.callbacks",
    "gecko_lab.data.module", "gecko_lab.nonfinite", "gecko_lab.resume", "gecko_lab.strategies", "gecko_lab.telemetry",
):
    importlib.import_module(name)

CASES = {
    "pack, accumulation 2": ["trainer.accumulate=2", "log.validate_every_n_steps=3", "log.probes=true"],
    "stream, accumulation 2": ["data.mode=stream", "trainer.accumulate=2", "log.validate_every_n_steps=2"],
    "stream, last checkpoint only": ["data.mode=stream", "checkpoint.keep_last=1", "checkpoint.keep_best=false"],
    "pack, sparse checkpoints": ["checkpoint.every_n_steps=3", "log.every_n_steps=2", "log.validate_every_n_steps=2"],
    "pieces": ["data.mode=stream", "trainer.piece_len=12", "log.validate_every_n_steps=4"],
}
FAULTS = ("none", "flip", "truncate", "all checkpoints", "store", "torn line", "full disk", "second process", "SIGTERM")


class Lost(AssertionError):
    """The run did not come through."""


class Torture:
    """One folder of runs; ``counts`` says what was done to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, float] = {}
        self.store = folder / "store"
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            if prepare([str(write_text(folder / "text")), "--out", str(self.store), "--val-fraction", "0.2"]):
                raise Lost("the store cannot be prepared")

    def config(self, case: str, resume: str | None) -> TrainConfig:
        data = ["data.name=store", f"data.path={self.store}", f"resume={resume or 'null'}"]
        return configure("checkpoint.every_n_steps=1", "log.probes=false", *CASES[case], *data)

    def start(self, case: str, run: Path, limit: int = 0) -> int:
        """Fork an attempt; its process id. ``limit``: bytes that a file may have, as on a full disk."""
        config = self.config(case, "auto" if (run / "lock").exists() else None)
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            code = cli.guarded(lambda: train(config, run) and 0)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def finish(self, child: int, *allowed: int) -> int:
        """Wait; the exit code, minus the signal's number where one ended the process."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in allowed or "Traceback" in self.said():
            raise Lost(f"exit code {code}, expected one of {allowed}:\n{self.said()}")
        return code

    def reference(self, case: str) -> tuple[Path, float]:
        """The uninterrupted run, and how long an attempt takes."""
        run = self.folder / f"reference {case}"
        if case not in self.seconds:
            began = time.perf_counter()
            self.finish(self.start(case, run), 0)
            self.seconds[case] = time.perf_counter() - began
        return run, self.seconds[case]

    def play(self, case: str, budget: int) -> int:
        """Run one case to its end under kills and faults, and compare; returns the number of kills."""
        reference, seconds = self.reference(case)
        run, kills = self.folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        while True:
            kill = kills < budget
            child = self.start(case, run)
            if kill:
                fault = self.dice.choice(FAULTS)
                time.sleep(self.dice.uniform(0, self.dice.choice((0.4, 0.8)) * seconds))
                if fault == "second process":
                    self.second(case, run)
                number = signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL
                os.kill(child, number)
                code = self.finish(child, 0, -number, 75)
                self.counts[f"ended by {signal.Signals(number).name}" if code else "finished before the signal"] += 1
                kills += bool(code)
                if code and (run / "lock").exists():
                    self.damage(fault, case, run)
            else:
                code = self.finish(child, 0)
            if code == 0:
                break
        if kills and self.dice.random() < 0.3:
            self.finish(self.start(case, run), 0)  # once more: a complete run takes no harm
            self.counts["resumed although complete"] += 1
        self.compare(case, reference, run)
        return kills

    def compare(self, case: str, reference: Path, run: Path) -> None:
        found = differences(outcome(reference), outcome(run))
        if record(reference) != record(run):
            found.append(f"metrics.jsonl: {sorted(set(record(reference)) ^ set(record(run)))[:5]}, or their order")
        if checkpoint.steps(run / "checkpoints")[0].name != f"step-{STEPS:08d}.ckpt":
            found.append("the last checkpoint is missing")
        if found:
            raise Lost(f"differs from the uninterrupted run in {len(found)} places: {found[:5]}")
        self.counts["runs compared bit for bit"] += 1

    def second(self, case: str, run: Path) -> None:
        if not (run / "lock").exists():
            return
        code = self.finish(self.start(case, run), 0, 2)
        if code == 2 and "another process" not in self.said():
            raise Lost(self.said())
        self.counts["second process refused" if code else "second process came late"] += 1

    def damage(self, fault: str, case: str, run: Path) -> None:
        """Do one thing to the files between two attempts; what must be refused is tried and put back."""
        saved = checkpoint.steps(run / "checkpoints")
        if fault in ("flip", "truncate") and len(saved) > 1:
            spoil(saved[0], fault, self.dice)
            self.counts[f"newest checkpoint: {fault}"] += 1
        elif fault == "all checkpoints" and saved:
            self.refused(case, run, sorted((run / "checkpoints").glob("*.ckpt")), ("can be read",))
            self.counts["all checkpoints damaged: refused"] += 1
        elif fault == "store":
            read = (".tokens", ".npy"), ("manifest.json",)
            files = sorted(p for p in self.store.iterdir() if p.suffix in read[0] or p.name in read[1])
            self.refused(case, run, [self.dice.choice(files)], ("store", "shard"))
            self.counts["token store damaged: refused"] += 1
        elif fault == "torn line" and (run / "metrics.jsonl").exists():
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1, "train/lo')
            self.counts["torn line in metrics.jsonl"] += 1
        elif fault == "full disk":
            limit = int(10 ** self.dice.uniform(2.5, 5.5))
            code = self.finish(self.start(case, run, limit), 0, 2)
            self.counts["disk full: stopped with a message" if code else "disk full: not reached"] += 1

    def refused(self, case: str, run: Path, files: list[Path], words: tuple[str, ...]) -> None:
        """Damage ``files``, see exit code 2 with one of ``words`` and nothing changed, and put them back."""
        kept = {file: file.read_bytes() for file in files}
        for file in files:
            spoil(file, self.dice.choice(("flip", "truncate")), self.dice)
        before = {p: p.read_bytes() for p in (run / "checkpoints").iterdir()}
        self.finish(self.start(case, run), 2)
        if not any(word in self.said() for word in words):
            raise Lost(f"no clear message: {self.said()}")
        if any(not p.exists() or p.read_bytes() != data for p, data in before.items() if not p.name.startswith(".")):
            raise Lost("a refused run changed checkpoints")
        for file, data in kept.items():
            file.write_bytes(data)


def spoil(file: Path, how: str, dice: random.Random) -> None:
    """Flip one bit, or cut the file anywhere."""
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    else:
        del data[dice.randrange(len(data)) :]
    file.unlink()  # best.ckpt may be a link to the same file
    file.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="attempts that end by a signal, at least")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gecko_lab.run.git_commit = lambda: None  # asking git takes longer than the run
    began, kills = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), options.seed)
        cases = list(CASES)
        while kills < options.kills:
            case = cases[torture.counts["runs compared bit for bit"] % len(cases)]
            try:
                kills += torture.play(case, budget=min(12, options.kills - kills))
            except Lost as error:
                print(f"LOST ({case}): {error}\nso far: {dict(torture.counts)}")
                return 1
            print(f"{kills} kills, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    for name, count in sorted(torture.counts.items()):
        print(f"{count:6}  {name}")
    print(f"{kills} kills, nothing lost, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
