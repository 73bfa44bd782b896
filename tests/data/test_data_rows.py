"""Rows are a function of (seed, step, row): every target once an epoch, documents whole, restarts exact."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gecko_lab.data import DataError, TokenSource, load_tokenizer
from gecko_lab.data.batches import Batches, TrainLoader
from gecko_lab.data.rows import PERIOD, MixedRows, PackedRows, Rows, StreamRows, TokenStream, TruncatedRows, shares

BOS = 1_000_000


def numbered(lengths: list[int], first: int = 0) -> TokenSource:
    """A source whose tokens are all different: first, first + 1, ..."""
    sizes = np.asarray(lengths, dtype=np.int64)
    tokens = np.arange(first, first + int(sizes.sum()), dtype=np.int64)
    return TokenSource(tokens, np.cumsum(sizes) - sizes, sizes, np.ones(256, dtype=np.int64), "test")


def starts(source: TokenSource) -> set[int]:
    return {int(source.tokens[slice(int(s), int(s) + 1)][0]) for s, n in zip(source.starts, source.lengths) if n}


def assert_documents_whole(tokens: np.ndarray, first_tokens: set[int]) -> None:
    """After a BOS stands the beginning of a document (or the next BOS); every other token follows its predecessor."""
    for before, after in itertools.pairwise(tokens):
        if after != BOS:
            assert (after in first_tokens) if before == BOS else after == before + 1


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda n: sum(n) > 0)


@given(lengths=LENGTHS, length=st.integers(1, 50), batch=st.integers(1, 4), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_pack_uses_every_target_once_an_epoch(lengths: list[int], length: int, batch: int, seed: int) -> None:
    source = numbered(lengths)
    stream = TokenStream(source, BOS, seed)
    rows = PackedRows(stream, length, batch)
    for epoch in (0, 1):
        once = stream.read(epoch * stream.tokens, stream.tokens)
        assert sorted(once.tolist()) == sorted([*range(sum(lengths)), *[BOS] * len(lengths)])
        read = [rows.read_row(epoch * rows.rows + i) for i in range(rows.rows)]
        targets = np.concatenate([row[1:] for row in read])
        expected = stream.read(epoch * rows.rows * length + 1, rows.rows * length)
        assert sorted(targets.tolist()) == sorted(expected.tolist())
        for row in read:
            assert_documents_whole(row, starts(source))
    assert 0 <= rows.rows * length - stream.tokens < length


@given(lengths=LENGTHS, length=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_truncated_rows_begin_with_a_document(lengths: list[int], length: int, seed: int) -> None:
    source = numbered(lengths)
    rows = TruncatedRows(TokenStream(source, BOS, seed), length, batch=1)
    for epoch in range(3):
        seen: list[int] = []
        first = sum(len(rows.starts(e)) for e in range(epoch))
        count = len(rows.starts(epoch))
        for index in range(first, first + count):
            row = rows.read_row(index)
            assert row[0] == BOS
            assert_documents_whole(row, starts(source))
            seen += [t for t in row[1:].tolist() if t != BOS]
        assert count == 1 or len(seen) == len(set(seen))


@given(lengths=LENGTHS, length=st.integers(1, 30), batch=st.integers(1, 5), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_stream_rows_continue_and_share_out_all_text(lengths: list[int], length: int, batch: int, seed: int) -> None:
    source = numbered(lengths)
    if sum(lengths) < batch:
        with pytest.raises(DataError, match="tokens of training text for"):
            StreamRows([source], [1.0], BOS, length, batch, seed)
        return
    rows = StreamRows([source], [1.0], BOS, length, batch, seed)
    found: list[int] = []
    for row, stream in enumerate(rows.streams):
        for step in range(3):
            assert rows.read(step, row)[-1] == rows.read(step + 1, row)[0]
            assert_documents_whole(rows.read(step, row), starts(stream.source))
        for epoch in (0, 1):
            once = [t for t in stream.read(epoch * stream.tokens, stream.tokens).tolist() if t != BOS]
            found += once if epoch == 0 else []
            assert sorted(once) == sorted(set(once))
    assert sorted(found) == list(range(sum(lengths)))


def test_stream_shares_are_even_for_even_text() -> None:
    rows = StreamRows([numbered([7000])], [1.0], BOS, 16, 4, seed=0)
    assert [s.tokens for s in rows.streams] == [1751] * 4
    rows = StreamRows([numbered([100] * 80)], [1.0], BOS, 16, 4, seed=0)
    assert {s.tokens for s in rows.streams} == {2020}


def make(mode: str, batch: int, seed: int = 3, length: int = 16) -> Rows:
    small, large = numbered([5, 60, 17, 0, 33]), numbered([300, 2, 40], first=1000)
    if mode == "stream":
        return StreamRows([small, large], [1.0, 3.0], BOS, length, batch, seed)
    parts = [TokenStream(small, BOS, seed, key=0), TokenStream(large, BOS, seed, key=1)]
    if mode == "pack":
        return PackedRows(parts[0], length, batch)
    if mode == "truncate":
        return TruncatedRows(parts[0], length, batch)
    return MixedRows([PackedRows(p, length, batch) for p in parts], [1.0, 3.0], batch, seed)


MODES = ["pack", "truncate", "stream", "mixture"]


@pytest.mark.parametrize("mode", MODES)
def test_restart_at_any_step_is_exact(mode: str) -> None:
    steps, batch = 60, 4
    rows = make(mode, batch)
    whole = [np.stack([rows.read(step, row) for row in range(batch)]) for step in range(steps)]
    for start in range(steps):
        fresh = make(mode, batch)
        for step in (start, min(start + 1, steps - 1)):
            assert (np.stack([fresh.read(step, row) for row in range(batch)]) == whole[step]).all()
    jumping = make(mode, batch)
    for step in np.random.default_rng(0).integers(0, steps, 200):
        assert (jumping.read(int(step), 1) == whole[step][1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_order_depends_on_the_seed_and_the_epoch(mode: str) -> None:
    def rows(seed: int) -> list[list[int]]:
        made = make(mode, 4, seed)
        return [made.read(step, row).tolist() for step in range(8) for row in range(4)]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    stream = TokenStream(numbered([3] * 20), BOS, 0)
    assert stream.read(0, stream.tokens).tolist() != stream.read(stream.tokens, stream.tokens).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_make_the_batch_of_one(mode: str) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.byte_lengths = np.ones(BOS + 1, dtype=np.int64)
    for step in (0, 7, 31):
        one = Batches(make(mode, 4), tokenizer, 4)[step]
        two = [Batches(make(mode, 4), tokenizer, 2, rank)[step] for rank in (0, 1)]
        for name in ("tokens", "targets"):
            assert one[name].tolist() == two[0][name].tolist() + two[1][name].tolist()
        assert int(one["bytes"]) == int(two[0]["bytes"]) + int(two[1]["bytes"])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_state_is_the_number_of_batches_taken(workers: int) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.byte_lengths = np.ones(BOS + 1, dtype=np.int64)
    batches = Batches(make("mixture", 2), tokenizer, 2)
    random_state = torch.get_rng_state()
    loader = TrainLoader(batches, total=9, workers=workers)
    stream = iter(loader)
    taken = [next(stream)["tokens"].tolist() for _ in range(4)]
    assert taken == [batches[i]["tokens"].tolist() for i in range(4)]
    assert loader.state_dict() == {"position": 4}
    resumed = TrainLoader(Batches(make("mixture", 2), tokenizer, 2), total=9, workers=workers)
    resumed.load_state_dict(loader.state_dict())
    rest = [b["tokens"].tolist() for b in resumed]
    assert rest == [batches[i]["tokens"].tolist() for i in range(4, 9)]
    assert len(resumed) == 9
    assert torch.equal(torch.get_rng_state(), random_state)  # reading data must not change the dropout of a run


def test_mixture_keeps_its_shares_and_reads_each_corpus_in_turn() -> None:
    rows = make("mixture", 1)
    assert isinstance(rows, MixedRows)
    assert rows.counts.tolist() == [PERIOD // 4, PERIOD * 3 // 4]
    seen: list[list[list[int]]] = [[], []]
    for index in range(PERIOD + 50):
        part = int(rows.owners[index % PERIOD])
        seen[part].append(rows.read(index, 0).tolist())
    for part, read in enumerate(seen):
        assert read == [rows.parts[part].read_row(i).tolist() for i in range(len(read))]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), extra=st.integers(0, 50))
def test_shares_are_whole_positive_and_sum(weights: list[float], extra: int) -> None:
    counts = shares(weights, len(weights) + extra)
    assert counts.sum() == len(weights) + extra
    assert counts.min() >= 1


def test_stream_mixture_needs_a_row_for_each_corpus() -> None:
    with pytest.raises(DataError, match="1 rows for a mixture of 2"):
        make("stream", 1)
