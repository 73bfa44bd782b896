"""The adapter of lm-evaluation-harness gives what the lab's own tasks give, and answers until it is told to stop."""

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from gecko_lab.harness.__main__ import main
from gecko_lab.harness.adapter import HarnessModel, choice_task
from gecko_lab.tasks import Subject, configure, run_task


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    choices = [w * (1 + j % 2) for j, w in enumerate(words)]
    rows = [{"query": f"Question {i}: {words[i % 5]}\n", "choices": choices[: 2 + i % 4], "gold": i % 2}
            for i in range(30)]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_multiple_choice_equals_our_own_to_the_last_example(subject: Subject, questions: Path) -> None:
    ours = run_task(configure(["task=choice", f"data={questions}"]), subject)
    theirs = lm_eval.simple_evaluate(
        model=HarnessModel.of(subject),
        tasks=[choice_task("mine", str(questions))],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    row, values = ours["rows"][0], theirs["results"]["mine"]
    assert values["acc,none"] == pytest.approx(row["accuracy"])
    assert values["acc_norm,none"] == pytest.approx(row["accuracy_norm"])
    picked = []
    for sample in sorted(theirs["samples"]["mine"], key=lambda s: s["doc_id"]):
        nats = [r[0] for r in sample["filtered_resps"]]
        picked.append(nats.index(max(nats)))
    assert picked == ours["picked"]


def test_rolling_reads_whole_texts_from_bos(subject: Subject) -> None:
    model = HarnessModel.of(subject)
    (whole,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "some words")])
    first, rest = model.loglikelihood(
        [request("loglikelihood", "", "some"), request("loglikelihood", "some", " words")]
    )
    assert whole == pytest.approx(first[0] + rest[0], rel=1e-5)


def test_answers_end_before_the_stop_string(subject: Subject) -> None:
    model = HarnessModel.of(subject)
    options = {"until": [], "max_gen_toks": 24}
    ask = lambda text, **more: request("generate_until", text, {**options, **more})
    whole, other = model.generate_until([ask("a b c"), ask("something longer")])
    stop = whole[len(whole) // 2]
    cut, same = model.generate_until([ask("a b c", until=stop), ask("something longer")])
    assert cut == whole[: whole.index(stop)] != whole
    assert same == other
    sampled = [model.generate_until([ask("a b c", do_sample=True, temperature=9.0)])[0] for _ in range(2)]
    assert sampled[0] == sampled[1] != whole


def test_the_command(run_folder: Path, questions: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, lines = tmp_path / "out.json", tmp_path / "samples.jsonl"
    files = ["--json", str(out), "--samples", str(lines)]
    assert main([str(run_folder), "--choice", f"mine={questions}", "--limit", "6", *files]) == 0
    assert "acc_norm" in capsys.readouterr().out
    results = json.loads(out.read_text())["results"]["mine"]
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    assert results["sample_len"] == len(samples) == 6
    assert sum(s["acc"] for s in samples) / 6 == pytest.approx(results["acc,none"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [([], "nothing to run"), (["--tasks", "no_such_task"], "knows no no_such_task"), (["--choice", "x"], "NAME=FILE"),
     (["--choice", "x=nowhere.jsonl"], "no such file"), (["--tasks", "x", "--include", "nowhere"], "no such folder")],
)  # fmt: skip
def test_mistakes(run_folder: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder), *arguments]) == 2
    assert match in capsys.readouterr().err
