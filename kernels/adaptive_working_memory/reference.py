"""Adaptive working memory in plain PyTorch (spec 5), online and affine in the table.

A chunk acts on the table M only through three sums over its tokens, lam = logsumexp_t ak, P = W Q and B = W V:
    M' = M - rho (M + P M) + rho B,   rho = exp(lam - logaddexp(lam, ell)).
Two parts of a chunk merge as B = e^(lam1 - lam) B1 + e^(lam2 - lam) B2 (P likewise), lam = logaddexp(lam1, lam2), so an
open chunk needs no token buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import MemoryState

NOTHING = -1e30  # logarithm of an empty sum


class Sums(NamedTuple):
    """Chunk sums lam (..., H, S), mix (..., H, S, S), target (..., H, S, E), and the document ``ends`` (...)."""

    lam: Tensor
    mix: Tensor
    target: Tensor
    ends: Tensor


def chunk_sums(ak: Tensor, v: Tensor, segments: Tensor) -> Sums:
    """Over the tokens of the last document: ak (..., T, H, S), v (..., T, H, E) in the accumulation dtype,
    segments (..., T)."""
    ends = segments[..., -1]
    used = (segments == ends[..., None])[..., None, None]
    keys = ak.masked_fill(~used, NOTHING).movedim(-3, -1)  # (..., H, S, T)
    lam = keys.logsumexp(-1)
    over_time = (keys - lam[..., None]).exp()
    over_features = ak.softmax(-1).movedim(-3, -2)
    return Sums(lam, over_time @ over_features, over_time @ v.movedim(-3, -2), ends)


def merge(early: Sums, late: Sums) -> Sums:
    """Of two parts of one chunk; an early part of another document is forgotten."""
    same = (early.ends == late.ends)[..., None, None]
    before = early.lam.masked_fill(~same, NOTHING)
    lam = torch.logaddexp(before, late.lam)
    share, rest = (before - lam).exp()[..., None], (late.lam - lam).exp()[..., None]
    return Sums(lam, share * early.mix + rest * late.mix, share * early.target + rest * late.target, late.ends)


def fold(table: Tensor, logz: Tensor, owner: Tensor, part: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The table after a completed chunk, reset when the chunk ends in another document than the table's."""
    other = (part.ends != owner)[:, None, None]
    table, logz = table.masked_fill(other[..., None], 0), logz.masked_fill(other, NOTHING)
    total = torch.logaddexp(part.lam, logz)
    rho = (part.lam - total).exp()[..., None]
    return table + rho * (part.target - table - part.mix @ table), total, part.ends


def read(aq: Tensor, table: Tensor, segments: Tensor, owner: Tensor) -> Tensor:
    """softmax(aq)^T M, 0 for tokens of other documents: aq (..., T, H, S), table (..., H, S, E) -> (..., T, H, E)."""
    weights = aq.softmax(-1) * (segments == owner[..., None])[..., None, None]
    return (weights.movedim(-3, -2) @ table).movedim(-3, -2)


def empty_state(aq: Tensor, v: Tensor, lag: int) -> MemoryState:
    batch, _, heads, features = aq.shape
    width = v.shape[-1]
    new = torch.promote_types(aq.dtype, torch.float32)

    def full(value: float, *sizes: int) -> Tensor:
        return torch.full((batch, *sizes), value, dtype=new, device=aq.device)

    none = torch.full((batch, lag), -1, dtype=torch.int64, device=aq.device)
    return MemoryState(
        table=full(0.0, heads, features, width),
        logz=full(NOTHING, heads, features),
        owner=none[:, 0],
        lam=full(NOTHING, lag, heads, features),
        mix=full(0.0, lag, heads, features, features),
        target=full(0.0, lag, heads, features, width),
        ends=none,
        current=torch.zeros_like(none[:, 0]),
        position=0,
    )


def state_from_chunk(
    table: Tensor,
    logz: Tensor,
    ak: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    owner: Tensor | None = None,
    position: int | None = None,
) -> MemoryState:
    """State with lag 2 at a chunk boundary, from the table, its log normaliser and the tokens of the chunk before.

    table (B, H, S, E), logz (B, H, S), ak (B, C, H, S), v (B, C, H, E), segments (B, C), owner (B,); None: all one
    document. position: a multiple of C, at least 2C where the table holds anything (the default). Differentiable.
    """
    batch, chunk = ak.shape[:2]
    new = torch.promote_types(ak.dtype, torch.float32)
    if segments is None:
        segments = torch.zeros(batch, chunk, dtype=torch.int64, device=ak.device)
    position = 2 * chunk if position is None else position
    if position < chunk or position % chunk:
        raise ValueError(f"position is {position}; it must be a positive multiple of the chunk, {chunk}")
    blank = empty_state(ak, v, 1)
    sums = chunk_sums(ak.to(new), v.to(new), segments)
    return MemoryState(
        table=table.to(new),
        logz=logz.to(new).clamp(min=NOTHING),
        owner=segments[:, -1] if owner is None else owner,
        lam=torch.cat([sums.lam[:, None], blank.lam], 1),
        mix=torch.cat([sums.mix[:, None], blank.mix], 1),
        target=torch.cat([sums.target[:, None], blank.target], 1),
        ends=torch.cat([sums.ends[:, None], blank.ends], 1),
        current=segments[:, -1],
        position=position,
    )


def adaptive_working_memory(
    aq: Tensor,
    ak: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: MemoryState | None = None,
    lag: int = 2,
) -> tuple[Tensor, MemoryState]:
    length = aq.shape[1]
    new = torch.promote_types(aq.dtype, torch.float32)
    if state is None:
        state = empty_state(aq, v, lag)
    if segments is None:
        segments = state.current[:, None].expand(-1, length)
    queries, keys, values = (t.to(new) for t in (aq, ak, v))

    # pieces of the call: (tokens, chunks) of the rest of an open chunk, of whole chunks, of a new open chunk
    head = min(length, -state.position % chunk)
    whole = (length - head) // chunk
    tail = length - head - whole * chunk
    pieces = [(head, 1), (whole * chunk, whole), (tail, 1)]

    def cut(t: Tensor) -> list[Tensor]:
        """(B, L, ...) -> one (B, chunks, T, ...) a piece that has tokens."""
        parts = t.split([size for size, _ in pieces], 1)
        return [part.unflatten(1, (n, -1)) for part, (size, n) in zip(parts, pieces) if size]

    held = Sums(state.lam, state.mix, state.target, state.ends)
    sums: list[Sums] = []  # of the chunks from ``oldest`` on, each leaf (B, ...)
    sums += [Sums(*(leaf[:, i] for leaf in held)) for i in range(lag - 1)]
    ids = cut(segments)
    for ks, vs, seg in zip(cut(keys), cut(values), ids):
        part = chunk_sums(ks, vs, seg)
        sums += [Sums(*leaves) for leaves in zip(*(leaf.unbind(1) for leaf in part))]
    if state.position % chunk:
        sums[lag - 1] = merge(Sums(*(leaf[:, -1] for leaf in held)), sums[lag - 1])

    now = state.position // chunk
    oldest = now - (lag - 1)
    stop = state.position + length
    table, logz, owner = state.table, state.logz, state.owner
    tables, owners = [table], [owner]
    for following in range(now + 1, stop // chunk + 1):
        folded = following - lag
        if folded >= 0:
            table, logz, owner = fold(table, logz, owner, sums[folded - oldest])
        tables.append(table)
        owners.append(owner)

    outputs, index = [], 0
    for q, seg in zip(cut(queries), ids):
        n = q.shape[1]
        here = slice(index, index + n)
        outputs.append(read(q, torch.stack(tables[here], 1), seg, torch.stack(owners[here], 1)).flatten(1, 2))
        index += n
    y = torch.cat(outputs, 1).to(v.dtype)

    if stop % chunk == 0:
        nothing = empty_state(aq, v, 1)
        sums.append(Sums(*(leaf[:, 0] for leaf in (nothing.lam, nothing.mix, nothing.target, nothing.ends))))
    lam, mix, target, ends = (torch.stack(leaves, 1) for leaves in zip(*sums[-lag:]))
    return y, MemoryState(table, logz, owner, lam, mix, target, ends, segments[:, -1].clone(), stop)
