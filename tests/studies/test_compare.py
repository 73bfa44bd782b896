"""The folder that TensorBoard is pointed at."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import ablation, search
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from gecko_lab import compare
from gecko_lab.studies.records import StudyRecord


def make_run(folder: Path, value: float) -> None:
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_scalar("val/loss", value, 1)


def seen(folder: Path) -> dict[str, float]:
    """What TensorBoard itself reads there."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return {run: multiplexer.Scalars(run, "val/loss")[0].value for run in multiplexer.Runs() if run != "."}


def columns_seen(folder: Path) -> tuple[list[str], list[str]]:
    """Options and metrics that HPARAMS shows."""
    events = EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    return [info.name for info in experiment.hparam_infos], [info.name.tag for info in experiment.metric_infos]


def made(study: StudyRecord, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "study.json").write_text("{}")
    for t in study.trials:
        make_run(t.run_dir, t.value or 0.0)
    monkeypatch.setattr("gecko_lab.studies.records.load_study", lambda where: study)


def test_a_study_sorts_with_its_baseline_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = ablation(tmp_path, 2)
    study.trials[1].state = "failed"
    study.trials[1].value = None
    made(study, tmp_path, monkeypatch)
    for _ in range(2):
        assert compare.main([str(tmp_path)]) == 0
    found = seen(tmp_path / "compare")
    assert sorted(found)[:3] == ["00_gecko/seed_00", "00_gecko/seed_01_failed", "01_no_awm/seed_00"]
    assert found["01_no_awm/seed_00"] == pytest.approx(study.trials[2].value)
    assert len(found) == len(study.trials)
    assert f"8 runs: tensorboard --logdir {tmp_path / 'compare'}" in capsys.readouterr().out


def test_a_search_sorts_by_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = search(tmp_path, 5)
    made(study, tmp_path, monkeypatch)
    compare.main([str(tmp_path), "--out", str(tmp_path / "out")])
    found = seen(tmp_path / "out")
    ranked = [found[name] for name in sorted(found)]
    assert ranked[:4] == sorted(ranked[:4])
    assert sorted(found)[4] == "pruned_trial_004"


def test_runs_and_folders_of_runs(tmp_path: Path) -> None:
    for name, value in (("a/one", 1.0), ("a/two", 2.0), ("b", 3.0), ("c/b", 4.0)):
        make_run(tmp_path / name, value)
    out = tmp_path / "out"
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c" / "b"), "--out", str(out)]) == 0
    assert seen(out) == {"a/one": 1.0, "a/two": 2.0, "b": 3.0, "b_2": 4.0}


def test_hparams_shows_the_options_that_differ_and_what_validation_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("a", "b")):
        make_run(tmp_path / name, 1.0)
        memory = "{name: adaptive_working, lag: 2}" if i else "{name: none}"
        text = f"seed: {i}\nmodel: {{dim: 64, memory: {memory}}}\noptim: {{lr: {1 + i}e-3, fused: true}}\n"
        (tmp_path / name / "config.yaml").write_text(text)
        lines = '{"step": 1, "train/loss": 2.0}\n{"step": 1, "val/loss": 2.0, "val/accuracy": 0.5}\n'
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    options, metrics = columns_seen(tmp_path / "out")
    assert options == ["seed", "model.memory.name", "optim.lr"]  # the lag is of one run alone
    assert metrics == ["val/loss", "val/bits_per_byte", "val/accuracy"]
    assert "They differ in seed, model.memory.name, optim.lr." in capsys.readouterr().out


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", 1.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["gone"], "no such folder"),
        (["empty"], "holds no run"),
        (["run", "--out", str(tmp_path / "mine")], "not empty"),
    ):
        assert compare.main([str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
