"""Sliding-chunk attention on the GPU (spec 4): what is supported, the carried state, the gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import AttentionState
from . import fused as fused  # registers the operators
from . import rows, tiles
from .documents import document_starts

KERNELS = (*rows.MODULES, *tiles.MODULES)
SPILL_BUDGET = 64  # bytes: a few registers around the wgmma loop, and of the float32 row kernel on sm_120
_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: AttentionState | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    if q.dtype not in _DTYPES and not torch.is_autocast_enabled(q.device.type):
        return f"q.dtype={q.dtype}: the kernels take bfloat16 and float32"
    if chunk > rows.LARGEST_CHUNK:
        return f"chunk={chunk}: the kernels take at most {rows.LARGEST_CHUNK}"
    if q.numel() == 0 or v.numel() == 0:
        return f"q {tuple(q.shape)}, v {tuple(v.shape)}: the kernels need at least one element"
    return None


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
    """Causal attention to the query's own chunk and the one before it, y (B, L, H, E), and the keys to carry.

    q, k (B, L, H, S) and v (B, L, H, E), scaled and rotated by the caller; segments (B, L) int64, never decreasing;
    dropout is the probability that a (query, key) logit is dropped (spec 4.3). Only the arguments and the
    log-sum-exp are kept for the backward pass.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    elif k.dtype != q.dtype or v.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    position = 0 if state is None else state.position
    if state is not None:
        segments = _continued(state, segments, q)
        k, v = torch.cat((state.k.to(k.dtype), k), 1), torch.cat((state.v.to(v.dtype), v), 1)
    starts = None if segments is None else document_starts(segments)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout > 0 else None
    y = _Attention.apply(q, k, v, starts, seed, chunk, dropout)
    position += q.shape[1]
    return y, _carried(k, v, segments, position, chunk)


def _continued(state: AttentionState, segments: Tensor | None, q: Tensor) -> Tensor | None:
    """Segments of the kept and the new tokens; without ids a stream is one document, which goes on."""
    if state.segments is None and segments is None:
        return None
    old = q.new_zeros(state.k.shape[:2], dtype=torch.int64) if state.segments is None else state.segments
    new = old[:, -1:].expand(q.shape[:2]) if segments is None else segments
    return torch.cat((old, new), 1)


def _carried(k: Tensor, v: Tensor, segments: Tensor | None, position: int, chunk: int) -> AttentionState:
    """Everything since the start of the chunk before the one that `position` is in."""
    keep = position - max(position // chunk - 1, 0) * chunk
    k, v = k[:, -keep:], v[:, -keep:]
    segments = None if segments is None else segments[:, -keep:]
    if not torch.is_grad_enabled():  # a stream would otherwise keep the whole piece alive
        k, v = k.clone(), v.clone()
    return AttentionState(k, v, segments, position)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor | None,
        seed: Tensor | None,
        chunk: int,
        dropout: float,
    ) -> Tensor:
        y, lse = torch.ops.gecko_lab.sliding_chunk_attention(q, k, v, starts, seed, chunk, dropout)
        kept = y if tiles.serves(q, k, v, chunk) else None
        ctx.save_for_backward(q, k, v, kept, lse, starts, seed)
        ctx.chunk, ctx.dropout = chunk, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, starts, seed = ctx.saved_tensors
        dq, dk, dv = torch.ops.gecko_lab.sliding_chunk_attention_backward(
            dy.contiguous(), q, k, v, y, lse, starts, seed, ctx.chunk, ctx.dropout
        )
        return dq, dk, dv, None, None, None, None
