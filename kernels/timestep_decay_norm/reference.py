"""Timestep decay norm in plain PyTorch (spec 1.2): both moving averages as masked triangular products, no loops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import NormState

BLOCK = 64  # steps per triangular product


def running_sums(value: Tensor, start: Tensor, beta: float, segments: Tensor | None) -> Tensor:
    """s_t = beta s_{t-1} + value_t, restarted where segments change.

    value (B, L, G), start (B, G) the sum before the first step (it belongs to segment 0), segments (B, L) -> (B, L, G).
    Blocks of steps at once; what passes from block to block is again such a sum, over the ends of blocks.
    """
    batch, length, groups = value.shape
    size = min(BLOCK, length)
    count = -(-length // size)
    blocks = F.pad(value, (0, 0, 0, count * size - length)).view(batch, count, size, groups)
    steps = torch.arange(size, device=value.device)
    lag = steps[:, None] - steps
    # powers in float64: float32 would round beta itself
    weights = torch.where(lag >= 0, torch.pow(beta, lag.clamp(min=0).double()), 0.0).to(value.dtype)
    fade = torch.pow(beta, steps.double() + 1).to(value.dtype)[:, None]
    ends = None
    if segments is not None:
        ids = F.pad(segments, (0, count * size - length)).view(batch, count, size)
        ends = ids[:, :-1, -1]
        entering = F.pad(ends, (1, 0))
        weights = weights * (ids[..., :, None] == ids[..., None, :])
        fade = fade * (ids == entering[..., None])[..., None]
    sums = weights @ blocks
    before = start[:, None]
    if count > 1:
        before = torch.cat([before, running_sums(sums[:, :-1, -1], start, beta**size, ends)], 1)
    return (sums + fade * before[:, :, None]).flatten(1, 2)[:, :length]


def steps_since_bos(length: int, count: Tensor, bos: Tensor | None) -> Tensor:
    """(B, L) int64: steps of the document read up to and with each step; count (B,) those before the call."""
    steps = torch.arange(1, length + 1, device=count.device)
    carried = count[:, None] + steps
    if bos is None:
        return carried
    started = torch.where(bos, steps, 0).cummax(1).values
    return torch.where(started > 0, steps - started + 1, carried)


def timestep_decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    beta1: float,
    beta2: float,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    batch, length, dim = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    cells = x.to(acc).view(batch, length, groups, dim // groups)
    mu = cells.mean(-1)
    s2 = (cells - mu[..., None]).square().mean(-1)
    if state is None:
        zero = mu.new_zeros(batch, groups)
        state = NormState(torch.zeros(batch, dtype=torch.int64, device=x.device), zero, zero)
    segments = None if bos is None else bos.to(torch.int64).cumsum(1)
    count = steps_since_bos(length, state.count, bos)
    mean = running_sums((1 - beta1) * mu, state.mean.to(acc), beta1, segments)
    var = running_sums((1 - beta2) * s2, state.var.to(acc), beta2, segments)
    unbias1, unbias2 = (-torch.expm1(count.double() * math.log(beta))[..., None] for beta in (beta1, beta2))
    centre = mean / unbias1.to(acc)
    scale = torch.rsqrt(var / unbias2.to(acc) + eps)
    y = ((cells - centre[..., None]) * scale[..., None]).view(batch, length, dim)
    y = y * (1 + weight.to(acc)) + bias.to(acc)
    return y.to(x.dtype), NormState(count[:, -1], mean[:, -1], var[:, -1])
