"""What the kernels compute, one step after the other in plain PyTorch: the CPU side of the operators, for tests."""

import torch
from torch import Tensor

from .gradients import Edge


def filter_steps(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, first: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As launches.filter_steps."""
    h = q.new_zeros((x.shape[0], *q.shape)) if first is None else first.clone()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not reverse:
        for t in range(x.shape[1]):
            h = _kept(q * h, bos, t) + p * x[:, t, :, None]
            y[:, t] = (gamma * h).real.sum(-1) + x[:, t]
        return y, h
    h = torch.conj_physical(h)
    for t in reversed(range(x.shape[1])):
        h = h + gamma * x[:, t, :, None]
        y[:, t] = (p * h).real.sum(-1) + x[:, t]
        h = _kept(q * h, bos, t)
    return y, torch.conj_physical(h)


def correlate(x: Tensor, dy: Tensor, q: Tensor, bos: Tensor | None) -> tuple[Tensor, Tensor]:
    """As launches.correlate."""
    u, v, sum_u, sum_v = (q.new_zeros((x.shape[0], *q.shape)) for _ in range(4))
    for t in range(x.shape[1]):
        u, v = _kept(u, bos, t), _kept(v, bos, t)
        u, v = q * u + x[:, t, :, None], q * v + u
        sum_u = sum_u + dy[:, t, :, None] * u
        sum_v = sum_v + dy[:, t, :, None] * v
    return sum_u, sum_v


def edge(z: Tensor, q: Tensor, bos: Tensor | None, *, reverse: bool) -> Edge:
    """As launches.edge."""
    weight = q.new_ones((z.shape[0], *q.shape))
    slope, sum_weight, sum_slope = (torch.zeros_like(weight) for _ in range(3))
    for t in reversed(range(z.shape[1])) if reverse else range(z.shape[1]):
        if not reverse:
            weight, slope = _kept(weight, bos, t), _kept(slope, bos, t)
        sum_weight = sum_weight + z[:, t, :, None] * weight
        sum_slope = sum_slope + z[:, t, :, None] * slope
        if reverse:
            weight, slope = _kept(weight, bos, t), _kept(slope, bos, t)
        weight, slope = q * weight, q * slope + weight
    return Edge(sum_weight, sum_slope)


def _kept(value: Tensor, bos: Tensor | None, t: int) -> Tensor:
    """The value, or zero in the rows where a document begins at t."""
    return value if bos is None else value.masked_fill(bos[:, t, None, None], 0)
