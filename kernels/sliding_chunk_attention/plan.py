"""Which rectangles of the (query, key) plane sliding-chunk attention computes, and how its scratch is addressed.

Positions are those of the key timeline: T keys of which the last L are also queries, its first key on a chunk
boundary. A chunk is cut into strips of rows, each computed against the keys up to its own end: the exact causal
extent up to half a strip. Strips that repeat in consecutive chunks form one batch.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

STRIPS = 2


@dataclass(frozen=True)
class Rectangle:
    """Rows [row, row + rows) against keys [key, key + keys), repeated `count` times a chunk further each time."""

    row: int
    rows: int
    key: int
    keys: int
    count: int


def strip_length(chunk: int) -> int:
    """Rows of a strip: half a chunk, in multiples of 8; small chunks are not cut."""
    return chunk if chunk < 128 else -(-chunk // (8 * STRIPS)) * 8


@lru_cache(maxsize=256)
def row_strips(first: int, end: int, chunk: int, step: int = 0) -> tuple[Rectangle, ...]:
    """The rectangles that cover every visible (query, key) pair of the rows [first, end), each row once.

    A strip has `step` rows, strip_length(chunk) where that is 0.
    """
    found = []
    for c in range(first // chunk, -(-end // chunk)):
        for row, stop in _strips(c, first, end, chunk, step):
            key = max(c - 1, 0) * chunk
            found.append(Rectangle(row, stop - row, key, stop - key, 1))
    return _batched(found, chunk)


@lru_cache(maxsize=256)
def key_strips(first: int, end: int, chunk: int, step: int = 0) -> tuple[Rectangle, ...]:
    """The same pairs by key: each key that a row of [first, end) sees lies in one rectangle, with all those rows."""
    found = []
    for c in range(max(first // chunk - 1, 0), -(-end // chunk)):
        for key, stop in _strips(c, 0, end, chunk, step):
            row, last = max(key, first), min((c + 2) * chunk, end)
            if row < last:
                found.append(Rectangle(row, last - row, key, stop - key, 1))
    return _batched(found, chunk)


def _strips(c: int, first: int, end: int, chunk: int, step: int) -> list[tuple[int, int]]:
    step, stop = step or strip_length(chunk), (c + 1) * chunk
    cuts = [(max(at, first), min(at + step, stop, end)) for at in range(c * chunk, stop, step)]
    return [(low, high) for low, high in cuts if low < high]


def _batched(found: list[Rectangle], chunk: int) -> tuple[Rectangle, ...]:
    """Merge rectangles that are shifts of one another by one chunk; the order within a chunk is kept."""
    merged: list[Rectangle] = []
    for new in found:
        for index, old in enumerate(merged):
            shift = old.count * chunk
            if new == Rectangle(old.row + shift, old.rows, old.key + shift, old.keys, 1):
                merged[index] = Rectangle(old.row, old.rows, old.key, old.keys, old.count + 1)
                break
        else:
            merged.append(new)
    return tuple(merged)


@dataclass(frozen=True)
class Band:
    """Where a matrix of the rows [first, end) keeps the entry (row, key): (row - first) * 2 * chunk + key - base.

    Both indices are linear, so that a rectangle spanning a chunk boundary is still one strided matrix, by rows and
    by keys, and no two rows overlap.
    """

    first: int
    end: int
    chunk: int

    @property
    def base(self) -> int:
        return max(self.first // self.chunk - 1, 0) * self.chunk

    @property
    def numel(self) -> int:
        return -(-((self.end - self.first) * 2 * self.chunk + self.end - self.base) // 8) * 8

    @property
    def step(self) -> int:
        """From an entry to the one a chunk further along both indices."""
        return 2 * self.chunk * self.chunk + self.chunk

    def offset(self, r: Rectangle) -> int:
        return (r.row - self.first) * 2 * self.chunk + r.key - self.base

    def view(self, buffer: Tensor, r: Rectangle) -> Tensor:
        """Rectangle of buffer (B, H, numel): (B, H, count, rows, keys)."""
        return buffer.as_strided(
            (*buffer.shape[:2], r.count, r.rows, r.keys),
            (*buffer.stride()[:2], self.step, 2 * self.chunk, 1),
            buffer.storage_offset() + self.offset(r),
        )


def window(x: Tensor, start: int, length: int, count: int, chunk: int) -> Tensor:
    """Rows [start, start + length) of x (B, T, H, S), `count` times a chunk further: (B, H, count, length, S)."""
    b, t, h, s = x.stride()
    shape = (x.shape[0], x.shape[2], count, length, x.shape[3])
    return x.as_strided(shape, (b, h, chunk * t, t, s), x.storage_offset() + start * t)
