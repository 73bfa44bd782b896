"""Every question of a synthetic task can be answered from what stands before it, by a reader that shares no code."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gecko_lab.data import DataError
from gecko_lab.data.synthetic import TASKS, SyntheticConfig
from gecko_lab.data.synthetic.task import distinct, weighted_places

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {"seq_len": 64, "pairs": 12, "vocab_size": 64},
    "induction": {"seq_len": 40},
    "selective_copy": {"seq_len": 60, "copies": 10},
    "listops": {"seq_len": 80},
}
CROWDED: dict[str, dict[str, Any]] = {  # the least that each task accepts
    "mqar": {"seq_len": 48, "pairs": 12, "vocab_size": 26},
    "induction": {"seq_len": 3, "vocab_size": 3},
    "selective_copy": {"seq_len": 20, "copies": 10, "vocab_size": 4},
    "listops": {"seq_len": 5, "depth": 1, "arguments": 2},
}


def read_mqar(row: list[int], at: int) -> tuple[int, int]:
    """(answer, where it was read): what follows the key's first occurrence."""
    first = row.index(row[at])
    return row[first + 1], first + 1


def read_induction(row: list[int], at: int) -> tuple[int, int]:
    first = row.index(max(row))
    assert first < at
    return row[first + 1], first + 1


def read_selective_copy(row: list[int], at: int) -> tuple[int, int]:
    places = [i for i, token in enumerate(row) if token > 1]
    place = places[row[:at].count(1)]
    return row[place], place


def read_listops(row: list[int], at: int) -> tuple[int, int]:
    """Evaluate with a stack; where it was read is nowhere in particular."""
    stack: list[Any] = []
    for token in row[:at]:
        if token != 14:
            stack.append(token if token < 10 else ("MIN", "MAX", "MED", "SM")[token - 10])
            continue
        values: list[int] = []
        while isinstance(stack[-1], int):
            values.append(stack.pop())
        stack.append({"MIN": min(values), "MAX": max(values), "SM": sum(values) % 10,
                      "MED": int(np.floor(np.median(values)))}[stack.pop()])  # fmt: skip
    assert len(stack) == 1
    return stack[0], at


READERS = {"mqar": read_mqar, "induction": read_induction, "selective_copy": read_selective_copy,
           "listops": read_listops}  # fmt: skip


def task(name: str, **options: Any) -> SyntheticConfig:
    config = TASKS[name](**options)
    config.check()
    return config


@pytest.mark.parametrize("options", [SMALL, CROWDED], ids=["small", "crowded"])
@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_what_a_reader_finds(name: str, options: dict[str, dict[str, Any]]) -> None:
    config = task(name, **options[name])
    drawn = config.draw(np.random.default_rng(3), 50)
    assert all(part.shape == (50, config.seq_len) for part in drawn)
    assert drawn.tokens.min() >= 0
    assert drawn.tokens.max() < config.vocab_size
    assert (drawn.scored.sum(1) == config.answers).all()
    assert not drawn.targets[~drawn.scored].any()
    assert not drawn.distances[~drawn.scored].any()
    for row, at in np.argwhere(drawn.scored):
        answer, place = READERS[name](drawn.tokens[row].tolist(), int(at))
        assert (answer, at - place) == (drawn.targets[row, at], drawn.distances[row, at])


@pytest.mark.parametrize("name", TASKS)
def test_the_same_stream_gives_the_same_examples(name: str) -> None:
    config = task(name, **SMALL[name])
    one, two, other = (config.draw(np.random.default_rng(seed), 9) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, two))
    assert (one.tokens != other.tokens).any()
    assert config.fingerprint == task(name, **SMALL[name]).fingerprint
    assert config.fingerprint == replace(config, workers=3, val_batches=1).fingerprint
    assert config.fingerprint != replace(config, seq_len=config.seq_len + 1).fingerprint


def test_mqar_asks_each_key_once_soon_or_anywhere() -> None:
    mean = {}
    for power in (0.01, 1.0):
        drawn = task("mqar", seq_len=256, pairs=8, power=power).draw(np.random.default_rng(0), 200)
        keys = np.sort(drawn.tokens[:, 0:16:2], axis=1)
        asked = np.sort(drawn.tokens[drawn.scored].reshape(200, 8), axis=1)
        assert (keys == asked).all()
        assert (np.diff(keys, axis=1) > 0).all()
        rest = drawn.tokens[:, 16:][~drawn.scored[:, 16:]]
        assert not rest.any()
        mean[power] = np.nonzero(drawn.scored)[1].mean()
    assert abs(mean[1.0] - (16 + 255) / 2) < 5
    assert mean[0.01] < 80


def test_listops_fills_its_row_and_uses_every_operation_and_depth() -> None:
    drawn = task("listops", seq_len=200).draw(np.random.default_rng(0), 200)
    lengths = np.nonzero(drawn.scored)[1]
    assert lengths.max() > 150
    assert set(np.unique(drawn.tokens)) == set(range(17))
    counts = np.bincount(drawn.targets[drawn.scored], minlength=10)
    assert counts.min() > 0
    nested = (np.cumsum((drawn.tokens >= 10) & (drawn.tokens < 14), 1) - np.cumsum(drawn.tokens == 14, 1)).max(1)
    assert nested.max() >= 5
    shallow = task("listops", seq_len=200, depth=1, arguments=3).draw(np.random.default_rng(0), 50)
    assert np.nonzero(shallow.scored)[1].max() <= 5


def test_distinct_draws_every_subset_and_order_alike() -> None:
    drawn = distinct(np.random.default_rng(0), 12_000, 2, 5, 9)
    pairs = drawn[:, 0] * 10 + drawn[:, 1]
    values, counts = np.unique(pairs, return_counts=True)
    assert len(values) == 12  # 4 * 3 ordered pairs
    assert np.abs(counts - 1000).max() < 150
    assert (np.sort(distinct(np.random.default_rng(0), 5, 7, 0, 7), axis=1) == np.arange(7)).all()


def test_places_are_drawn_by_weight_and_differ() -> None:
    drawn = weighted_places(np.random.default_rng(0), 20_000, 2, np.asarray([1.0, 2.0, 5.0]))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    share = (drawn == 0).any(1).mean()
    assert abs(share - (1 / 8 + 2 / 8 * 1 / 6 + 5 / 8 * 1 / 3)) < 0.01


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("mqar", {"seq_len": 63}, r"data.seq_len=63: data=mqar needs at least 64: 16 pairs"),
    ("mqar", {"vocab_size": 33}, r"data.vocab_size=33: data=mqar needs at least 34"),
    ("mqar", {"pairs": 0}, r"data.pairs=0"),
    ("mqar", {"power": 0.0}, r"data.power=0.0"),
    ("mqar", {"mode": "stream"}, r"data.mode=stream with data=mqar: every row is an example"),
    ("mqar", {"path": "x"}, r"data.path='x' with data=mqar: is for text"),
    ("mqar", {"tokenizer": "spm:a"}, r"data.tokenizer='spm:a' with data=mqar"),
    ("mqar", {"val_batches": 0}, r"data.val_batches=0: must be at least 1"),
    ("mqar", {"examples": -1}, r"data.examples=-1"),
    ("induction", {"seq_len": 2}, r"data.seq_len=2: data=induction needs at least 3"),
    ("induction", {"vocab_size": 2}, r"data.vocab_size=2"),
    ("selective_copy", {"seq_len": 31}, r"data.seq_len=31: data=selective_copy needs at least 32"),
    ("selective_copy", {"vocab_size": 3}, r"data.vocab_size=3"),
    ("selective_copy", {"copies": 0}, r"data.copies=0"),
    ("listops", {"vocab_size": 16}, r"data.vocab_size=16: data=listops needs at least 17"),
    ("listops", {"depth": 0}, r"data.depth=0"),
    ("listops", {"arguments": 1}, r"data.arguments=1"),
    ("listops", {"seq_len": 4}, r"data.seq_len=4"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_mistakes_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(name, **options)
