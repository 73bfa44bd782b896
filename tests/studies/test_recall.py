"""The figure of accuracy against the size of the state, in the report of a study of recall."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import trial

from gecko_lab.build import build_config
from gecko_lab.errors import LabError
from gecko_lab.studies import exhibits, recall
from gecko_lab.studies.analysis import analyse
from gecko_lab.studies.records import Arm, StudyRecord

BASE = ["data=mqar", "data.vocab_size=64", "data.seq_len=64", "data.pairs=8", "model.num_layers=2", "model.dim=32",
        "model.z_dim=32", "model.value_dim=32", "model.num_heads=1", "model.ffn_dim=32", "model.norm_groups=4",
        "model.chunk_size=8"]  # fmt: skip
ARMS = {
    "baseline": [],
    "no_awm-8": ["+ablation=no_awm"],
    "no_awm-16": ["+ablation=no_awm", "model.chunk_size=16"],
    "llama": ["model=llama"],
}
VALUES = {"baseline": 0.9, "no_awm-8": 0.2, "no_awm-16": 0.4, "llama": 1.0}


def study(folder: Path, metric: str = "val/accuracy") -> StudyRecord:
    trials = [
        trial(2 * i + seed, arm, seed, VALUES[arm] - 0.01 * seed, folder, overrides=[*BASE, *changes, f"seed={seed}"])
        for i, (arm, changes) in enumerate(ARMS.items())
        for seed in (0, 1)
    ]
    return StudyRecord("recall", "ablation", "", metric, "maximize", [Arm(n, o) for n, o in ARMS.items()], trials,
                       folder)  # fmt: skip


def test_state_is_counted_on_the_model() -> None:
    sizes = {name: recall.state_size(build_config(*BASE, *changes)) for name, changes in ARMS.items()}
    assert sizes["llama"] == (2 * 64 * 2 * 32, 2 * 64 * 2 * 32 * 4)  # layers, tokens, keys and values
    window = []
    for length in (64, 256):
        config = build_config(*BASE, "model=llama", "model/attention=sliding_window", f"data.seq_len={length}")
        window.append(recall.state_size(config))
    assert window[0] == window[1] == (2 * 15 * 2 * 32, 2 * 15 * 2 * 32 * 4)
    assert sizes["no_awm-8"][0] < sizes["no_awm-16"][0] < sizes["baseline"][0]
    with pytest.raises(LabError, match="data=stdlib: the state's size is measured on a synthetic task"):
        recall.state_size(build_config())


def test_report_of_a_recall_study_shows_accuracy_against_the_state(tmp_path: Path) -> None:
    figure = exhibits.figure_set(analyse(study(tmp_path)))[0]
    assert figure.slug == "state"
    for name in ("gecko", "no_awm", "llama", "DeltaNet (published)", "sliding window (published)"):
        assert f">{name}<" in figure.svg
    assert "no_awm-8 " in figure.note
    assert "64 tokens with 8 pairs" in figure.note
    assert "0.895 \u00b1 0.007" in figure.note
    assert "state" not in [f.slug for f in exhibits.figure_set(analyse(study(tmp_path, "val/loss")))]
    other = study(tmp_path)
    other.trials = [replace(t, overrides=["data=listops"]) for t in other.trials]
    assert "state" not in [f.slug for f in exhibits.figure_set(analyse(other))]
