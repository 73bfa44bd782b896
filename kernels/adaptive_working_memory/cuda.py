"""Adaptive working memory on the GPU (spec 5): what is supported, the carried state, the gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sliding_chunk_attention.documents import document_starts
from ..types import MemoryState
from . import chain, rows, tiles
from . import fused as fused  # registers the operators

KERNELS = (*rows.MODULES, *chain.MODULES, *tiles.MODULES)
SMALL_HEAD = 8192  # table entries of a head up to which products are float32, as tensor cores would gain nothing
_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(
    aq: Tensor,
    ak: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: MemoryState | None = None,
    lag: int = 2,
) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    if aq.dtype not in _DTYPES and not torch.is_autocast_enabled(aq.device.type):
        return f"aq.dtype={aq.dtype}: the kernels take bfloat16 and float32"
    if aq.shape[3] > rows.LARGEST_HEAD:
        return f"S={aq.shape[3]}: the kernels take at most {rows.LARGEST_HEAD} key features a head"
    if aq.numel() == 0 or v.numel() == 0:
        return f"aq {tuple(aq.shape)}, v {tuple(v.shape)}: the kernels need at least one element"
    return None


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
    """Reads y (B, L, H, E) of a table written by the chunks at least `lag` before the reader's, and the state.

    aq, ak (B, L, H, S), v (B, L, H, E); segments (B, L) int64, never decreasing. Sums and table are float32.
    """
    if torch.is_autocast_enabled(aq.device.type):
        dtype = torch.get_autocast_dtype(aq.device.type)
        aq, ak, v = aq.to(dtype), ak.to(dtype), v.to(dtype)
    elif ak.dtype != aq.dtype or v.dtype != aq.dtype:
        ak, v = ak.to(aq.dtype), v.to(aq.dtype)
    kept = v.dtype
    if aq.shape[3] * v.shape[3] <= SMALL_HEAD:
        aq, ak, v = aq.float(), ak.float(), v.float()
    batch, length, _, _ = aq.shape
    position = 0 if state is None else state.position
    offset, stop = position % chunk, position + length
    parts = _chunk_sums(ak, v, segments, state, chunk)
    lam, mix, target, ends = _joined(parts)
    if state is None:
        folds, skip = max(stop // chunk - lag + 1, 0), lag
        before = ends.new_full((batch, 1), -1)
    else:
        folds, skip = stop // chunk - position // chunk, 0
        before = state.owner[:, None]
    owners = torch.cat((before, ends[:, :folds]), 1)
    keep = (owners[:, 1:] == owners[:, :-1]).to(torch.float32).contiguous()
    live = None
    if segments is not None or state is not None:
        ids = state.current[:, None].expand(batch, length) if segments is None else segments  # type: ignore[union-attr]
        steps = torch.arange(offset, offset + length, device=aq.device) // chunk - (lag - 1 if state is None else 0)
        live = (owners[:, steps.clamp(min=0)] == ids).contiguous()
    y, table, logz, _, _ = _Table.apply(
        aq,
        lam,
        mix,
        target,
        keep,
        None if state is None else state.table.float(),
        None if state is None else state.logz.float(),
        live,
        chunk,
        offset,
        skip,
    )
    if segments is None:
        current = ends.new_zeros(batch) if state is None else state.current.clone()
    else:
        current = segments[:, -1].clone()
    rest = (lam[:, :, folds:], mix[:, :, folds:], target[:, :, folds:], ends[:, folds:])
    lam, mix, target, ends = _padded(rest, lag, stop % chunk == 0)
    return y.to(kept), MemoryState(table, logz, owners[:, -1], lam, mix, target, ends, current, stop)


Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # lam, mix, target (B, H, N, ...) and ends (B, N)


def _chunk_sums(ak: Tensor, v: Tensor, segments: Tensor | None, state: MemoryState | None, chunk: int) -> list[Sums]:
    """The sums of the queued chunks, of the one that was open, of the whole ones and of the one left open."""
    batch, length = ak.shape[:2]
    head = 0 if state is None else min(length, -state.position % chunk)
    whole = (length - head) // chunk
    sizes = [size for size in (head, whole * chunk, length - head - whole * chunk) if size]
    starts = None if segments is None else document_starts(segments)
    parts: list[Sums] = []
    held: Any = None
    if state is not None:
        held = (*(x.transpose(1, 2).float() for x in (state.lam, state.mix, state.target)), state.ends)
        parts.append((*(x[:, :, :-1] for x in held[:3]), held[3][:, :-1]))
    at = 0
    # the derivative of a split into one piece would be a copy
    pieces = [(ak, v)] if len(sizes) == 1 else zip(ak.split(sizes, 1), v.split(sizes, 1))
    for keys, values in pieces:
        size = keys.shape[1]
        chunks = max(size // chunk, 1)
        last = torch.arange(1, chunks + 1, device=ak.device) * (size // chunks) - 1
        if segments is None or starts is None:
            first = None
            ends = last.new_zeros((batch, chunks)) if state is None else state.current[:, None].expand(-1, chunks)
        else:
            first = (starts[:, at + last] - (at + last + 1 - size // chunks)).clamp(min=0).to(torch.int32).contiguous()
            ends = segments[:, at + last]
        new: Sums = (*_Sums.apply(keys, values, first, chunks), ends)
        parts.append(_merge(held, new) if at == 0 and head and held is not None else new)
        at += size
    return parts


def _merge(held: Sums, new: Sums) -> Sums:
    """The open chunk's sums so far, forgotten where another document has begun, with those of its further tokens."""
    same = (held[3][:, -1:] == new[3])[:, None, :, None]
    before = torch.where(same, held[0][:, :, -1:], rows.NOTHING)
    lam = torch.logaddexp(before, new[0])
    share, rest = (before - lam).exp()[..., None], (new[0] - lam).exp()[..., None]
    mix, target = (share * old[:, :, -1:] + rest * late for old, late in zip(held[1:3], new[1:3]))
    return lam, mix, target, new[3]


def _joined(parts: list[Sums]) -> Sums:
    if len(parts) == 1:
        return parts[0]
    lam, mix, target = (torch.cat([part[i] for part in parts], 2) for i in range(3))
    return lam, mix, target, torch.cat([part[3] for part in parts], 1)


def _padded(sums: Sums, lag: int, closed: bool) -> Sums:
    """(B, lag, ...): the chunks not folded yet, blanks before them, and a blank last where no chunk is open."""
    lam, mix, target, ends = sums
    after = int(closed)
    before = lag - after - lam.shape[2]
    lam, mix, target = (x.transpose(1, 2) for x in (lam, mix, target))

    def pad(x: Tensor, blank: float) -> Tensor:
        size = lambda n: (x.shape[0], n, *x.shape[2:])
        return torch.cat((x.new_full(size(before), blank), x, x.new_full(size(after), blank)), 1)

    return pad(lam, rows.NOTHING), pad(mix, 0.0), pad(target, 0.0), pad(ends, -1)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ak: Tensor, v: Tensor, first: Tensor | None, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        lam, mix, target = torch.ops.gecko_lab.memory_sums(ak, v, first, chunks)
        ctx.save_for_backward(ak, v, lam, mix, target, first)
        return lam, mix, target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlam: Tensor, dmix: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.gecko_lab.memory_sums_backward(dlam, dmix, dtarget, *ctx.saved_tensors), None, None


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        aq: Tensor,
        lam: Tensor,
        mix: Tensor,
        target: Tensor,
        keep: Tensor,
        table: Tensor | None,
        logz: Tensor | None,
        live: Tensor | None,
        *layout: int,
    ) -> tuple[Tensor, ...]:
        out = torch.ops.gecko_lab.memory_table(aq, lam, mix, target, keep, table, logz, live, *layout)
        ctx.save_for_backward(aq, mix, keep, *out[3:], live)
        ctx.layout, ctx.entering, ctx.width = layout, table is not None, target.shape[4]
        ctx.mark_non_differentiable(*out[3:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dlast: Tensor | None, dlogz: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        aq, mix, keep, rho, tables, live = ctx.saved_tensors
        if dy is None:
            dy = aq.new_zeros((*aq.shape[:3], ctx.width))
        daq, dlam, dmix, dtarget, dtable, dlogz0 = torch.ops.gecko_lab.memory_table_backward(
            dy.contiguous(), dlast, dlogz, aq, mix, keep, rho, tables, live, *ctx.layout
        )
        state = (dtable, dlogz0) if ctx.entering else (None, None)
        return daq, dlam, dmix, dtarget, None, *state, None, *(None for _ in ctx.layout)
