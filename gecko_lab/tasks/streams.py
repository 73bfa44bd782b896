"""A text as long streams side by side: what is read of it at a time does not depend on its length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..data.errors import DataError
from ..data.source import TokenSource
from ..data.tokenizers import Tokenizer

BLOCK = 64  # tokens whose losses are kept as one sum; every length is a multiple of it
KINDS = ("concatenated", "reset", "whole")


class Streams:
    """``count`` rows of text, the longest first. ``lengths`` (count,) are their targets, a multiple of BLOCK.

    Row r is the sequence BOS, t0, t1, ...; from each token the next one is predicted. ``kind``:

    - concatenated: the documents one after another without a sign between them, cut into equal rows: one long text
    - reset: the same with a BOS before each document, at which the model starts afresh
    - whole: a row is one document, the longest ones are taken
    """

    def __init__(self, source: TokenSource, tokenizer: Tokenizer, kind: str, count: int, longest: int, name: str):
        """``longest``: targets of a row at most, 0: no limit. DataError for a text of less than one BLOCK a row."""
        self.source, self.tokenizer, self.kind = source, tokenizer, kind
        extra = 1 if kind == "reset" else 0
        if kind == "whole":
            self.order = np.argsort(-source.lengths, kind="stable")[:count]
            if len(self.order) < count:
                raise DataError(f"{name}: has {len(self.order)} documents, streams={count} asks for more")
            sizes = source.lengths[self.order].astype(np.int64)
        else:
            self.order = np.arange(source.documents)
            self.ends = np.cumsum(source.lengths.astype(np.int64) + extra)
            sizes = np.full(count, (int(self.ends[-1]) - extra) // count)
        if longest:
            sizes = np.minimum(sizes, longest)
        self.lengths = sizes // BLOCK * BLOCK
        self.starts = np.arange(count) * (int(sizes[0]) if kind != "whole" else 0)
        if int(self.lengths[-1]) < BLOCK:
            raise DataError(f"{name}: too little text for {count} stream(s) of at least {BLOCK} tokens")

    def alive(self, begin: int) -> int:
        """Rows that go on past ``begin``."""
        return int((self.lengths > begin).sum())

    def read(self, begin: int, width: int) -> np.ndarray:
        """(alive, width + 1) int64: the token from which each target of [begin, begin + width) is predicted, then the
        last target. A row that ends within is filled up with token 0."""
        rows = self.alive(begin)
        out = np.zeros((rows, width + 1), dtype=np.int64)
        for row in range(rows):
            stop = min(begin + width, int(self.lengths[row]))
            part = self._targets(row, max(begin - 1, 0), stop)
            if begin == 0:
                out[row, 0] = self.tokenizer.bos_id
                out[row, 1 : 1 + len(part)] = part
            else:
                out[row, : len(part)] = part
        return out

    def sizes(self, targets: np.ndarray) -> np.ndarray:
        """Bytes of text of each target."""
        return np.asarray(self.tokenizer.byte_lengths[targets])

    def _targets(self, row: int, begin: int, end: int) -> np.ndarray:
        if self.kind == "whole":
            start = int(self.source.starts[self.order[row]])
            return np.asarray(self.source.tokens[start + begin : start + end], dtype=np.int64)
        base = int(self.starts[row]) + (1 if self.kind == "reset" else 0)  # the first BOS is no target of row 0
        return self.span(base + begin, base + end)

    def span(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin .. end - 1 of all documents one after another (not of kind whole)."""
        return np.concatenate([*self._joined(begin, end), np.zeros(0, dtype=np.int64)])

    def _joined(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Tokens begin .. end - 1 of the documents one after another."""
        index = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(self.ends[index]))
            length = int(self.source.lengths[index])
            inner = begin - (int(self.ends[index]) - length)  # -1: the BOS before the document
            if inner < 0:
                yield np.asarray([self.tokenizer.bos_id], dtype=np.int64)
                begin, inner = begin + 1, 0
            if stop > begin:
                start = int(self.source.starts[index]) + inner
                yield np.asarray(self.source.tokens[start : start + stop - begin], dtype=np.int64)
            begin, index = stop, index + 1
