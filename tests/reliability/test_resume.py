"""A run that was stopped anywhere and resumed is the run that nothing happened to, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import STEPS, TINY, differences, outcome, record, run

from gecko_lab import checkpoint
from gecko_lab.callbacks import Saver
from gecko_lab.errors import LabError
from gecko_lab.lit import LitLanguageModel

Reference = Callable[..., Path]
PACK = ("trainer.accumulate=2", "log.validate_every_n_steps=3", "checkpoint.every_n_steps=1")
STREAM = ("data.mode=stream", "trainer.accumulate=2", "log.validate_every_n_steps=2", "checkpoint.every_n_steps=2")
SPARSE = ("checkpoint.every_n_steps=3", "log.every_n_steps=2", "log.validate_every_n_steps=2", "data.truncate=true")
PIECES = ("data.mode=stream", "trainer.piece_len=12", "checkpoint.every_n_steps=1", "log.validate_every_n_steps=3")


class Killed(BaseException):
    """Stands for SIGKILL inside this process (torture.py sends the real one)."""


def kill_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    """The forward pass of this micro-batch, counted from the start of this process's run, does not come back."""
    seen, before = [0], LitLanguageModel.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen[0] += 1
        if seen[0] == micro_batch:
            raise Killed
        return before(self, batch, batch_idx)

    monkeypatch.setattr(LitLanguageModel, "training_step", step)


@pytest.mark.parametrize("overrides", [PACK, STREAM, SPARSE, PIECES], ids=["pack", "stream", "sparse", "pieces"])
def test_killed_twice_and_resumed_is_the_same_run(
    overrides: tuple[str, ...], reference: Reference, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = reference(*overrides), tmp_path / "run"
    for micro_batch, resume in ((7, "resume=null"), (2, "resume=auto")):
        with monkeypatch.context() as patch:
            kill_at(patch, micro_batch)
            with pytest.raises(Killed):
                run(folder, text, *overrides, resume)
    run(folder, text, *overrides, "resume=auto")
    assert record(folder) == record(whole)
    assert differences(outcome(whole), outcome(folder)) == []


def test_killed_after_a_validation_and_before_its_checkpoint(
    reference: Reference, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any) -> None:
        raise Killed

    whole, folder = reference(*PACK), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "on_validation_end", die)
        with pytest.raises(Killed):
            run(folder, text, *PACK)
    assert [p.name for p in checkpoint.steps(folder / "checkpoints")] == ["step-00000002.ckpt", "step-00000001.ckpt"]
    run(folder, text, *PACK, "resume=auto")
    assert record(folder) == record(whole)
    assert differences(outcome(whole), outcome(folder)) == []


def test_best_checkpoint_is_a_place_to_resume_from(reference: Reference, text: Path, tmp_path: Path) -> None:
    whole = reference(*PACK)
    run(tmp_path / "run", text, *PACK, f"resume={whole}/checkpoints/best.ckpt")
    assert differences(outcome(whole), outcome(tmp_path / "run")) == []
    began = checkpoint.load(whole / "checkpoints" / "best.ckpt")["global_step"]
    assert record(tmp_path / "run") == [entry for entry in record(whole) if entry[0] > began]


def test_before_the_first_checkpoint_the_run_starts_anew(
    reference: Reference, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, folder = reference(*PACK), tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            run(folder, text, *PACK)
    run(folder, text, *PACK, "resume=auto")
    assert "stopped before its first checkpoint; it starts anew" in caplog.text
    assert record(folder) == record(whole)
    assert differences(outcome(whole), outcome(folder)) == []


def test_a_complete_run_is_left_alone_and_goes_on_with_more_steps(
    reference: Reference, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = (*STREAM, "optim.min_lr_ratio=1")  # a cosine to more steps would be another one
    whole, folder = reference(*constant), tmp_path / "run"
    run(folder, text, *constant, "trainer.max_steps=4")
    kept, lines = outcome(folder, 4), record(folder)
    run(folder, text, *constant, "trainer.max_steps=4", "resume=auto")
    assert "The run is complete; nothing is trained" in capsys.readouterr().out
    assert differences(kept, outcome(folder, 4)) == []
    assert record(folder) == lines
    run(folder, text, *constant, "resume=auto")
    assert record(folder) == record(whole)
    found = [d for d in differences(outcome(whole), outcome(folder)) if not d.startswith(".loops")]
    assert found == []  # Lightning's counters know that the loader ended once


def test_resuming_from_an_earlier_step_sets_the_later_ones_aside(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, text, "checkpoint.every_n_steps=2", "checkpoint.keep_last=9")
    early = folder / "checkpoints" / "step-00000004.ckpt"
    run(folder, text, "checkpoint.every_n_steps=2", "checkpoint.keep_last=9", f"resume={early}", "trainer.max_steps=6")
    names = sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("step"))
    assert names == [f"step-0000000{n}.ckpt{old}" for n, old in ((2, ""), (4, ""), (6, ""), (6, ".old"), (8, ".old"))]
    assert max(step for step, _, _ in record(folder)) == 6


def test_tensorboard_shows_each_step_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 6)  # after step 5, checkpoint at 3
        with pytest.raises(Killed):
            run(folder, text, "checkpoint.every_n_steps=3")
    run(folder, text, "checkpoint.every_n_steps=3", "resume=auto")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_changed_data_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, text, "trainer.max_steps=2")
    for change in ("data.seq_len=16", "data.mode=stream", "seed=7"):
        with pytest.raises(LabError, match="the data changed since the run began"):
            run(folder, text, "resume=auto", change)
    (other := tmp_path / "other").mkdir()
    for file in text.iterdir():
        (other / file.name).write_text(file.read_text().replace("moon", "star"))
    with pytest.raises(LabError, match="the data changed since the run began: fingerprint"):
        run(folder, other, "resume=auto")


@pytest.mark.slow
def test_two_processes_resume_with_their_own_streams_and_dropout(text: Path, tmp_path: Path) -> None:
    options = [*TINY, "data=text", f"data.path={text}", *STREAM, "trainer.devices=2", "trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    early = tmp_path / "whole" / "checkpoints" / "step-00000004.ckpt"
    for name, resume in (("whole", "null"), ("resumed", str(early))):
        where = [f"hydra.run.dir={tmp_path / name}", f"resume={resume}", "checkpoint.keep_last=9"]
        command = [sys.executable, "-m", "gecko_lab.train", *options, *where]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    first, second = checkpoint.load(early)["gecko_lab"]["processes"]
    assert differences(first["stream_state"], second["stream_state"])
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "resumed")) == []
    assert record(tmp_path / "resumed") == [entry for entry in record(tmp_path / "whole") if entry[0] > 4]
