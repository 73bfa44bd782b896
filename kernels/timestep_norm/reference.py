"""Cumulative timestep norm in plain PyTorch (spec 1.1): running sums in float64, restarted by subtraction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..timestep_decay_norm.reference import steps_since_bos
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
    s2 = (cells - mu[..., None]).square().mean(-1)
    # The variance does not depend on where zero lies; near the mean the sums of squares stay small.
    origin = mu.detach().double().mean(1, keepdim=True)
    offset = mu.double() - origin
    first = offset.cumsum(1)
    second = (s2.double() + offset.square()).cumsum(1)
    count0 = torch.zeros(batch, dtype=torch.int64, device=x.device) if state is None else state.count
    count = steps_since_bos(length, count0, bos)
    if state is None:
        before1 = before2 = torch.zeros_like(origin)
    else:
        moved = state.mean.double()[:, None] - origin
        weight0 = count0.double()[:, None, None]
        before1, before2 = weight0 * moved, weight0 * (state.var.double()[:, None] + moved.square())
    if bos is not None:
        # Sums up to the step before the document began; a document that was open before the call has the state's.
        steps = torch.arange(length, device=x.device)
        started = torch.where(bos, steps, -1).cummax(1).values
        last = (started - 1).clamp(min=0)[..., None].expand_as(first)
        zero = torch.zeros_like(first)
        inside = (started > 0)[..., None]
        first = first - torch.where(inside, first.gather(1, last), zero)
        second = second - torch.where(inside, second.gather(1, last), zero)
        carried = (started < 0)[..., None]
        before1, before2 = torch.where(carried, before1, zero), torch.where(carried, before2, zero)
    total = count.double()[..., None]
    centre = (first + before1) / total
    var = ((second + before2) / total - centre.square()).clamp(min=0).to(acc)
    mean = (centre + origin).to(acc)
    y = ((cells - mean[..., None]) * torch.rsqrt(var + eps)[..., None]).view(batch, length, dim)
    y = y * (1 + weight.to(acc)) + bias.to(acc)
    return y.to(x.dtype), NormState(count[:, -1], mean[:, -1], var[:, -1])
