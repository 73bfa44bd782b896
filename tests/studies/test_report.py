"""Reports of made-up studies: whole, partial and empty ones."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from made_up import EFFECTS, ablation, search, trial

from gecko_lab import report
from gecko_lab.errors import LabError
from gecko_lab.studies import exhibits, figures, svg
from gecko_lab.studies.analysis import analyse
from gecko_lab.studies.curves import curves
from gecko_lab.studies.page import page
from gecko_lab.studies.table import best_line


def drawings(html: str) -> list[ET.Element]:
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_an_ablation_finds_the_arm_that_matters_and_only_that(tmp_path: Path) -> None:
    result = analyse(ablation(tmp_path, 8))
    assert result.baseline == "gecko"
    assert [c.arm for c in result.comparisons if c.clear] == ["no_awm"]
    assert "no_awm worsens val/loss by 0.1" in result.answer
    assert "Not told from gecko with 8 seeds: real_ema, a<b> & long_name" in result.answer
    assert result.warnings == []
    assert result.missing == []


def test_few_seeds_are_not_called_significant_but_a_normal_assumption_is_named(tmp_path: Path) -> None:
    result = analyse(ablation(tmp_path, 4))
    assert not any(c.clear for c in result.comparisons)
    assert "Only if differences between seeds are normally distributed: no_awm worsens" in result.answer
    assert "4 seeds are too few" in result.warnings[0]


def test_the_page_is_whole_and_by_itself(tmp_path: Path) -> None:
    study = ablation(tmp_path, 8)
    html = page(analyse(study))
    assert len(drawings(html)) == 3
    assert "Which components does the loss need?" in html
    assert "a&lt;b&gt; &amp; long_name" in html
    assert "a<b>" not in html
    assert not re.search(r"""(src|href)\s*=|url\((?!#)|<script|https?://(?!www\.w3\.org/2000/svg)""", html)
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_command_writes_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = ablation(tmp_path, 3)
    for t in study.trials:
        t.run_dir.mkdir(parents=True)
        facts = {
            "git_commit": "abc",
            "python": "3.11",
            "cpu_threads": 1,
            "versions": {"torch": "2.13"},
            "data": {"fingerprint": "f00d"},
        }
        (t.run_dir / "environment.json").write_text(json.dumps([facts]))
    monkeypatch.setattr("gecko_lab.studies.records.load_study", lambda where, name=None: study)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert "0.25" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        ET.parse(out / path)
    assert "smallest p that the two-sided sign-flip test can give is 0.25" in text
    assert "abc" in text
    arms = list(csv.DictReader((out / "arms.csv").open()))
    assert [a["arm"] for a in arms] == list(EFFECTS)
    assert float(arms[1]["difference_mean"]) == pytest.approx(0.12, abs=0.03)
    assert float(arms[0]["tokens"]) == 200 * 512
    assert len(list(csv.DictReader((out / "trials.csv").open()))) == len(study.trials)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert report.main([str(tmp_path), "--baseline", "nobody"]) == 2
    assert "the arms of components are gecko, no_awm" in capsys.readouterr().err
    assert report.main([str(tmp_path), "--out", str(out / "report.md")]) == 2


def test_an_arm_without_effect_is_pointed_out(tmp_path: Path) -> None:
    study = ablation(tmp_path, 2)
    for t in study.trials:
        if t.arm in ("gecko", "real_ema"):
            t.value = 2.0 + t.seed
    warnings = analyse(study).warnings
    assert any(text.startswith("real_ema: exactly the values of gecko") for text in warnings)


def test_a_partial_study_says_what_is_missing(tmp_path: Path) -> None:
    study = ablation(tmp_path, 4)
    study.trials = [t for t in study.trials if not (t.arm == "real_ema" and t.seed > 0)]
    study.trials[0] = dataclasses.replace(study.trials[0], state="running", value=None)
    dead = trial(99, "real_ema", 1, None, tmp_path, error="Traceback\nOutOfMemoryError: CUDA", retried=True)
    pruned = trial(100, "no_awm", 9, 5.0, tmp_path, state="pruned", intermediate={20: 5.0})
    study.trials += [dead, pruned]
    result = analyse(study)
    assert any(text.startswith("real_ema: no complete trial with seed 1, 2, 3") for text in result.missing)
    assert "1 trial is still running" in result.missing
    html = page(result)
    assert "This report is partial" in html
    assert "OutOfMemoryError: CUDA (retried by another trial)" in html
    assert "worse than the other trials at step 20" in html
    assert {c.arm: len(c.seeds) for c in result.comparisons} == {"no_awm": 3, "real_ema": 0, "a<b> & long_name": 3}


def test_without_a_complete_trial_there_is_no_report(tmp_path: Path) -> None:
    study = ablation(tmp_path, 2)
    study.trials = [trial(0, "gecko", 0, None, tmp_path, error="boom: out of memory")]
    with pytest.raises(LabError, match=r"no complete trial.*1 failed.*boom: out of memory"):
        analyse(study)
    study.trials = [trial(0, "gecko", 1000, 2.0, tmp_path, stage="tune")]
    with pytest.raises(LabError, match=r"only trials that tune an arm complete.*1 complete"):
        analyse(study)
    study.trials = []
    with pytest.raises(LabError, match="none at all"):
        analyse(study)


def test_without_histories_or_pairs_the_report_still_comes(tmp_path: Path) -> None:
    study = ablation(tmp_path, 1)
    study.trials = [dataclasses.replace(t, history=[]) for t in study.trials]
    html = page(analyse(study))
    assert "Only one seed is complete" in html
    study.trials = study.trials[1:]
    assert "Nothing can be compared yet" in page(analyse(study))


def test_a_search_names_its_best_and_what_mattered(tmp_path: Path) -> None:
    study = search(tmp_path)
    result = analyse(study)
    best = min((t for t in study.trials if t.state == "complete"), key=lambda t: t.value or 0)
    assert f"trial {best.number}" in result.answer
    assert "16 complete trials and 4 pruned ones" in result.answer
    assert "Pruning spent 82% of the steps" in result.answer  # 16 of 200 steps, 4 of 20
    assert max(result.importances, key=lambda k: result.importances[k]) == "optim.lr"
    assert {f.slug for f in exhibits.figure_set(result)} >= {"importance", "slice_optim_lr", "slice_model_norm"}
    assert len(drawings(page(result))) == 5
    assert not analyse(search(tmp_path, 4)).importances


def test_the_line_on_the_best_trial_names_what_tells_trials_apart(tmp_path: Path) -> None:
    study = search(tmp_path)
    study.trials[0].value, study.trials[0].params = 0.1, {"model.norm.beta2": 0.9999}
    assert best_line(study) == "best: trial 0, beta2=0.9999 seed 0: 0.1000"
    study = ablation(tmp_path, 1)
    assert best_line(study).startswith("best: trial 3, a<b> & long_name seed 0: ")


def test_a_search_over_arms_keeps_them_apart(tmp_path: Path) -> None:
    result = analyse(search(tmp_path, 40, ("gecko", "llama")))
    assert re.search(r"The best val/loss of each arm.*(gecko|llama): 2\..*; (gecko|llama): 2\.", result.answer)
    assert set(result.importances) == {
        f"{arm}: {name}" for arm in ("gecko", "llama") for name in ("optim.lr", "model.norm")
    }
    assert [row[0] for row in exhibits.results(result).rows] == ["gecko"] * 3 + ["llama"] * 3
    assert [c.name for c in curves(result, "val/loss", "tokens")] == ["gecko", "llama"]
    assert "gecko" in page(result)


def test_mean_curves_go_by_step(tmp_path: Path) -> None:
    study = ablation(tmp_path, 2)
    (curve, *_) = curves(analyse(study), "val/loss", "seconds")
    a, b = (t for t in study.trials if t.arm == "gecko")
    first = (20 * 0.2 + 20 * 0.21) / 2, (a.history[2]["val/loss"] + b.history[2]["val/loss"]) / 2
    assert curve.points[0] == pytest.approx(first)
    assert [len(line) for line in curve.faint] == [10, 10]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.031, 0.27), (1.2e6, 9.9e9), (2.0, 2.0001)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    marks = svg.ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert all(low - 1e-9 * abs(low) <= m <= high * (1 + 1e-9) for m in marks)


def test_numbers_read_well() -> None:
    assert [svg.number(v) for v in (0.00123, 12345.0, 3.4e6, 2e12, 5e20, math.nan, 999.0)] == [
        "0.00123", "12.3k", "3.4M", "2T", "5e+20", "-", "999",
    ]  # fmt: skip


def test_odd_values_do_not_break_a_figure() -> None:
    gap = figures.Curve("a", [(0, 1.0), (1, math.nan), (2, 0.5), (3, 0.4)])
    drawn = figures.curves([("x", [gap])], "y", "a")
    assert "nan" not in drawn
    assert ET.fromstring(drawn) is not None
    wild = figures.Row("w", 0.1, -math.inf, math.inf, (0.1,), "w", 0)
    far = figures.Row("f", 0.1, -50.0, 50.0, (0.0, 0.2), "f", 9)
    assert "nan" not in figures.forest([wild, far], "d", "left")
    assert "nan" not in figures.dots(
        [figures.Dot(1e-3, 2.0, True, ""), figures.Dot(1e-3, math.nan, False, "")], "x", "y", []
    )
