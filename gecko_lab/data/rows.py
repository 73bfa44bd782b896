"""Which tokens stand in which row: a function of (seed, step, row) alone, so that a restart is exact.

A row is L + 1 tokens: the last one is the target of the L-th, and the first input of the row that continues it.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np

from .errors import DataError
from .source import TokenSource

ORDER, ROWS, MIX, SHARE = range(4)  # one random stream for each use
PERIOD = 4096  # rows after which a mixture's shares come out even


class Rows(Protocol):
    """``read(step, row)`` gives the (L + 1,) int64 tokens of one row of the global batch of a step."""

    def read(self, step: int, row: int) -> np.ndarray: ...


class TokenStream:
    """Documents one after another without end, each after its BOS, in an order shuffled anew every epoch.

    ``tokens`` is the length of an epoch, a BOS for every document included; any position can be read.
    """

    def __init__(
        self,
        source: TokenSource,
        bos_id: int,
        seed: int,
        documents: np.ndarray | None = None,
        key: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.source, self.bos_id, self.seed, self.key, self.shuffle = source, bos_id, seed, key, shuffle
        self.members = np.arange(source.documents) if documents is None else documents
        self.tokens = int(source.lengths[self.members].sum()) + len(self.members)
        if not len(self.members):
            raise DataError("a token stream needs at least one document")
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in this epoch's order, where each begins (documents + 1,) with its BOS)."""
        if epoch not in self._orders:
            members = self.members
            if self.shuffle:
                members = np.random.default_rng([self.seed, ORDER, self.key, epoch]).permutation(members)
            edges = np.concatenate([[0], np.cumsum(self.source.lengths[members] + 1)])
            if len(self._orders) > 1:  # a row may lie across two epochs
                del self._orders[min(self._orders, key=lambda known: abs(known - epoch) != 1)]
            self._orders[epoch] = members, edges
        return self._orders[epoch]

    def read(self, position: int, count: int) -> np.ndarray:
        """``count`` tokens (count,) int64 from a position of the endless stream."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, inner = divmod(position + filled, self.tokens)
            members, edges = self.order(epoch)
            index = int(np.searchsorted(edges, inner, side="right")) - 1
            while filled < count and index < len(members):
                offset = inner - int(edges[index])
                if offset == 0:
                    out[filled] = self.bos_id
                    filled, inner, offset = filled + 1, inner + 1, 1
                document = members[index]
                start = int(self.source.starts[document]) + offset - 1
                take = min(count - filled, int(edges[index + 1]) - inner)
                if take:
                    out[filled : filled + take] = self.source.tokens[start : start + take]
                filled, inner, index = filled + take, inner + take, index + 1
        return out


class PackedRows:
    """The stream cut into rows of L targets, the rows of an epoch in shuffled order: every target once an epoch."""

    def __init__(self, stream: TokenStream, length: int, batch: int, shuffle: bool = True) -> None:
        self.stream, self.length, self.batch, self.shuffle = stream, length, batch, shuffle
        self.rows = -(-stream.tokens // length)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def read(self, step: int, row: int) -> np.ndarray:
        return self.read_row(step * self.batch + row)

    def read_row(self, index: int) -> np.ndarray:
        """Row ``index`` of the endless sequence of rows."""
        epoch, inner = divmod(index, self.rows)
        if self.shuffle:
            if self._order[0] != epoch:
                rng = np.random.default_rng([self.stream.seed, ROWS, self.stream.key, epoch])
                self._order = epoch, rng.permutation(self.rows)
            inner = int(self._order[1][inner])
        return self.stream.read((epoch * self.rows + inner) * self.length, self.length + 1)


class TruncatedRows:
    """Rows that each begin with a document; what a row's last document has beyond the edge is dropped."""

    def __init__(self, stream: TokenStream, length: int, batch: int) -> None:
        self.stream, self.length, self.batch = stream, length, batch
        self._ends: list[int] = []  # rows up to and with each epoch; epochs differ, so they are counted in turn
        self._rows: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def starts(self, epoch: int) -> np.ndarray:
        """Positions in the epoch at which its rows begin, in the order of reading."""
        if self._rows[0] != epoch:
            edges, index = self.stream.order(epoch)[1], 0
            found: list[int] = []
            while index < len(edges) - 1 and (not found or edges[index] + self.length <= self.stream.tokens):
                found.append(int(edges[index]))
                index = int(np.searchsorted(edges, edges[index] + self.length))
            rng = np.random.default_rng([self.stream.seed, ROWS, self.stream.key, epoch])
            self._rows = epoch, rng.permutation(np.asarray(found, dtype=np.int64))
        return self._rows[1]

    def read(self, step: int, row: int) -> np.ndarray:
        return self.read_row(step * self.batch + row)

    def read_row(self, index: int) -> np.ndarray:
        """Row ``index`` of the endless sequence of rows."""
        while not self._ends or self._ends[-1] <= index:
            epoch = len(self._ends)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self.starts(epoch)))
        epoch = int(np.searchsorted(self._ends, index, side="right"))
        first = self._ends[epoch - 1] if epoch else 0
        position = epoch * self.stream.tokens + int(self.starts(epoch)[index - first])
        return self.stream.read(position, self.length + 1)


class MixedRows:
    """Rows of several corpora, every PERIOD rows in the given shares (to 1 / PERIOD) and shuffled."""

    def __init__(self, parts: list[PackedRows | TruncatedRows], weights: list[float], batch: int, seed: int) -> None:
        self.parts, self.batch = parts, batch
        self.counts = shares(weights, PERIOD)
        owners = np.repeat(np.arange(len(parts)), self.counts)
        self.owners = np.random.default_rng([seed, MIX]).permutation(owners)
        self.ranks = np.zeros(PERIOD, dtype=np.int64)  # how many earlier rows of the period have the same owner
        for part in range(len(parts)):
            mine = self.owners == part
            self.ranks[mine] = np.arange(int(mine.sum()))

    def read(self, step: int, row: int) -> np.ndarray:
        period, inner = divmod(step * self.batch + row, PERIOD)
        part = int(self.owners[inner])
        return self.parts[part].read_row(period * int(self.counts[part]) + int(self.ranks[inner]))


class StreamRows:
    """Every row of the batch reads its own share of the documents without end; step t + 1 continues step t.

    Shares are balanced by length. A document longer than a share is cut into several documents. In a mixture each
    row belongs to one corpus, and the corpora share the rows by weight.
    """

    def __init__(
        self, sources: list[TokenSource], weights: list[float], bos_id: int, length: int, batch: int, seed: int
    ) -> None:
        if batch < len(sources):
            raise DataError(
                f"data.mode=stream: {batch} rows for a mixture of {len(sources)}: a global batch needs a row for each"
            )
        self.length, self.streams = length, list[TokenStream]()
        for part, (source, rows) in enumerate(zip(sources, shares(weights, batch))):
            tokens = source.token_count
            if tokens < rows:
                raise DataError(f"data.mode=stream: {tokens} tokens of training text for {rows} rows of the batch")
            pieces = source.cut(max(-(-tokens // int(rows)), 1))
            for members in _balanced(pieces.lengths, int(rows), seed + part):
                self.streams.append(TokenStream(pieces, bos_id, seed, members, key=len(self.streams)))

    def read(self, step: int, row: int) -> np.ndarray:
        return self.streams[row].read(step * self.length, self.length + 1)


def shares(weights: list[float], total: int) -> np.ndarray:
    """Whole numbers (parts,) int64 with this sum and nearly these weights, at least one each."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        allowed = np.where((counts > 1) | (step > 0), (exact - counts) * step, -np.inf)
        counts[int(np.argmax(allowed))] += step
    return counts


def _balanced(lengths: np.ndarray, rows: int, seed: int) -> list[np.ndarray]:
    """Documents of each row: the longest first, each to the row with the least text, equal ones in random order."""
    shuffled = np.random.default_rng([seed, SHARE]).permutation(len(lengths))
    loads = [(0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for document in shuffled[np.argsort(-lengths[shuffled], kind="stable")]:
        load, row = heapq.heappop(loads)
        members[row].append(int(document))
        heapq.heappush(loads, (load + int(lengths[document]) + 1, row))
    return [np.sort(np.asarray(m, dtype=np.int64)) for m in members]
