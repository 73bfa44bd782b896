"""What a user, a disk or another process can do to a run: a clear message, exit code 2 or 75, and nothing lost."""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STEPS, TINY, differences, outcome, record, run

from gecko_lab import checkpoint
from gecko_lab.errors import RunError
from gecko_lab.run import RunFolder
from gecko_lab.telemetry import Recorder
from gecko_lab.telemetry.record import MetricsFile

OPTIONS = (
    "trainer.accumulate=2", "log.validate_every_n_steps=3", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3",
)
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def half(text: Path, tmp_path: Path) -> Path:
    """A run of four steps, with the checkpoints 2, 3 and 4."""
    run(tmp_path / "run", text, *OPTIONS, "trainer.max_steps=4")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data = data[: len(data) // 2] if how == "truncated" else data
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.unlink()  # best.ckpt may be the same file
    path.write_bytes(data if how != "empty" else b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    how: str, half: Path, text: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = outcome(half, 4)
    damage(half / "checkpoints" / "step-00000004.ckpt", how)
    run(half, text, *OPTIONS, "trainer.max_steps=4", "resume=auto", "checkpoint.keep_last=1")
    assert "step-00000004.ckpt" in caplog.text
    assert "using the one before it" in caplog.text
    assert "resumed   at step 3 of 4" in capsys.readouterr().out
    assert differences(whole, outcome(half, 4)) == []


def test_with_every_checkpoint_damaged_nothing_is_touched(half: Path, text: Path) -> None:
    for path in (half / "checkpoints").glob("*.ckpt"):
        damage(path, "flipped")
    before = contents(half / "checkpoints")
    with pytest.raises(RunError, match="none of its 4 checkpoints can be read; they are left as they are"):
        run(half, text, *OPTIONS, "resume=auto")
    assert contents(half / "checkpoints") == before


def test_the_best_checkpoint_is_the_last_resort(half: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (half / "checkpoints").glob("step-*.ckpt"):
        damage(path, "flipped")
    run(half, text, *OPTIONS, "resume=auto", "trainer.max_steps=4")
    assert "best.ckpt" in capsys.readouterr().out


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.write_text("step 100"), "truncated, or not a checkpoint of gecko_lab"),
        (lambda p: p.write_bytes(pickle.dumps(Trap())), "truncated, or not a checkpoint of gecko_lab"),
        (lambda p: checkpoint.save(p, {"weights": torch.ones(3)}), "not a checkpoint of a training run"),
        (lambda p: checkpoint.save(p, {"gecko_lab": {}, "trap": Trap()}), "nothing of it was executed"),
    ],
    ids=["missing", "folder", "text", "pickle", "other tensors", "trap with a valid checksum"],
)
def test_a_wrong_file_is_refused(
    make: Callable[[Path], Any], words: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file.ckpt")
    with pytest.raises(RunError, match=words):
        run(tmp_path / "run", text, f"resume={tmp_path}/file.ckpt")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_checkpoint_of_another_architecture_is_refused(half: Path, text: Path) -> None:
    before = contents(half / "checkpoints")
    with pytest.raises(RunError, match=r"another architecture; it differs in model.ffn_dim \(checkpoint 48, here 64\)"):
        run(half, text, *OPTIONS, "resume=auto", "model.ffn_dim=64")
    assert contents(half / "checkpoints") == before


def test_two_processes_in_one_folder(half: Path, text: Path) -> None:
    first = RunFolder(half)
    first.claim()
    with pytest.raises(RunError, match="another process is running in this folder"):
        run(half, text, *OPTIONS, "resume=auto")
    ready, told = os.pipe()
    child = os.fork()  # a data worker that outlives its killed parent
    if child == 0:
        os.write(told, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    assert first._lock is not None
    first._lock.close()  # what the kernel does for a killed process
    try:
        second = RunFolder(half)
        second.claim()
        second.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_unwritable_folder(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(RunError, match="is not writable"):
        run(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file of this process grows beyond ``limit`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_in_the_middle_of_a_checkpoint(half: Path, text: Path, reference: Callable[..., Path]) -> None:
    before = contents(half / "checkpoints")
    size = (half / "checkpoints" / "step-00000004.ckpt").stat().st_size
    words = r"cannot write the checkpoint .* Earlier checkpoints are untouched"
    with file_size(size // 2), pytest.raises(RunError, match=words):
        run(half, text, *OPTIONS, "resume=auto")
    assert contents(half / "checkpoints") == before  # and nothing half written
    run(half, text, *OPTIONS, "resume=auto", "checkpoint.keep_last=9")


def test_disk_full_in_metrics(half: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    before = contents(half / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", full)
        with pytest.raises(RunError, match=r"No space left on device \(.*metrics.jsonl\)\. Checkpoints are untouched"):
            run(half, text, *OPTIONS, "resume=auto")
    assert contents(half / "checkpoints") == before
    run(half, text, *OPTIONS, "resume=auto")


@pytest.mark.parametrize("how", ["SIGINT", "slurm"])
def test_a_signal_saves_and_exits_75(how: str, text: Path, tmp_path: Path, reference: Callable[..., Path]) -> None:
    steps = "trainer.max_steps=100000"
    command = [sys.executable, "-m", "gecko_lab.train", *TINY, "data=text", f"data.path={text}", *OPTIONS, steps]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    number = signal.SIGUSR1 if how == "slurm" else getattr(signal, how)
    if how == "slurm":
        env |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), "0")}
        env |= {"SLURM_NODEID": "0"}
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
        (tmp_path / "scontrol").chmod(0o755)
    folder = tmp_path / "run"
    process = subprocess.Popen([*command, f"hydra.run.dir={folder}"], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-00000002.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "Continue with" in out
    step = int(checkpoint.steps(folder / "checkpoints")[0].stem.removeprefix("step-"))
    assert f"Stopped at step {step}." in out
    if how == "slurm":
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    run(folder, text, *OPTIONS, "resume=auto", f"trainer.max_steps={step + 2}")
    assert {s for s, _, _ in record(folder)} == set(range(1, step + 3))


def test_sigterm_before_the_first_step_is_no_finished_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Recorder.on_train_start

    def start(*args: Any) -> None:  # Lightning's handler is in place, ours not yet
        os.kill(os.getpid(), signal.SIGTERM)
        begin(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_train_start", start)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "run", text, *OPTIONS)
    assert stop.value.code == 75
    run(tmp_path / "run", text, *OPTIONS, "resume=auto")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[0].name == f"step-{STEPS:08d}.ckpt"
