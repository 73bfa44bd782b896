"""NaN and infinities never reach the weights, and the step that made them can be repeated."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import STEPS, differences, outcome, record, run
from torch import Tensor

from gecko_lab import checkpoint
from gecko_lab.components import state as states
from gecko_lab.errors import LabError, RunError
from gecko_lab.lit import LitLanguageModel
from gecko_lab.nonfinite import NonFinite, NonFiniteGuard
from gecko_lab.replay import main, replay

STREAM = ("data.mode=stream", "trainer.accumulate=2", "checkpoint.every_n_steps=1", "checkpoint.keep_last=9")


def spoil_loss(monkeypatch: pytest.MonkeyPatch, *micro_batches: int, by: float = math.nan) -> None:
    """The losses of these micro-batches of the process are NaN, and the state that they leave behind as well."""
    seen, before = [0], LitLanguageModel.losses

    def losses(self: Any, batch: Any, state: Any = None) -> tuple[Tensor, Any]:
        found, after = before(self, batch, state)
        if self.training:
            seen[0] += 1
            if seen[0] in micro_batches:
                return found * by, states.map_tensors(lambda t: t * by if t.is_floating_point() else t, after)
        return found, after

    monkeypatch.setattr(LitLanguageModel, "losses", losses)


def test_stop_leaves_a_dump_that_shows_where_it_began(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NonFinite, match=r"step \d: loss nan.*gecko_lab.replay .*nonfinite-step-\d.ckpt") as error:
        run(tmp_path / "run", text, *STREAM, "optim.lr=1e20", "optim.warmup_steps=0")
    dump = next((tmp_path / "run").glob("nonfinite-step-*.ckpt"))
    assert str(dump) in str(error.value)
    report = replay(dump)
    assert report.same
    assert report.weights == []  # finite weights, so large that the forward pass overflows
    assert "infinite" in report.forward[0] or "NaN" in report.forward[0]
    monkeypatch.setattr(sys, "argv", ["replay", str(dump)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "the same as in the run, bit for bit" in said
    assert report.forward[0] in said


@pytest.mark.parametrize(
    "overrides", [(*STREAM, "model.checkpoint_blocks=true"), ("trainer.piece_len=12", "data.mode=stream")]
)
def test_a_dump_repeats_the_step_bit_for_bit(
    overrides: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: NonFiniteGuard, trainer: Any, module: Any, norm: Tensor) -> None:
        if trainer.global_step == 2:
            self.dump(trainer, module, 3, norm)

    monkeypatch.setattr(NonFiniteGuard, "check", check)
    run(tmp_path / "run", text, *overrides, "trainer.max_steps=3")
    report = replay(tmp_path / "run" / "nonfinite-step-3.ckpt")
    assert report.same
    assert all(math.isfinite(x) for x in [*report.losses, report.norm])
    assert report.forward == report.backward == []


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_skip_leaves_the_update_out_and_goes_on(
    by: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, 6, by=by)  # the second half of step 3
    folder = tmp_path / "run"
    run(folder, text, *STREAM, "trainer.on_nonfinite=skip")
    before, after, last = (outcome(folder, step) for step in (2, 3, STEPS))
    assert differences(before["state_dict"], after["state_dict"]) == []
    assert differences(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"]) == []
    carried = [x["gecko_lab"]["processes"][0]["stream_state"] for x in (before, after)]
    assert differences(*carried) == []
    assert int(last["optimizer_states"][0]["state"][0]["step"]) == STEPS - 1
    assert all(math.isfinite(value) for step, name, value in record(folder) if step > 3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["train/skipped_steps"]) for x in lines if "train/skipped_steps" in x] == [(3, 1)]


def test_skips_are_limited_over_resumes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = (*STREAM, "trainer.on_nonfinite=skip", "trainer.max_skipped=2")
    with monkeypatch.context() as patch:
        spoil_loss(patch, 2, 4)
        run(tmp_path / "run", text, *skip, "trainer.max_steps=4")
    spoil_loss(monkeypatch, 1)
    with pytest.raises(NonFinite, match="after 2 skipped updates"):
        run(tmp_path / "run", text, *skip, "resume=auto")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[0].name == "step-00000004.ckpt"


def test_mistakes(text: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"trainer.on_nonfinite=ignore: must be one of stop, skip"):
        run(tmp_path / "run", text, "trainer.on_nonfinite=ignore")
    checkpoint.save(tmp_path / "x.ckpt", {"a": 1})
    with pytest.raises(RunError, match="not a dump of a non-finite step"):
        replay(tmp_path / "x.ckpt")
