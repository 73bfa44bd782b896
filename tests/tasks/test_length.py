"""Loss by context length: what a stream in pieces gives is what reading at once gives, sorted by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gecko_lab.errors import LabError
from gecko_lab.tasks import Subject, configure, run_task
from gecko_lab.tasks.length import mean_and_error
from gecko_lab.tasks.streams import BLOCK

BOS = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of 300, 740 and 190 bytes."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i, size in enumerate((300, 740, 190)):
        (folder / f"{i}.txt").write_bytes(bytes(random.integers(97, 123, size).tolist()))
    return folder


def nats(subject: Subject, sequence: list[int], bos_id: int | None) -> np.ndarray:
    """Of every token after the first, read at once."""
    tokens = torch.tensor([sequence])
    with torch.no_grad():
        logits, _ = subject.model(tokens[:, :-1], bos_id=bos_id)
    return F.cross_entropy(logits[0], tokens[0, 1:], reduction="none").double().numpy()


def by_hand(rows: list[np.ndarray], edges: list[int]) -> list[float]:
    before = [0, *edges[:-1]]
    return [float(np.concatenate([r[a:b] for r in rows]).mean()) for a, b in zip(before, edges)]


def measure(subject: Subject, text: Path, *overrides: str) -> dict[str, Any]:
    fixed = ["task=length", f"data={text}", "first=128"]
    return run_task(configure([*fixed, *overrides]), subject)


@pytest.mark.parametrize("piece", [192, 4096])
def test_one_long_text(piece: int, subject: Subject, text: Path) -> None:
    results = measure(subject, text, f"piece={piece}", "restart=[64,320]", "decode=2")
    joined = [b for f in sorted(text.iterdir()) for b in f.read_bytes()]
    length = len(joined) // BLOCK * BLOCK
    edges = [128, 256, 512, length]  # 1,216: no bucket of its own for the few after 1,024
    whole = nats(subject, [BOS, *joined[:length]], None)
    rows = results["rows"]
    assert [(r["from"], r["to"]) for r in rows] == list(zip([1, *(e + 1 for e in edges)], edges))
    assert [r["loss"] for r in rows] == pytest.approx(by_hand([whole], edges), abs=1e-5)
    assert results["tokens"] == sum(r["tokens"] for r in rows) == length
    assert results["loss"] == pytest.approx(whole.mean(), abs=1e-5)
    for every in (64, 320):
        spans = [(i, min(i + every, length)) for i in range(0, length, every)]
        parts = [nats(subject, [BOS, *joined][a : b + 1], None) for a, b in spans]
        expected = by_hand([np.concatenate(parts)], edges)
        assert [r[f"loss_restart_{every}"] for r in rows] == pytest.approx(expected, abs=1e-5)
        assert [r[f"gain_{every}"] for r in rows] == pytest.approx(
            [e - r["loss"] for e, r in zip(expected, rows)], abs=1e-5
        )
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
        assert row["tokens_per_second"] > 0
        assert row["memory_mb"] > 10
        assert row["state_kb"] > 0.5
    assert {r["layer"] for r in results["state"]} == {0, -1}
    assert {"ema", "memory.table", "norm.var"} <= {r["part"] for r in results["state"]}
    assert results["decode"][0]["context"] == 128
    assert all(d["ms_per_token"] > 0 for d in results["decode"])


def test_documents_that_begin_afresh_and_streams_side_by_side(subject: Subject, text: Path) -> None:
    results = measure(subject, text, "documents=reset", "piece=192")
    joined = [t for f in sorted(text.iterdir()) for t in (BOS, *f.read_bytes())]
    length = (len(joined) - 1) // BLOCK * BLOCK
    whole = nats(subject, joined[: length + 1], BOS)
    edges = [r["to"] for r in results["rows"]]
    assert edges[-1] == length
    assert [r["loss"] for r in results["rows"]] == pytest.approx(by_hand([whole], edges), abs=1e-5)

    results = measure(subject, text, "streams=3", "piece=128", "restart=[192]", "tokens=384")
    joined = [b for f in sorted(text.iterdir()) for b in f.read_bytes()]
    size = 384
    rows = [nats(subject, [BOS, *joined[i * size : (i + 1) * size]], None) for i in range(3)]
    edges = [r["to"] for r in results["rows"]]
    assert edges == [128, 256, 384]
    assert [r["loss"] for r in results["rows"]] == pytest.approx(by_hand(rows, edges), abs=1e-5)
    assert results["tokens"] == 3 * size


def test_whole_documents_of_different_lengths(subject: Subject, text: Path) -> None:
    results = measure(subject, text, "documents=whole", "streams=3", "piece=256", "restart=[128]")
    contents = sorted((list(f.read_bytes()) for f in text.iterdir()), key=len, reverse=True)
    rows = [nats(subject, [BOS, *c[: len(c) // BLOCK * BLOCK]], BOS) for c in contents]
    edges = [r["to"] for r in results["rows"]]
    assert edges == [128, 256, 512, 704]
    assert [r["loss"] for r in results["rows"]] == pytest.approx(by_hand(rows, edges), abs=1e-5)
    assert results["tokens"] == sum(len(r) for r in rows)
    again = measure(subject, text, "documents=whole", "streams=3", "piece=256", "restart=[128]")
    keys = ("loss", "loss_se", "gain_128", "gain_128_se", "bits_per_byte", "state_kb")
    assert [[r[k] for k in keys] for r in again["rows"]] == [[r[k] for k in keys] for r in results["rows"]]


def test_figures_and_tables(subject: Subject, text: Path) -> None:
    task = configure(["task=length", f"data={text}", "first=128", "restart=[64]", "decode=1"])
    results = run_task(task, subject)
    figures = task.figures(results)
    assert set(figures) == {"loss", "gain", "speed", "memory", "state"}
    assert "restarted every 64" in figures["loss"]
    assert "memory.table" in figures["state"]
    sheets = task.tables(results)
    assert len(sheets) == 2
    assert all(column.show(row) for sheet in sheets for column in sheet.columns for row in sheet.rows)


def test_the_standard_error_is_that_of_neighbouring_parts() -> None:
    random = np.random.default_rng(0)
    steps = np.repeat(random.normal(size=64), 32)[None] * BLOCK  # 2,048 blocks of which only 64 differ
    mean, error = mean_and_error(steps)
    assert mean == pytest.approx(steps.mean() / BLOCK)
    truth = steps[0, ::32].std(ddof=1) / BLOCK / 8
    assert error == pytest.approx(truth, rel=0.35)
    assert error is not None
    assert error > 3 * steps.std() / BLOCK / math.sqrt(2048)  # what independent blocks would have
    assert mean_and_error(np.full((1, 1), 64.0)) == (1.0, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=nowhere"], "nowhere"),
        (["first=4096"], "two buckets of first=4,096"),
        (["first=100"], "multiple of 64"),
        (["piece=0"], "piece=0"),
        (["restart=[0]"], "restart=[0]"),
        (["documents=reste"], "Did you mean 'reset'"),
        (["documents=whole", "streams=9"], "has 3 documents"),
        (["streams=999"], "too little text"),
        (["streams=0"], "streams=0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes(overrides: list[str], words: str, subject: Subject, text: Path) -> None:
    given = overrides if any(o.startswith("data=") for o in overrides) else [f"data={text}", *overrides]
    with pytest.raises(LabError) as caught:
        run_task(configure(["task=length", *given]), subject)
    assert words in str(caught.value)


def test_no_data_are_named(subject: Subject) -> None:
    with pytest.raises(LabError, match="data= of a task"):
        run_task(configure(["task=length"]), subject)
