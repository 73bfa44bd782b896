"""Evaluations from files: a model that copies is right where it can see; rows are checked."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from copier import Copier

from gecko_lab.data.tokenizers import load_tokenizer
from gecko_lab.errors import LabError
from gecko_lab.tasks import Subject, configure, run_task
from gecko_lab.tasks.continuations import pair, score
from gecko_lab.tasks.runner import write


def saved(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / name
    file.write_bytes(lzma.compress(text.encode()) if name.endswith(".xz") else text.encode())
    return file


def run(name: str, file: Path, *fields: str, subject: Subject | None = None) -> dict[str, Any]:
    task = configure([f"task={name}", f"data={file}", *fields])
    results = run_task(task, subject or Copier())
    write(task, results, file.parent / "out")
    return results


@pytest.mark.parametrize("length", [3, 70, 200])
def test_a_score_is_the_models_own_loss_whatever_stands_beside_it(subject: Subject, length: int) -> None:
    texts = [("ab" * length, " cd"), ("", "x"), ("q" * length + " ", "yy" * 9)]
    pairs = [pair(subject.tokenizer, *t) for t in texts]
    found = score(subject, pairs)
    for i, (text, continuation) in enumerate(texts):
        whole = torch.tensor([[256, *(text + continuation).encode()]])
        nats = subject.losses(subject.features(whole[:, :-1])[0], whole[:, 1:])[0]
        kept = len(text.rstrip()) if text else 0
        assert found.nats[i] == pytest.approx(float(nats[kept:].double().sum()), rel=1e-5)
        assert found.tokens[i] == len((text + continuation).encode()) - kept


def test_long_rows_are_read_in_pieces(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair(subject.tokenizer, "some text " * 30, "and more"), pair(subject.tokenizer, "short", " one")]
    whole = score(subject, pairs)
    monkeypatch.setattr("gecko_lab.tasks.continuations.PIECE", 64)
    np.testing.assert_allclose(score(subject, pairs).nats, whole.nats, rtol=1e-5)


def test_white_space_goes_to_the_continuation() -> None:
    tokenizer = load_tokenizer("bytes")
    text, continuation = pair(tokenizer, "a \n", "b")
    assert (text.tolist(), continuation.tolist()) == ([256, 97], [32, 10, 98])
    with pytest.raises(ValueError, match="no token of its own"):
        pair(tokenizer, "a", "")


def test_choice_in_three_forms(tmp_path: Path) -> None:
    query = "abcdefgh abcd"
    rows = [
        {"query": query, "choices": ["efgh", "xxxx"], "gold": 0},
        {"ctx": query, "endings": ["zzzz", "efgh", "yyyyy"], "label": "1"},
        {"context_options": ["efgh", "hello, hello,"], "continuation": "hello,", "gold": 1},
        {"query": query, "choices": ["efgh", "wwww"], "gold": 1},
    ]
    results = run("choice", saved(tmp_path, rows, "rows.jsonl.xz"), "delimiter=''")
    row = results["rows"][0]
    assert results["picked"] == [0, 1, 1, 0]
    assert (row["accuracy"], row["questions"]) == (0.75, 4)
    assert row["accuracy_error"] == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)
    assert row["chance"] == pytest.approx((0.5 * 3 + 1 / 3) / 4)
    assert run("choice", saved(tmp_path, rows), "limit=3", "delimiter=''")["rows"][0]["accuracy"] == 1.0


def test_accuracy_norm_divides_by_the_choices_length(tmp_path: Path, subject: Subject) -> None:
    rows = [{"query": "Q", "choices": ["aaaaaaaaaaaaaaaaaaaa", "z"], "gold": 0}]
    results = run("choice", saved(tmp_path, rows), subject=subject)
    pairs = [pair(subject.tokenizer, "Q", f" {c}") for c in rows[0]["choices"]]
    nats = score(subject, pairs).nats
    assert results["picked"] == [int(nats.argmin())]
    assert results["picked_norm"] == [int((nats / [20, 1]).argmin())]


def test_lambada(tmp_path: Path) -> None:
    texts = [("call me ishmael. call me", "ishmael"), ("no", "idea")]
    rows = [{"context": text, "continuation": word} for text, word in texts]
    results = run("lambada", saved(tmp_path, rows))
    assert results["right"] == [1, 0]
    assert results["rows"][0]["perplexity"] == pytest.approx(np.exp(results["rows"][0]["nats"]))


def records(count: int) -> list[list[str]]:
    return [[f"key-{i:02d}", f"{i * 7919 % 1000:03d}-value"] for i in range(count)]


PROMPT = """prompt='{records} "{key}":'"""


def test_key_value_is_found_at_every_depth_that_is_seen(tmp_path: Path) -> None:
    rows = [{"ordered_kv_records": records(12), "key": f"key-{i:02d}", "value": records(12)[i][1]} for i in (3, 7)]
    file = saved(tmp_path, rows)
    found = run("key_value", file, PROMPT)["rows"]
    assert [r["exact"] for r in found] == [1.0] * 5
    assert all(r["gain"] > 3 for r in found)
    assert [r["distance"] for r in found] == sorted((r["distance"] for r in found), reverse=True)
    near = run("key_value", file, PROMPT, "depths=[0,1]", subject=Copier(sight=80))["rows"]
    assert [r["exact"] for r in near] == [0.0, 1.0]
    few = run("key_value", file, PROMPT, "records=4")["rows"]
    assert few[0]["distance"] < found[0]["distance"] / 2


def test_line_retrieval_by_distance(tmp_path: Path) -> None:
    lines = [f"line word-{i}: REGISTER_CONTENT is <{1000 + 37 * i}>\n" for i in range(20)]
    text = "".join(lines) + "?"
    rows = [{"prompt": text, "correct_line": lines[i], "expected_number": 1000 + 37 * i} for i in (1, 18)]
    results = run("line_retrieval", saved(tmp_path, rows), "ending='line word-18: REGISTER_CONTENT is <'", "bins=2")
    near, far = results["rows"]
    assert (near["exact"], far["exact"]) == (1.0, 0.0)
    assert near["farthest"] < far["nearest"]
    assert near["gain"] > 3


def test_meetings_are_read_once_and_asked_often(tmp_path: Path) -> None:
    said = [{"speaker": "A", "content": "Who said it? Answer: the budget is nine"}, {"speaker": "B", "content": "Bye."}]
    asked = [{"query": "Who said it?", "answer": "the budget is nine"}]
    rows = [{"meeting_transcripts": said, "general_query_list": asked, "specific_query_list": []}]
    results = run("meetings", saved(tmp_path, rows), "prompt='{query} Answer:'", "length=30")
    after, without = results["rows"]
    assert results["answers"]["after the meeting"][0]["made"] == "the budget is nine"
    assert (after["rouge1"], after["f1"]) == (100.0, 100.0)
    assert after["nats"] < 0.1 < without["nats"]
    assert without["f1"] < 50


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("choice", [{"query": "q", "choices": ["a", "b"]}], "'gold' is missing"),
        ("choice", [{"query": "q", "choices": ["a", "b"], "gold": 2}], r"choices are 0\.\.1"),
        ("choice", [{"query": "q", "choices": ["a"], "gold": 0}], "at least two choices"),
        ("lambada", [{"text": "q"}], "it has text"),
        ("key_value", [{"ordered_kv_records": [["a", "b"]], "key": "c", "value": "b"}], "not among its records"),
        ("line_retrieval", [{"prompt": "p", "correct_line": "l", "expected_number": 1}], "stand once in its prompt"),
        ("meetings", [{"meeting_transcripts": []}], "speaker"),
    ],
)
def test_bad_rows_are_named_before_anything_is_read(
    name: str, rows: list[dict[str, Any]], match: str, tmp_path: Path
) -> None:
    with pytest.raises(LabError, match=match) as caught:
        run(name, saved(tmp_path, rows))
    assert "rows.jsonl:1" in str(caught.value)


def test_missing_files_and_wrong_formats(tmp_path: Path) -> None:
    for data, match in [(None, "needs data=FILE: rows"), (tmp_path / "no.jsonl", "no such file")]:
        with pytest.raises(LabError, match=match):
            run_task(configure(["task=choice", *([] if data is None else [f"data={data}"])]), Copier())
    text = tmp_path / "rows.txt"
    text.write_text("{}")
    with pytest.raises(LabError, match=r"reads .jsonl files"):
        run_task(configure(["task=choice", f"data={text}"]), Copier())
    broken = tmp_path / "rows.jsonl"
    broken.write_text("{oh\n")
    with pytest.raises(LabError, match=r"rows\.jsonl:1: not a JSON row"):
        run("choice", broken)


@pytest.mark.parametrize("bad", ["depths=[2]", "depths=[]", "records=1", "prompt=hello"])
def test_bad_fields(bad: str) -> None:
    with pytest.raises(LabError):
        configure(["task=key_value", bad])
