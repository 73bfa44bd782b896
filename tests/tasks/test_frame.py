"""The frame of the evaluations: names and types are checked before a model is read, and what is printed is written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gecko_lab.components.registry import option
from gecko_lab.errors import LabError
from gecko_lab.evaluate import main
from gecko_lab.tasks import TASKS, Column, Subject, Task, configure, listing, run_task
from gecko_lab.tasks.base import nothing
from gecko_lab.tasks.figures import Line, heat_map, lines


@dataclass
class EchoConfig:
    name: str = option("echo", "counts, for the tests")
    lengths: list[float] = option([1.0, 2.0], "what to count")
    word: str = option("x", "a word")
    seed: int = option(0, "seed of the noise")


class Echo(Task):
    Config = EchoConfig
    columns = (Column("length", "length", ",.0f"), Column("noise", "noise", ".3f"))

    def check(self, subject: Subject) -> None:
        if self.config.word == "bad":
            raise LabError("word=bad: not that one")

    def run(self, subject: Subject, progress: Any = nothing) -> dict[str, Any]:
        random = np.random.default_rng(self.config.seed)
        rows = [{"length": x, "noise": random.random()} for x in self.config.lengths]
        return {"rows": rows, "nan": float("nan"), "array": np.arange(2), "word": self.config.word}

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        return {"noise": lines("noise", [Line("a", [(r["length"], r["noise"]) for r in results["rows"]])], "x", "y")}


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._classes, "echo", Echo)


def test_fields_are_typed_and_lists_are_lists() -> None:
    task = configure(["task=echo", "lengths=[3,4.5]", "word='a=b c'"])
    assert task.config == EchoConfig(lengths=[3.0, 4.5], word="a=b c")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=ecoh"], "Did you mean 'echo'"),
        (["task=echo", "lenghts=[1]"], "Did you mean 'lengths'"),
        (["task=echo", "seed=many"], "seed=many"),
        (["task=echo", "lengths=1,2"], "lengths=[...]"),
        (["task=echo", "seed=1", "seed=2"], "given twice"),
        (["task=echo", "+seed=1"], "write seed=VALUE"),
        (["task=echo", "seed"], "cannot be read"),
        (["seed=1"], "task=NAME"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_told_before_the_model_is_read(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no/such/run", *overrides]) == 2
    assert words in capsys.readouterr().err


def test_a_name_is_a_task_only_once() -> None:
    with pytest.raises(ValueError, match="already"):
        TASKS.register("echo")(type("Other", (Task,), {"Config": EchoConfig}))


def test_the_command_prints_and_writes(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(run_folder), "--device", "cpu", "task=echo", "lengths=[7,8]", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((out / "results.json").read_text())
    assert [r["length"] for r in written["rows"]] == [7.0, 8.0]
    assert f"{written['rows'][0]['noise']:.3f}" in printed
    assert str(out / "results.json") in printed
    assert written["nan"] is None
    assert written["array"] == [0, 1]
    assert written["config"] == {"lengths": [7.0, 8.0], "word": "x", "seed": 0}
    assert written["model"]["step"] in (1, 2)
    assert len(written["model"]["sha256"]) == 64
    assert written["model"]["window"] == 32
    assert written["environment"]["versions"]["torch"]
    assert (out / "noise.svg").read_text().startswith("<svg")
    assert main([str(run_folder), "task=echo", "--device", "cpu"]) == 0
    capsys.readouterr()
    folders = list((run_folder / "evaluations").glob("echo-*"))
    assert len(folders) == 1
    assert json.loads((folders[0] / "results.json").read_text())["rows"][0]["length"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "task=echo", "word=bad"], "not that one"),
        (["RUN", "task=echo", "--data", "x"], "--data"),
        (["RUN", "task=echo", "--out", "FILE"], "is a file"),
        (["RUN", "--out", "x"], "--out"),
        (["task=echo"], "which model"),
        ([], "which model"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_of_the_command(arguments: list[str], words: str, run_folder: Path, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    places = {"RUN": str(run_folder), "FILE": str(tmp_path / "file")}
    assert main([places.get(a, a) for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_every_task_is_listed_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tasks"]) == 0
    out = capsys.readouterr().out
    for name, text, known in listing():
        assert name in out
        assert text
        for field, _, meaning in known:
            assert field in out
            assert meaning, f"{name}.{field} has no help"


def test_the_same_seed_gives_the_same(subject: Subject) -> None:
    rows = [run_task(configure(["task=echo", f"seed={s}"]), subject)["rows"] for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_answers_score_as_greedy_decoding_writes_them(subject: Subject) -> None:
    prompts = torch.randint(0, 256, (3, 100), generator=torch.Generator().manual_seed(0))
    logits, state = subject.read(prompts, piece=33)
    made = subject.follow(logits, state, 6)
    answers = [made[0], np.concatenate([made[1][:3], made[1][3:4] ^ 1]), made[2][:1]]
    scored = subject.score(logits, state, answers)
    assert scored.exact.tolist() == [True, False, True]
    assert scored.right.tolist() == [6, 3, 1]
    assert scored.tokens.tolist() == [6, 4, 1]
    for i, answer in enumerate(answers):  # each as if alone and read at once
        whole = torch.cat([prompts[i], torch.from_numpy(answer.astype(np.int64))])[None]
        logprob = subject.logits(subject.features(whole)[0])[0].log_softmax(-1)
        places = range(99, 99 + len(answer))
        assert scored.nats[i] == pytest.approx(-sum(float(logprob[p, t]) for p, t in zip(places, answer)), abs=1e-4)


def test_figures_leave_out_what_cannot_be_drawn() -> None:
    svg = heat_map("t", ["a", "b"], ["r"], [[0.5, None]], "x", "y")
    assert "50%" in svg
    assert svg.count("<rect") == 1
    nothing_there = lines("t", [Line("a", [(0.0, 1.0)])], "x", "y")
    assert "nothing to draw" in nothing_there
    assert "<circle" in lines("t", [Line("a", [(1.0, 1.0), (10.0, float("nan"))])], "x", "y")
