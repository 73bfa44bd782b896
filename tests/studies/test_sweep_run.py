"""Real trials in real processes: 3 steps each, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gecko_lab import sweep as command
from gecko_lab.errors import RunError
from gecko_lab.run import RunFolder
from gecko_lab.studies import trial
from gecko_lab.studies.callbacks import Pruned, Reporter
from gecko_lab.studies.ledger import Claim
from gecko_lab.studies.records import load_study
from gecko_lab.studies.trial import run
from gecko_lab.studies.worker import Process

BASE = [
    "model.num_layers=1", "model.dim=32", "model.ffn_dim=48", "model.z_dim=32", "model.value_dim=32",
    "model.chunk_size=16", "model.norm_groups=4", "model.ema_modes=4", "data.seq_len=64", "trainer.batch_size=2",
    "log.sample_tokens=0", "data.val_batches=1", "log.every_n_steps=1", "log.probes=false", "trainer.accelerator=cpu",
    "trainer.progress=false", "log.validate_every_n_steps=1",
]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text("The gecko climbs the wall and sees the moon. " * (5 + i))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.mark.timeout(120)
def test_a_trial_whose_batches_are_made_by_processes(text: Path, tmp_path: Path) -> None:
    """They are forked beside the thread that listens to the worker."""
    (tmp_path / "one.yaml").write_text(
        f"kind: ablation\nquestion: Does it run?\nbase: [{', '.join(BASE)}, data=text, data.path={text}, "
        "data.workers=1]\narms: {baseline: []}\nbudget: {steps: 2}\n"
    )
    assert command.run(["one.yaml", "variant=cpu", "name=one"]) == 0
    assert [t.state for t in load_study(tmp_path / "studies" / "one").trials] == ["complete"]


def test_a_study_of_two_trials_of_three_steps(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.yaml").write_text(
        f"kind: ablation\nquestion: Does it run?\nbase: [{', '.join(BASE)}, data=text, data.path={text}]\n"
        "arms: {baseline: [], no_awm: ['+ablation=no_awm']}\nbudget: {steps: 3}\n"
    )
    assert command.run(["two.yaml", "variant=cpu", "workers=2", "name=two"]) == 0
    record = load_study(tmp_path / "studies" / "two")
    assert [(t.state, t.arm, t.seed) for t in record.trials] == [("complete", "baseline", 0), ("complete", "no_awm", 0)]
    for t in record.trials:
        assert t.value is not None
        assert 1 < t.value < 20
        assert t.value == t.metrics["val/bits_per_byte"]
        assert t.parameters == next(arm.parameters for arm in record.arms if arm.name == t.arm)
        assert [line["step"] for line in t.history if "train/loss" in line] == [1, 2, 3]
        assert list(t.intermediate) == [1, 2]
        assert (t.run_dir / "config.yaml").exists()
    assert command.run(["two.yaml", "variant=cpu", "name=two"]) == 0
    assert len(load_study(tmp_path / "studies" / "two").trials) == 2


CHILD = """
import json, os, signal, sys, time
assigned = json.loads(sys.stdin.readline())["overrides"][:1]
say = lambda **event: print(json.dumps(event), flush=True)
def asked(*_):
    say(event="end", state="stopped", error="stopped by a signal")
    os._exit(75)
signal.signal(signal.SIGTERM, asked)
say(event="report", step=1, value=2.0)
answer = sys.stdin.readline().strip()
if answer == "prune":
    say(event="end", state="pruned", value=2.0)
elif assigned == ["die"]:
    os.kill(os.getpid(), signal.SIGKILL)
elif assigned == ["crash"]:
    sys.exit("no such thing")
else:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("order", "state"),
    [("die", "lost"), ("crash", "failed"), ("stop", "stopped"), ("terminate", "lost"), ("prune", "pruned")],
)
def test_how_a_process_ends_is_told_apart(order: str, state: str, tmp_path: Path) -> None:
    process, stop = Process(tmp_path, "val/loss", {}, None, 1), threading.Event()
    process.command = (sys.executable, "-c", CHILD)

    def report(step: int, value: float) -> bool:
        assert (step, value) == (1, 2.0)
        if order == "stop":
            stop.set()
        if order == "terminate":  # by another than the sweep
            threading.Timer(0.3, lambda: [os.kill(p, signal.SIGTERM) for p in _children() - before]).start()
        return order == "prune"

    before = _children()  # an earlier test's helpers, such as multiprocessing's resource tracker
    outcome = process(Claim(0, 0, "a", 0, "r", [order]), report, lambda: None, stop)
    assert outcome.state == state
    assert (outcome.error is None) == (state == "pruned")
    assert _children() <= before


def _children() -> set[int]:
    listing = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    return {int(line.split()[0]) for line in done.stdout.splitlines() if " -c" in line}


def test_a_trial_without_its_worker_ends(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from gecko_lab.studies.trial import Link; "
         "Link(sys.stdout, sys.stdin).listen(); print('on', flush=True); time.sleep(60)"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "on\n"
    child.stdin.close()
    assert child.wait(20) == -signal.SIGKILL


def assignment(text: Path, folder: Path, *more: str, **changes: object) -> dict:
    changes = {"budget": {"steps": 4}, "metric": "val/loss", "run_dir": str(folder), **changes}
    return {"overrides": [*BASE, "data=text", f"data.path={text}", *more], **changes}


def test_pruned_nan_and_mistakes_are_told_apart(text: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def ask(step: int, value: float) -> bool:
        steps.append(step)
        return step == 2

    pruned = run(assignment(text, tmp_path / "a"), ask)
    assert pruned["state"] == "pruned"
    assert pruned["value"] > 0
    assert steps == [1, 2]
    hot = ["optim.lr=1e30", "optim.clip=0", "optim.warmup_steps=0"]
    nan = run(assignment(text, tmp_path / "b", *hot), lambda *a: False)
    assert nan["state"] == "failed"
    assert "nan" in nan["error"].lower() or "inf" in nan["error"].lower()
    wrong = run(assignment(text, tmp_path / "c", "data.path=/no/such/text"), lambda *a: False)
    assert wrong["state"] == "failed"
    assert "/no/such/text" in wrong["error"]
    unmeasured = run(assignment(text, tmp_path / "d", metric="val/accuracy"), lambda *a: False)
    assert unmeasured["state"] == "failed"
    assert "val/accuracy: is not measured" in unmeasured["error"]
    assert "val/loss" in unmeasured["error"]


def test_a_stopped_trial_goes_on_from_its_checkpoint(text: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def stopping(step: int, value: float) -> bool:
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    whole = run(assignment(text, tmp_path / "whole"), lambda *a: False)
    assert run(assignment(text, tmp_path / "cut"), stopping)["state"] == "stopped"
    done = run(assignment(text, tmp_path / "cut"), stopping)
    assert done["state"] == "complete"
    assert steps[0] == 1
    assert len(steps) == len(set(steps))  # no step twice, though 2 had already been validated
    assert done["metrics"] == whole["metrics"]


def test_the_seconds_of_an_interrupted_run_count(text: Path) -> None:
    first, second = Reporter("val/loss", lambda *a: False, 9.0), Reporter("val/loss", lambda *a: False, 9.0)
    first.began = time.perf_counter() - 5.0
    second.load_state_dict(first.state_dict())
    second.began = time.perf_counter() - 1.0
    assert second.state_dict()["seconds"] == pytest.approx(6.0, abs=0.5)


def test_a_run_that_is_still_going_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker was taken for dead, and learns it at its next beat."""
    assert trial._resume(str(tmp_path / "run")) is None
    holder = RunFolder(tmp_path / "run")
    holder.claim()
    monkeypatch.setattr(trial, "LEAVES", 0.0)
    with pytest.raises(RunError, match="another process"):
        trial._resume(str(tmp_path / "run"))
    monkeypatch.setattr(trial, "LEAVES", 30.0)
    threading.Timer(0.3, holder.release).start()
    assert trial._resume(str(tmp_path / "run")) == "auto"


def test_a_budget_of_seconds_ends_the_run(text: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    endless = ["trainer.max_steps=100000", "log.validate_every_n_steps=100000"]
    done = run(assignment(text, tmp_path / "a", *endless, budget={"seconds": 0.5}), lambda *a: False)
    assert done["state"] == "complete"
    assert time.monotonic() - began < 30


def test_pruned_names_its_value() -> None:
    assert Pruned(3, 1.5).value == 1.5
