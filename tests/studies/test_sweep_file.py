"""What a sweep may ask, and what each mistake is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gecko_lab import sweep as command
from gecko_lab.build import options
from gecko_lab.errors import LabError
from gecko_lab.studies import arms, code, plan
from gecko_lab.studies.records import Arm, load_study
from gecko_lab.studies.space import dimension
from gecko_lab.studies.storage import open_storage
from gecko_lab.studies.study import join
from gecko_lab.studies.sweepfile import Sweep, make_sweep, read, shipped

TINY = [
    "model.num_layers=1", "model.dim=32", "model.ffn_dim=48", "model.z_dim=32", "model.value_dim=32",
    "model.chunk_size=16", "model.norm_groups=4", "model.ema_modes=4", "data.seq_len=64", "trainer.batch_size=2",
]


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("tag(log, interval(1e-4, 3e-3))", "FloatDistribution", ()),
        ("interval(0, 1)", "FloatDistribution", ()),
        ("int(interval(2, 8))", "IntDistribution", ()),
        ("range(1, 9, 2)", "IntDistribution", (1, 3, 5, 7)),
        ("range(0.25, 1, 0.25)", "CategoricalDistribution", (0.25, 0.5, 0.75)),
        ("1,2.5,x", "CategoricalDistribution", (1, 2.5, "x")),
        ("[a],[a,b]", "CategoricalDistribution", ("[a]", "[a,b]")),
    ],
)
def test_the_grammar_of_a_space(text: str, kind: str, values: tuple) -> None:
    d = dimension("optim.lr", text)
    assert type(d.distribution).__name__ == kind
    assert d.values == values
    assert getattr(d.distribution, "log", False) == ("log" in text)


EMPTY = ["range(3,3)", "interval(3,1)", "5", "choice()", "glob(*)", "1,1", "tag(log,interval(0,1))"]


@pytest.mark.parametrize("text", EMPTY)
def test_a_space_without_values_is_refused(text: str) -> None:
    with pytest.raises(LabError, match=r"optim\.lr="):
        dimension("optim.lr", text)


SEARCH = {"kind": "search", "space": {"optim.lr": "1,2"}}
ABLATION = {"kind": "ablation", "arms": {"baseline": []}}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"kind": "search"}, {}, "yields no trial"),
        ({"kind": "explore"}, {}, "kind=explore: must be one of"),
        ({}, {}, "kind: is missing"),
        (SEARCH | {"spcae": 1}, {}, "unknown field 'spcae'.*space"),
        (SEARCH, {"trials": 0}, "trials=0: the study would have no trial"),
        (SEARCH, {"metric": "val/los"}, "metric=val/los"),
        (SEARCH, {"sampler": "cma"}, "sampler=cma: must be one of"),
        (SEARCH, {"seeds": [0, 1]}, "a search has one"),
        (SEARCH, {"budget": {"hours": 1}}, "budget="),
        (SEARCH, {"budget": {"steps": -1}}, "budget.steps=-1"),
        (SEARCH | {"base": "x=1"}, {}, "base=x=1: must be a list"),
        (SEARCH | {"sampler": "grid", "space": {"x": "interval(0,1)"}}, {}, None),
        (ABLATION, {"seeds": []}, "no trial"),
        (ABLATION, {"seeds": [1, 1]}, "name each seed once"),
        (ABLATION, {"pruner": "median"}, "runs every trial to its end"),
        ({"kind": "ablation", "arms": {"a": []}}, {}, "needs an arm named baseline"),
    ],
)
def test_mistakes_in_a_sweep(content: dict, options: dict, message: str | None) -> None:
    if message is None:
        sweep = make_sweep(content, "", options, [])
        with pytest.raises(LabError, match="an interval has no grid"):
            plan.slots(sweep, ["search"], [])
        return
    with pytest.raises(LabError, match=message):
        make_sweep(content, "", options, [])


def test_the_direction_is_the_metrics_own_unless_given() -> None:
    assert make_sweep(SEARCH, "", {}, []).direction == "minimize"
    assert make_sweep(SEARCH, "", {"metric": "val/accuracy"}, []).direction == "maximize"
    assert make_sweep(SEARCH, "", {"metric": "val/loss", "direction": "maximize"}, []).direction == "maximize"


def test_overrides_of_the_command_line_join_base_or_space() -> None:
    sweep = make_sweep(SEARCH, "", {}, ["model.dim=64", "model.num_layers=1,2", "optim.lr=3"])
    assert sweep.base == ["model.dim=64", "optim.lr=3"]
    assert sweep.space == {"model.num_layers": "1,2"}


def test_the_command_line() -> None:
    launch, fields, chosen, overrides = command.parse(
        ["workers=2", "devices=0,1", "seeds=0,1", "pruner=median", "pruner.n_startup_trials=2", "budget.flops=1e12",
         "arms=baseline,no_awm", "tune.optim.lr=1,2", "allow_code_change=true", "model.dim=64", "+ablation=no_ema"]
    )
    assert (launch.workers, launch.devices, launch.allow_code_change) == (2, "0,1", True)
    assert fields == {
        "seeds": [0, 1], "pruner": {"name": "median", "n_startup_trials": 2}, "budget": {"flops": 1e12},
        "tune": {"optim.lr": "1,2"},
    }
    assert chosen == ["baseline", "no_awm"]
    assert overrides == ["model.dim=64", "+ablation=no_ema"]


@pytest.mark.parametrize("argument", ["workers=x", "workers", "allow_code_change=maybe"])
def test_a_bad_option_is_refused(argument: str) -> None:
    with pytest.raises(LabError, match=argument.split("=")[0]):
        command.parse([argument])


def test_shipped_sweeps_can_be_read_in_both_variants() -> None:
    assert {"components", "learning_rate", "awm", "norm_betas", "families"} <= set(shipped())
    for name in shipped():
        for variant in ("cpu", "gpu"):
            sweep = make_sweep(read(name)[1], variant, {}, [])
            assert plan.slots(sweep, list(sweep.arms) or ["search"], [])
            assert sweep.question
            assert sweep.budget


def test_components_has_every_ablation() -> None:
    assert set(read("components")[1]["arms"]) == {"baseline", *options("ablation")}


def test_arms_are_built_before_anything_starts() -> None:
    with pytest.raises(LabError, match=r"arm b .*unknown field.*model\.dmi"):
        arms.prepare(Sweep("ablation", base=TINY, arms={"baseline": [], "b": ["model.dmi=3"]}))
    with pytest.raises(LabError, match=r"arm search with model\.norm_groups=5: "):
        arms.prepare(Sweep("search", base=TINY, space={"model.norm_groups": "4,5"}))
    with pytest.raises(LabError, match=r"trainer\.devices"):
        arms.prepare(Sweep("search", base=[*TINY, "trainer.devices=2"], space={"optim.lr": "1,2"}))
    with pytest.raises(LabError, match="less than one step"):
        arms.prepare(Sweep("search", base=TINY, space={"optim.lr": "1,2"}, budget={"tokens": 100}))


@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_arms_are_matched_by_the_width_of_the_feedforward(match: str) -> None:
    base = [*TINY, "model.dim=64", "model.ffn_dim=256"]
    sweep = Sweep("ablation", base=base, arms={"baseline": [], "no_ema": ["+ablation=no_ema"]}, match=match)
    free = arms.prepare(Sweep("ablation", base=base, arms=sweep.arms))
    held = arms.prepare(sweep)
    size = (lambda a: a.parameters) if match == "parameters" else (lambda a: a.flops_per_token)
    off = [abs(size(pair[1]) / size(pair[0]) - 1) for pair in (free, held)]
    assert off[1] < off[0] / 2
    assert off[1] < 0.015
    assert held[0] == free[0]


def test_a_budget_in_steps() -> None:
    config, model = arms.built(TINY)
    forward = arms.measure(Sweep("ablation", base=TINY), "a", []).flops_per_token
    assert arms.steps({"tokens": 1000}, config, model) == 7  # of 2 rows of 64 tokens
    assert arms.steps({"flops": 3 * forward * 128 * 5.5}, config, model) == 5
    assert arms.steps({"seconds": 9}, config, model) == config.trainer.max_steps


def test_another_study_or_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep("ablation", arms={"baseline": []}, seeds=[0])
    storage, found = open_storage(tmp_path, create=True), [Arm("baseline", [])]
    join(storage, "s", sweep, found, tmp_path)
    before = (tmp_path / "journal.log").read_bytes()
    with pytest.raises(LabError, match=r"belongs to another study.*base: there \[\], here \['model\.dim=32'\]"):
        join(storage, "s", Sweep("ablation", arms={"baseline": []}, base=["model.dim=32"]), found, tmp_path)
    monkeypatch.setattr("gecko_lab.studies.study.fingerprint", lambda: "other")
    with pytest.raises(LabError, match=r"began with other code.*allow_code_change=true"):
        join(storage, "s", sweep, found, tmp_path)
    assert (tmp_path / "journal.log").read_bytes().count(b"codes") == before.count(b"codes") == 1
    join(storage, "s", sweep, found, tmp_path, allow_code_change=True)
    grown, _ = join(storage, "s", Sweep("ablation", arms={"baseline": []}, seeds=[0, 5]), found, tmp_path)
    assert grown.seeds == [0, 5]


def test_the_fingerprint_sees_the_model_and_not_the_report() -> None:
    seen = {str(p.relative_to(code.PACKAGE)) for p in code._sources(code.PACKAGE)}
    assert {"model.py", "conf/train.yaml"} <= seen
    assert any(s.startswith("components/") for s in seen)
    assert not any(s.startswith(("studies/", "sweeps/")) or s in ("sweep.py", "report.py") for s in seen)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://lab:secret@127.0.0.1:1/none", "cannot be opened"),
        ("sqlite:////no/such/folder/s.db", "cannot be opened"),
        ("nosuchdb://x", "storage=nosuchdb"),
        ("/no/such/study", "no study here"),
    ],
)
def test_a_storage_that_cannot_be_reached(url: str, message: str) -> None:
    with pytest.raises(LabError, match=message) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.log"
    file.write_text("my notes")
    with pytest.raises(LabError, match="no journal"):
        open_storage(file)
    assert file.read_text() == "my notes"


def test_a_database_by_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    join(open_storage(url, create=True), "s", Sweep("ablation", arms={"baseline": []}), [Arm("baseline", [])], tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "storage": url}))
    assert load_study(tmp_path).name == load_study(url, "s").name == "s"
    with pytest.raises(LabError, match="holds s; name one of them, not t"):
        load_study(url, "t")


def test_user_mistakes_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(ABLATION | {"arms": {"baseline": [], "x": ["+ablation=no_awn"]}}))
    for arguments, message in [
        (["componets"], "unknown sweep 'componets'"),
        (["bad.yaml"], "unknown ablation 'no_awn'"),
        (["none.yaml"], "no such file"),
        (["components", "arms=baseline,xyz"], "unknown xyz"),
    ]:
        monkeypatch.setattr("sys.argv", ["sweep", *arguments])
        assert command.main() == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "studies").exists()
