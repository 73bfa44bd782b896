"""Workers that share a study: nothing lost, nothing doubled, whatever is killed. Trials are fakes of milliseconds."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from gecko_lab.studies import plan
from gecko_lab.studies.ledger import Claim, Ledger, Lost, Outcome
from gecko_lab.studies.records import Arm, StudyRecord, load_study
from gecko_lab.studies.storage import open_storage
from gecko_lab.studies.study import join
from gecko_lab.studies.sweepfile import Sweep
from gecko_lab.studies.worker import work

ARMS = {"baseline": [], "a": ["+x=1"], "b": [], "c": [], "d": []}
FIFTY = Sweep("ablation", arms=ARMS, seeds=list(range(10)))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: these tests wait for nothing but the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def quick(claim: Claim, report: Callable, alive: Callable, stop: threading.Event) -> Outcome:
    for step in (1, 2):
        time.sleep(random.Random(claim.number).random() * 0.01)
        report(step, 3.0 - step)
        alive()
    return Outcome("complete", 1.0 + claim.seed, {"val/loss": 1.0}, 7)


def begin(where: str, sweep: Sweep, folder: Path, name: str = "s") -> None:
    join(open_storage(where, create=True), name, sweep, [Arm(a, o) for a, o in sweep.arms.items()], folder)


def ledger(where: str, sweep: Sweep, patience: float = 60.0) -> Ledger:
    return Ledger(open_storage(where), "s", sweep, sweep.arms or {"search": []}, patience=patience)


def worker_process(where: str, sweep: Sweep) -> None:
    work(ledger(where, sweep, patience=6), quick, threading.Event(), poll=0.05)


def slots_complete(record: StudyRecord) -> collections.Counter:
    return collections.Counter((t.arm, t.seed) for t in record.trials if t.state == "complete")


def two_workers_with_kills(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
    monkeypatch.setattr(plan, "RETRIES", 1000)
    begin(where, FIFTY, folder)
    fork, dice = multiprocessing.get_context("fork"), random.Random(0)
    start = lambda: fork.Process(target=worker_process, args=(where, FIFTY), daemon=True)
    workers = [start(), start()]
    for process in workers:
        process.start()
    kills, deadline = 0, time.monotonic() + 60
    while any(p.is_alive() for p in workers):
        assert time.monotonic() < deadline
        time.sleep(pause * (0.5 + dice.random()))
        index = dice.randrange(2)
        if kills < 6 and workers[index].is_alive():
            workers[index].kill()
            workers[index].join()
            workers[index] = start()
            workers[index].start()
            kills += 1
    assert [p.exitcode for p in workers] == [0, 0]
    assert kills >= 3
    record = load_study(open_storage(where), "s")
    assert slots_complete(record) == {(arm, seed): 1 for arm in ARMS for seed in range(10)}
    assert {t.state for t in record.trials} <= {"complete", "failed"}
    assert all(t.retried for t in record.trials if t.state == "failed")


def test_fifty_trials_two_workers_random_kills_on_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_workers_with_kills(str(tmp_path), tmp_path, monkeypatch, 0.04)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a server of this test's own, on a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    programs = [shutil.which(p) for p in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL's initdb and postgres are not on PATH")
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        known = [u.pw_name for u in pwd.getpwall()]
        user = next((name for name in ("postgres", "nobody") if name in known), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if user:
        shutil.chown(folder, user)
    options = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [programs[0], "-D", str(folder / "data"), "-A", "trust", "-U", "lab", "--no-sync"]
    subprocess.run(command, check=True, timeout=60, **options)
    command = [programs[1], "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses=", "-F"]
    server = subprocess.Popen(command, **options)
    try:
        until = time.monotonic() + 30
        while not list(folder.glob(".s.PGSQL.*[0-9]")):
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        url = f"postgresql+psycopg://lab@/postgres?host={folder}"
        _answers(url)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for its clients to leave
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> None:
    import psycopg

    until = time.monotonic() + 30
    while True:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(url.replace("+psycopg", "")).close()
            return
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_fifty_trials_two_workers_random_kills_on_postgresql(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_workers_with_kills(postgres, tmp_path, monkeypatch, 1.0)


def test_two_planners_at_once_add_no_trial_twice(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0, 1])
    begin(str(tmp_path), sweep, tmp_path)
    one, two = ledger(str(tmp_path), sweep), ledger(str(tmp_path), sweep)
    before = one.trials()
    one.fill(before)
    two.fill(before)  # it looked before the other wrote
    assert len(one.study.get_trials()) == 4
    worker_process(str(tmp_path), sweep)
    record = load_study(tmp_path)
    assert slots_complete(record) == {("baseline", 0): 1, ("baseline", 1): 1}
    assert len(record.trials) == 2


def test_a_worker_taken_for_dead_cannot_end_its_trial(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)
    slow, other = ledger(str(tmp_path), sweep), ledger(str(tmp_path), sweep, patience=0.05)
    slow.fill(slow.trials())
    claim = slow.claim(slow.trials())
    assert claim is not None
    other.reap(other.trials())
    time.sleep(0.1)
    other.reap(other.trials())
    with pytest.raises(Lost):
        slow.end(claim, Outcome("complete", 1.0))
    with pytest.raises(Lost):
        slow.report(claim, 1, 1.0)
    worker_process(str(tmp_path), sweep)
    record = load_study(tmp_path)
    assert [(t.state, t.retried) for t in record.trials] == [("failed", True), ("complete", False)]


def test_a_beating_worker_is_left_alone(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)
    one, other = ledger(str(tmp_path), sweep, patience=0.2), ledger(str(tmp_path), sweep, patience=0.2)
    one.fill(one.trials())
    claim = one.claim(one.trials())
    assert claim is not None
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        one.beat(claim)
        other.reap(other.trials())
        time.sleep(0.01)
    one.end(claim, Outcome("complete", 1.0))


def test_a_killed_trial_is_done_again_once_then_failed(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": [], "a": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)

    def run(claim: Claim, *rest: object) -> Outcome:
        return Outcome("lost", error="killed by signal 9") if claim.arm == "a" else Outcome("complete", 1.0)

    work(ledger(str(tmp_path), sweep), run, threading.Event(), poll=0.01)
    states = [(t.arm, t.state) for t in load_study(tmp_path).trials]
    assert states == [("baseline", "complete"), ("a", "failed"), ("a", "failed")]
    again = ledger(str(tmp_path), sweep)
    again.fill(again.trials(), failed=True)
    worker_process(str(tmp_path), sweep)
    assert [t.state for t in load_study(tmp_path).trials] == ["complete", "failed", "failed", "complete"]


def test_the_next_attempt_continues_the_run_of_one_that_was_killed(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)
    runs: list[str] = []

    def run(claim: Claim, report: Callable, *rest: object) -> Outcome:
        runs.append(claim.run)
        (tmp_path / "runs" / claim.run).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / claim.run / "metrics.jsonl").write_text('{"step": 2}\n')
        report(len(runs), 3.0 - len(runs))
        return Outcome("complete", 1.0) if len(runs) == 2 else Outcome("lost", error="killed by signal 9")

    work(ledger(str(tmp_path), sweep), run, threading.Event(), poll=0.01)
    assert runs == ["baseline-seed0-0000"] * 2
    first, second = load_study(tmp_path).trials
    assert (first.state, first.intermediate, first.history) == ("failed", {1: 2.0}, [])
    assert (second.state, second.intermediate, second.history) == ("complete", {1: 2.0, 2: 1.0}, [{"step": 2}])


def test_a_trial_that_failed_for_good_is_done_again_from_the_start(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)
    runs: list[str] = []

    def run(claim: Claim, *rest: object) -> Outcome:
        runs.append(claim.run)
        return Outcome("failed", error="NaN") if len(runs) == 1 else Outcome("complete", 1.0)

    work(ledger(str(tmp_path), sweep), run, threading.Event())
    again = ledger(str(tmp_path), sweep)
    again.fill(again.trials(), failed=True)
    work(again, run, threading.Event())
    assert runs == ["baseline-seed0-0000", "baseline-seed0-0001"]


def test_a_stopped_trial_waits_again(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0, 1])
    begin(str(tmp_path), sweep, tmp_path)
    stop = threading.Event()

    def run(*rest: object) -> Outcome:
        stop.set()
        return Outcome("stopped")

    work(ledger(str(tmp_path), sweep), run, stop)
    worker_process(str(tmp_path), sweep)
    assert slots_complete(load_study(tmp_path)) == {("baseline", 0): 1, ("baseline", 1): 1}


def test_half_a_line_at_the_end_of_a_journal_is_cut(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    begin(str(tmp_path), sweep, tmp_path)
    with (tmp_path / "journal.log").open("a") as journal:
        journal.write('{"op_code":4,"worker')
    worker_process(str(tmp_path), sweep)
    assert [t.state for t in load_study(tmp_path).trials] == ["complete"]


@pytest.mark.parametrize(
    "pruner",
    [{"name": "median", "n_startup_trials": 3}, {"name": "halving", "min_resource": 2, "reduction_factor": 3}],
    ids=lambda p: p["name"],
)
def test_states_are_told_apart_and_pruning_saves_steps(tmp_path: Path, pruner: dict) -> None:
    """On curves whose order shows early, a pruner spends less than 60 % of the steps and keeps the best."""
    steps = 20
    sweep = Sweep(
        "search", space={"optim.lr": "tag(log, interval(1e-4,1e-1))"}, trials=24,
        sampler={"name": "random"}, pruner=pruner,
    )
    begin(str(tmp_path), sweep, tmp_path)
    spent: list[int] = []

    def run(claim: Claim, report: Callable, alive: Callable, stop: threading.Event) -> Outcome:
        if claim.number == 5:
            return Outcome("failed", error="out of memory: 1 TiB")
        rate = float(claim.overrides[0].split("=")[1])
        for step in range(1, steps + 1):
            value = abs(len(str(int(1 / rate))) - 2.5) + rate + 5 / step
            if report(step, value):
                spent.append(step)
                return Outcome("pruned", value)
        spent.append(steps)
        return Outcome("complete", value)

    work(ledger(str(tmp_path), sweep), run, threading.Event())
    record = load_study(tmp_path)
    states = collections.Counter(t.state for t in record.trials)
    assert states["failed"] == 1
    assert states["pruned"] >= 5
    assert states["complete"] >= 2
    assert sum(spent) < 0.6 * steps * 24
    final = lambda t: t.value - 5 / max(t.intermediate)
    ranked = sorted((t for t in record.trials if t.value is not None), key=final)
    assert "complete" in [t.state for t in ranked[:3]]
    assert record.study is not None
    assert TrialState.PRUNED in [t.state for t in record.study.get_trials()]


def test_a_search_draws_for_each_arm_from_its_own_trials(tmp_path: Path) -> None:
    sweep = Sweep("search", arms={"a": [], "b": []}, space={"x": "interval(0,1)"}, trials=15,
                  sampler={"name": "tpe", "n_startup_trials": 5})
    begin(str(tmp_path), sweep, tmp_path)

    def run(claim: Claim, *rest: object) -> Outcome:
        x = float(claim.overrides[0].split("=")[1])
        return Outcome("complete", abs(x - (0.1 if claim.arm == "a" else 0.9)))

    work(ledger(str(tmp_path), sweep), run, threading.Event())
    late = [t for t in load_study(tmp_path).trials if t.number >= 16]
    mean = {arm: sum(t.params["x"] for t in late if t.arm == arm) / 7 for arm in "ab"}
    assert mean["a"] < 0.35
    assert mean["b"] > 0.65


def test_tuned_arms_run_their_seeds_with_their_own_best(tmp_path: Path) -> None:
    sweep = Sweep("ablation", arms={"baseline": [], "a": []}, seeds=[0, 1], tune={"optim.lr": "1,2,3"})
    begin(str(tmp_path), sweep, tmp_path)

    def run(claim: Claim, *rest: object) -> Outcome:
        rate = float(next(o for o in claim.overrides if o.startswith("optim.lr")).split("=")[1])
        return Outcome("complete", abs(rate - (1 if claim.arm == "a" else 3)))

    work(ledger(str(tmp_path), sweep), run, threading.Event())
    trials = load_study(tmp_path).trials
    assert sorted((t.arm, t.seed, t.params["optim.lr"]) for t in trials if t.stage == "main") == [
        ("a", 0, 1), ("a", 1, 1), ("baseline", 0, 3), ("baseline", 1, 3),
    ]
    assert sum(t.stage == "tune" for t in trials) == 6


def test_a_study_in_which_all_fails_stops(tmp_path: Path) -> None:
    begin(str(tmp_path), FIFTY, tmp_path)
    with pytest.raises(ValueError, match=r"every trial so far failed \(3\).*no such data"):
        work(ledger(str(tmp_path), FIFTY), lambda *a: Outcome("failed", error="no such data"), threading.Event())
