"""The operators of the time-step norms on the CPU: the recurrences of spec 1.1 and 1.2, step by step, in float32.

They keep for the backward what the kernels keep, and serve the checks of the operators; `reference.py` is faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bos: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    beta1: float | None,
    beta2: float | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, dim = x.shape
    cells = x.float().view(batch, length, groups, -1)
    own_mean, own_var = cells.mean(-1), cells.var(-1, correction=0)
    n = torch.zeros(batch, dtype=torch.int64) if count is None else count.clone()
    m, v = (torch.zeros(batch, groups) if t is None else t.clone() for t in (mean, var))
    begun, centres, scales = [torch.full((batch,), -1, dtype=torch.int32)], [], []
    for t in range(length):
        if bos is not None:
            starts = bos[:, t]
            n = n.masked_fill(starts, 0)
            m, v = (carry.masked_fill(starts[:, None], 0) for carry in (m, v))
            begun.append(begun[-1].masked_fill(starts, t))
        n = n + 1
        if beta1 is not None and beta2 is not None:
            m = beta1 * m + (1 - beta1) * own_mean[:, t]
            v = beta2 * v + (1 - beta2) * own_var[:, t]
            centre, spread = m / _correction(beta1, n), v / _correction(beta2, n)
        else:
            part, d = 1 / n.float()[:, None], own_mean[:, t] - m
            m = m + part * d
            v = v + part * (own_var[:, t] - v + (1 - part) * d.square())
            centre, spread = m, v
        centres.append(centre)
        scales.append(torch.rsqrt(spread + eps))
    kept = torch.stack([torch.stack(centres, -1), torch.stack(scales, -1)])
    centre, scale = (t.mT[..., None] for t in kept)
    y = ((cells - centre) * scale).view(batch, length, dim) * (1 + weight.float()) + bias.float()
    begin = torch.stack(begun[1:], 1) if bos is not None else torch.empty(0, dtype=torch.int32)
    return y.to(x.dtype), n, m.clone(), v.clone(), kept if save else torch.empty(0), begin


def backward(
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    begin: Tensor,
    count: Tensor | None,
    stateful: bool,
    groups: int,
    beta1: float | None,
    beta2: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, dim = x.shape
    cells, g = (t.float().view(batch, length, groups, -1) for t in (x, dy))
    centre, scale = (t.mT for t in saved)
    unit = (cells - centre[..., None]) * scale[..., None]
    gw = g * (1 + weight.float()).view(groups, -1)
    own_mean = cells.mean(-1)
    to_mean, to_var = -scale * gw.sum(-1), -0.5 * scale.square() * (gw * unit).sum(-1)
    steps = torch.arange(1, length + 1)
    counts = steps + (torch.zeros(batch, 1, dtype=torch.int64) if count is None else count[:, None])
    starts = None
    if begin.numel():
        counts = torch.where(begin >= 0, steps - begin, counts)
        starts = begin == steps - 1
    u, v = (torch.zeros_like(centre[:, 0]) if d is None else d for d in (dmean, dvar))
    shifts, stretches = [], []
    for t in reversed(range(length)):
        n = counts[:, t]
        if beta1 is not None and beta2 is not None:
            u = u + to_mean[:, t] / _correction(beta1, n)
            v = v + to_var[:, t] / _correction(beta2, n)
            shifts.append((1 - beta1) * u)
            stretches.append(2 * (1 - beta2) * v)
            u, v = beta1 * u, beta2 * v
        else:
            part, away = 1 / n.float()[:, None], own_mean[:, t] - centre[:, t]
            u, v = u + to_mean[:, t], v + to_var[:, t]
            shifts.append(part * (u + 2 * v * away))
            stretches.append(2 * part * v)
            u, v = (1 - part) * u - 2 * part * v * away, (1 - part) * v
        if starts is not None:
            u, v = (carry.masked_fill(starts[:, t, None], 0) for carry in (u, v))
    shift, stretch = (torch.stack(found[::-1], 1)[..., None] for found in (shifts, stretches))
    dx = gw * scale[..., None] + (shift + stretch * (cells - own_mean[..., None])) / cells.shape[-1]
    dweight, dbias = (g * unit).sum((0, 1)).view(dim), g.sum((0, 1)).view(dim)
    before = (torch.empty(0), torch.empty(0)) if not stateful else (u.clone(), v.clone())
    return dx.view(x.shape).to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), *before


def _correction(beta: float, n: Tensor) -> Tensor:
    return -torch.expm1(n.float()[:, None] * math.log(beta))
