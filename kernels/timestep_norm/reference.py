"""Cumulative timestep norm in plain PyTorch (spec 1.1): running sums, in float64 since they only grow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..timestep_decay_norm.reference import running_sums, steps_since_bos
from ..types import NormState


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    batch, length, dim = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    cells = x.to(acc).view(batch, length, groups, dim // groups)
    mu = cells.mean(-1)
    s2 = (cells - mu[..., None]).square().mean(-1).double()
    mu = mu.double()
    if state is None:
        start1 = start2 = mu.new_zeros(batch, groups)
        count = torch.zeros(batch, dtype=torch.int64, device=x.device)
    else:
        count, mean0 = state.count, state.mean.double()
        start1, start2 = count[:, None] * mean0, count[:, None] * (state.var.double() + mean0.square())
    segments = None if bos is None else bos.to(torch.int64).cumsum(1)
    count = steps_since_bos(length, count, bos)
    total = count[..., None]
    mean = running_sums(mu, start1, 1.0, segments) / total
    square = running_sums(s2 + mu.square(), start2, 1.0, segments) / total
    var = (square - mean.square()).clamp(min=0).to(acc)
    mean = mean.to(acc)
    y = ((cells - mean[..., None]) * torch.rsqrt(var + eps)[..., None]).view(batch, length, dim)
    y = y * (1 + weight.to(acc)) + bias.to(acc)
    return y.to(x.dtype), NormState(count[:, -1], mean[:, -1], var[:, -1])
