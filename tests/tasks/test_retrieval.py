"""Passkey and needle: one who knows finds everything, one who guesses nothing, and prompts are what they should be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from all_knowing import Oracle

from gecko_lab.data.tokenizers import load_tokenizer
from gecko_lab.errors import LabError
from gecko_lab.tasks import Subject, configure, run_task
from gecko_lab.tasks.haystack import Hay, prompt, split_answer
from gecko_lab.tasks.retrieval import Case

KINDS = {
    "passkey": ["task=passkey"],
    "single": ["task=needle", "kind=single"],
    "multikey": ["task=needle", "kind=multikey", "value=word"],
    "all needles": ["task=needle", "kind=multikey", "haystack=needles", "value=uuid"],
    "multivalue": ["task=needle", "kind=multivalue"],
    "multiquery": ["task=needle", "kind=multiquery"],
    "tracking": ["task=needle", "kind=tracking", "chains=2", "hops=2"],
}


@pytest.fixture
def oracle(subject: Subject) -> Oracle:
    return Oracle(subject.model, subject.tokenizer, subject.device)


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_one_who_knows_finds_everything(overrides: list[str], oracle: Oracle) -> None:
    task = configure([*overrides, "lengths=[700,24x]", "depths=[0,0.5,1]", "samples=3", "batch=2"])
    results = run_task(task, oracle)
    assert {r["length"] for r in results["rows"]} == {700, 24 * 64}
    assert len(results["rows"]) == (2 if task.spread else 6)
    for row in results["rows"]:
        assert row["exact"] == row["recall"] == row["accuracy"] == 1.0, row["example"]
        assert row["nats"] < 1e-3
        assert row["control_accuracy"] < 0.6  # commas and the like
        assert row["gain"] > 1.0
    assert all(svg.startswith("<svg") for svg in task.figures(results).values())
    assert task.tables(results)[0].rows


TWO_VALUES = ["task=needle", "kind=multivalue", "values=2", "digits=4"]


@pytest.mark.parametrize("overrides", [["task=passkey"], TWO_VALUES], ids=["passkey", "needle"])
def test_one_who_guesses_finds_nothing(overrides: list[str], subject: Subject) -> None:
    task = configure([*overrides, "lengths=[6x]", "depths=[0.5]", "samples=4"])
    results = run_task(task, subject)
    (row,) = results["rows"]
    assert row["exact"] == row["recall"] == 0.0
    assert results["chance"] <= 1e-5
    assert row["nats"] == pytest.approx(np.log(257), abs=1.5)  # an untrained model
    assert abs(row["gain"]) < 1.0
    assert run_task(configure([*overrides, "lengths=[6x]", "depths=[0.5]", "samples=4"]), subject)["rows"] == [row]
    uneven = [*overrides, "lengths=[6x]", "depths=[0.5]", "samples=4", "batch=3"]
    (other,) = run_task(configure(uneven), subject)["rows"]
    keys = ("accuracy", "nats", "gain")
    assert [other[k] for k in keys] == pytest.approx([row[k] for k in keys], abs=1e-5)
    other = run_task(configure([*overrides, "lengths=[6x]", "depths=[0.5]", "samples=4", "seed=1"]), subject)["rows"]
    assert other != [row]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(depth: float, subject: Subject, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of some words stands here. Another one follows it! " * 100)
    task = configure(["task=needle", f"data={text}", "lengths=[2000]", f"depths=[{depth}]"])
    task.check(subject)
    items, straw, pairs = task._batch(subject, Case(2000, depth), range(3))
    for item, row, asked in zip(items, straw, pairs):
        ((needle, _),), ((ask, answer),) = item.needles, asked
        said = subject.tokenizer.decode(row.tolist())
        assert len(row) + task.tail == 2000
        assert len(ask) <= task.tail
        assert row[0] == subject.tokenizer.bos_id
        assert (row == subject.tokenizer.bos_id).sum() == 1
        assert said.count(needle) == 1
        room = len(row) - 1 - len(needle)
        assert said.index(needle) == pytest.approx(depth * room, abs=80)
        assert said[: said.index(needle)].endswith((".", "!", ". ", "! ")) or depth in (0.0, 1.0)
        assert subject.tokenizer.decode(ask).endswith("is")
        assert subject.tokenizer.decode(answer) == item.questions[0].answer
        control = task._batch(subject, Case(2000, depth, False), range(1))[1]
        assert control.shape == (1, straw.shape[1])
        assert "magic" not in subject.tokenizer.decode(control[0].tolist())


def test_a_seam_inside_a_token_belongs_to_the_answer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(vocab={"i": 0, "s": 1, " ": 2, "1": 3, "s ": 4, "<s>": 5}, merges=[("s", " ")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(f"hf:{tmp_path}/t.json")
    ask, answer = split_answer(tokenizer, "is", " 1")
    assert ask.tolist() == [0]
    assert answer.tolist() == [4, 3]


def test_needles_keep_their_order(subject: Subject) -> None:
    task = configure(["task=needle", "kind=tracking", "hops=6"])
    for seed in range(20):
        item = task.item(np.random.default_rng(seed), None)
        straw = prompt(item, subject.tokenizer, Hay(subject.tokenizer, None, 0), 700, 90, np.random.default_rng(0))
        said = subject.tokenizer.decode(straw.tolist())
        places = [said.index(f"Variable {name} becomes") for name in item.questions[0].values]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=passkey", "lengths=[100]"], "too few, this task needs"),
        (["task=passkey", "lengths=[a]"], "as 2x"),
        (["task=passkey", "lengths=[]"], "lengths=[]"),
        (["task=passkey", "depths=[2]"], "from 0"),
        (["task=passkey", "data=nowhere.txt"], "nowhere.txt: no such file or folder [data= takes UTF-8 text or .jsonl"),
        (["task=passkey", "data=SHORT", "lengths=[1000]"], "longest prompt 1,000"),
        (["task=passkey", "samples=0"], "samples=0"),
        (["task=passkey", "seed=-1"], "seed=-1"),
        (["task=needle", "kind=sinlge"], "Did you mean 'single'"),
        (["task=needle", "haystack=text"], "data=FILE"),
        (["task=needle", "keys=99"], "keys=99"),
        (["task=needle", "hops=0"], "hops=0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes(overrides: list[str], words: str, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 9)
    with pytest.raises(LabError) as caught:
        run_task(configure([o.replace("SHORT", str(tmp_path / "short.txt")) for o in overrides]), subject)
    assert words in str(caught.value)


def test_full_attention_has_no_window(subject: Subject) -> None:
    from gecko_lab.build import build_model

    model = build_model("model/attention=full", "model/memory=none", "model.num_layers=1").eval()
    full = Subject(model, subject.tokenizer, torch.device("cpu"))
    assert full.window is None
    assert subject.window == 64
    with pytest.raises(LabError, match="no window"):
        run_task(configure(["task=passkey"]), full)
