"""Forward and backward of sliding-chunk attention as two opaque operators: cuBLAS products and the row kernels.

`q` (B, L, H, S) are the last L rows of the timeline of k (B, T, H, S) and v (B, T, H, E), whose first key lies on a
chunk boundary. Logits and their gradients are float32 and live for one strip; weights are in the dtype of the inputs
and live for one group. A group is some heads and rows, so that scratch stays below BUDGET bytes; only the
log-sum-exp (B, H, L) outlives the forward. On sm_90a the kernels of tiles.py make the weights without strips.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..products import product
from . import rows, tiles
from .plan import Band, Rectangle, key_strips, row_strips, strip_length, window

BUDGET = 270_000_000

_library = torch.library.Library("gecko_lab", "FRAGMENT")
_library.define(
    "sliding_chunk_attention(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? seed, int chunk, float dropout) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "sliding_chunk_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? y, Tensor lse, Tensor? starts, "
    "Tensor? seed, int chunk, float dropout) -> (Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Group:
    """Batch rows [b, b + batch), heads [h, h + heads) and timeline rows [first, end)."""

    b: int
    batch: int
    h: int
    heads: int
    band: Band

    @property
    def strips(self) -> tuple[Rectangle, ...]:
        return row_strips(self.band.first, self.band.end, self.band.chunk)

    def of(self, x: Tensor) -> Tensor:
        return x[self.b : self.b + self.batch, :, self.h : self.h + self.heads]


def groups(q: Tensor, k: Tensor, chunk: int, bands: int, strips: bool = True) -> Iterator[Group]:
    """Cut the work so that `bands` matrices of weights, and as many strips of float32 scores, fit into BUDGET."""
    batch, length, heads, _ = q.shape
    total = k.shape[1]
    row = 2 * chunk * bands * (q.element_size() + (4 * strip_length(chunk) / chunk if strips else 0))
    items = max(int(BUDGET / (row * chunk)), 1)
    first, chunks = total - length, -(-total // chunk) - (total - length) // chunk
    per_head = min(items, chunks)
    # rows of the batch first: with the heads apart, fewer of cuBLAS's calls have to be split
    group_batch = min(max(items // chunks, 1), batch)
    group_heads = min(max(items // (chunks * batch), 1), heads)
    cuts = [first, *range((first // chunk + per_head) * chunk, total, per_head * chunk), total]
    for b in range(0, batch, group_batch):
        for h in range(0, heads, group_heads):
            for low, high in pairwise(cuts):
                yield Group(b, min(group_batch, batch - b), h, min(group_heads, heads - h), Band(low, high, chunk))


class _Scratch:
    """Memory of the largest group, taken again by each: `bands` matrices of weights, then `strips` in float32."""

    def __init__(self, found: list[Group], like: Tensor, bands: int, strips: int) -> None:
        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        items = [group.batch * group.heads for group in found]
        most = max(n * group.band.numel for n, group in zip(items, found))
        self.bands = [empty(most, like.dtype) for _ in range(bands)]
        most = max(n * r.count * r.rows * _round(r.keys) for n, group in zip(items, found) for r in group.strips)
        self.strips = [empty(most, torch.float32) for _ in range(strips)]

    def band(self, group: Group) -> list[Tensor]:
        """(gB, gH, numel) each, uninitialised."""
        shape = (group.batch, group.heads, group.band.numel)
        return [x[: torch.Size(shape).numel()].view(shape) for x in self.bands]

    def strip(self, group: Group, r: Rectangle) -> list[Tensor]:
        """(gB, gH, count, rows, keys) each in rows of a multiple of 4, uninitialised."""
        shape = (group.batch, group.heads, r.count, r.rows, _round(r.keys))
        return [x[: torch.Size(shape).numel()].view(shape) for x in self.strips]


def _round(keys: int) -> int:
    return -(-keys // 4) * 4


def _into(scratch: Tensor, r: Rectangle, a: Tensor, b: Tensor) -> None:
    product(scratch[..., : r.keys], a, b.transpose(-1, -2))


def _windows(offset: int, chunk: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The rows of a rectangle in tensors of the L queries, and its keys in tensors of the T keys."""
    return (
        lambda x, r: window(x, r.row - offset, r.rows, r.count, chunk),
        lambda x, r: window(x, r.key, r.keys, r.count, chunk),
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, seed: Tensor | None, chunk: int, dropout: float
) -> tuple[Tensor, Tensor]:
    (batch, length, heads, _), total = q.shape, k.shape[1]
    y = torch.empty((batch, length, heads, v.shape[3]), dtype=v.dtype, device=v.device)
    at = rows.Rows(starts, seed, dropout, chunk, length, total, heads)
    queries, keys = _windows(total - length, chunk)
    by_tiles = tiles.serves(q, k, v, chunk)
    if by_tiles:
        lse = tiles.row_norms(q, k, at)
    else:
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    found = list(groups(q, k, chunk, 1, not by_tiles))
    scratch = _Scratch(found, q, 1, 0 if by_tiles else 1)
    for group in found:
        (weights,) = scratch.band(group)
        gq, gk, gv, gy = (group.of(x) for x in (q, k, v, y))
        if by_tiles:
            tiles.weights(q, k, weights, lse, at, group.band, group.b, group.h)
        for r in group.strips:
            if not by_tiles:
                (scores,) = scratch.strip(group, r)
                _into(scores, r, queries(gq, r), keys(gk, r))
                rows.softmax_rows(scores, weights, lse, at, r, group.band, group.b, group.h)
            product(queries(gy, r), group.band.view(weights, r), keys(gv, r))
    return y, lse


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor | None,
    lse: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    chunk: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (_, length, heads, _), total = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    at = rows.Rows(starts, seed, dropout, chunk, length, total, heads)
    queries, keys = _windows(total - length, chunk)
    delta = tiles.row_products(dy, y) if y is not None else None
    found = list(groups(q, k, chunk, 2, delta is None))
    scratch = _Scratch(found, q, 2, 2 if delta is None else 0)
    for group in found:
        band = group.band
        weights, dscores = scratch.band(group)
        gdy, gq, gk, gv, gdq, gdk, gdv = (group.of(x) for x in (dy, q, k, v, dq, dk, dv))
        if delta is not None:
            tensors = q, k, dy, v
            tiles.weights_and_gradient(tensors, weights, dscores, (lse, delta), at, band, group.b, group.h)
        else:
            for r in group.strips:
                scores, dweights = scratch.strip(group, r)
                _into(scores, r, queries(gq, r), keys(gk, r))
                _into(dweights, r, queries(gdy, r), keys(gv, r))
                rows.softmax_rows_backward(scores, dweights, weights, dscores, lse, at, r, band, group.b, group.h)
        # the tile kernel writes the zeros of whole chunks, and these products are too narrow to be cut
        whole = chunk if delta is not None else 0
        for r in row_strips(band.first, band.end, chunk, whole):
            product(queries(gdq, r), band.view(dscores, r), keys(gk, r))
        # earlier groups have written the keys before this one
        started = band.first if band.first > total - length else 0
        for out, left, right, step in ((gdv, weights, gdy, 0), (gdk, dscores, gq, whole)):
            for r in key_strips(band.first, band.end, chunk, step):
                product(keys(out, r), band.view(left, r).transpose(-1, -2), queries(right, r), add=r.key < started)
    return dq, dk, dv


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, seed: Tensor | None, chunk: int, dropout: float
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return v.new_empty((batch, length, heads, v.shape[3])), q.new_empty((batch, heads, length), dtype=torch.float32)


def _fake_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor | None,
    lse: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    chunk: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _device in ("CPU", "CUDA"):
    _library.impl("sliding_chunk_attention", _forward, _device)
    _library.impl("sliding_chunk_attention_backward", _backward, _device)
torch.library.register_fake("gecko_lab::sliding_chunk_attention", _fake_forward, lib=_library)
torch.library.register_fake("gecko_lab::sliding_chunk_attention_backward", _fake_backward, lib=_library)
