"""Causal attention over the own and the previous chunk in plain PyTorch (spec 4.2 to 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import AttentionState

GROUP_ELEMENTS = 2**25  # logits computed at a time; bounds the peak where nothing is kept for backward
MASKED = -1e30  # finite, so that a row without any key gives no NaN


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T) v over the visible keys, in q's dtype: q (..., Lq, S), k (..., Lk, S), v (..., Lk, E)."""
    if dropout:
        visible = visible & (torch.rand(*q.shape[:-1], k.shape[-2], device=q.device) >= dropout)
    weights = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~visible, MASKED), -1)
    if dropout:
        weights = weights.masked_fill(~visible, 0)  # a row whose keys were all dropped gives 0
    return weights @ v


def visible_keys(queries: Tensor, keys: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
    """(1 or rows, 1, Lq, Lk): keys not later than the query and of its document. Positions (Lq,), (Lk,)."""
    causal = (keys <= queries[:, None])[None, None]
    if query_ids is None or key_ids is None:
        return causal
    return causal & (query_ids[:, None, :, None] == key_ids[:, None, None, :])


def sliding_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: AttentionState | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, AttentionState]:
    batch, length, heads, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    start = 0 if state is None else state.position
    held = 0 if state is None else state.k.shape[1]
    if state is not None:
        segments = _joined_segments(state, segments, length)
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
    first = start - held  # position of the first key
    keys, values = (t.to(acc).transpose(1, 2) for t in (k, v))
    queries = q.to(acc).transpose(1, 2)

    def single(begin: int, end: int) -> Tensor:
        """Queries at positions [begin, end) of one chunk."""
        seen = slice(max(begin // chunk - 1, 0) * chunk - first, end - first)
        rows = slice(begin - start, end - start)
        steps = torch.arange(end - first, device=q.device)
        ids = None if segments is None else segments[:, begin - first : end - first]
        near = None if segments is None else segments[:, seen]
        visible = visible_keys(steps[begin - first :], steps[seen], ids, near)
        return attend(queries[:, :, rows], keys[:, :, seen], values[:, :, seen], visible, dropout)

    def several(begin: int, count: int) -> Tensor:
        """Queries of ``count`` whole chunks from position begin, each with a whole chunk before it."""
        back = begin - chunk - first

        def windows(t: Tensor) -> Tensor:
            cells = t[:, :, back : back + (count + 1) * chunk].unflatten(2, (count + 1, chunk))
            return torch.cat([cells[:, :, :-1], cells[:, :, 1:]], 3).transpose(1, 2).flatten(0, 1)

        own = queries[:, :, begin - start : begin - start + count * chunk].unflatten(2, (count, chunk))
        steps = torch.arange(2 * chunk, device=q.device)
        ids = near = None
        if segments is not None:
            cells = segments[:, back : back + (count + 1) * chunk].unflatten(1, (count + 1, chunk))
            ids, near = cells[:, 1:].flatten(0, 1), torch.cat([cells[:, :-1], cells[:, 1:]], 2).flatten(0, 1)
        visible = visible_keys(steps[chunk:], steps, ids, near)
        out = attend(own.transpose(1, 2).flatten(0, 1), windows(keys), windows(values), visible, dropout)
        return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)

    most = max(1, GROUP_ELEMENTS // (2 * chunk * chunk * heads * batch))
    outputs, position, stop = [], start, start + length
    while position < stop:
        whole = 0 if position % chunk or position < chunk else (stop - position) // chunk
        if whole:
            count = min(whole, most)
            outputs.append(several(position, count))
            position += count * chunk
        else:
            end = min(stop, (position // chunk + 1) * chunk)
            outputs.append(single(position, end))
            position = end
    y = torch.cat(outputs, 2).transpose(1, 2).to(v.dtype)

    kept = slice(max(stop // chunk - 1, 0) * chunk - first, None)
    # clones: a view would keep the keys of the whole call alive
    tail = None if segments is None else segments[:, kept].clone()
    return y, AttentionState(k[:, kept].clone(), v[:, kept].clone(), tail, stop)


def _joined_segments(state: AttentionState, segments: Tensor | None, length: int) -> Tensor | None:
    """Ids of the held keys and the new ones: None continues the open document; a stream without ids was document 0."""
    if segments is None:
        return (
            None
            if state.segments is None
            else torch.cat([state.segments, state.segments[:, -1:].expand(-1, length)], 1)
        )
    before = state.segments
    if before is None:
        before = torch.zeros(state.k.shape[:2], dtype=torch.int64, device=state.k.device)
    return torch.cat([before, segments], 1)
