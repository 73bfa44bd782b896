"""What the kernels compute, one step after the other in plain PyTorch: the CPU side of the operators, for tests."""

import torch
from torch import Tensor


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


def parameter_gradients(
    x: Tensor,
    dy: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    bos: Tensor | None,
    first: Tensor | None,
    dlast: Tensor | None,
    *,
    after_filter: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As launches.parameter_gradients. u = dh/dp and v = dh/dq, carried with h."""
    u, v, sum_u, sum_v, sum_h = (q.new_zeros((x.shape[0], *q.shape)) for _ in range(5))
    h = u if first is None else first
    # Conjugates are physical: inside an operator under torch.compile the lazy ones are lost.
    for t in range(x.shape[1]):
        u, v, h = _kept(u, bos, t), _kept(v, bos, t), _kept(h, bos, t)
        u, v, h = q * u + x[:, t, :, None], q * v + h, q * h + p * x[:, t, :, None]
        slope = dy[:, t, :, None]
        sum_u, sum_v, sum_h = sum_u + slope * u, sum_v + slope * v, sum_h + slope * h
    by_p, by_q = gamma * sum_u, gamma * sum_v
    if dlast is not None:
        leaving = torch.conj_physical(dlast)
        by_p, by_q = by_p + leaving * u, by_q + leaving * v
    return by_p.real.sum(0), torch.conj_physical(by_q.sum(0)), torch.conj_physical(sum_h.sum(0))


def _kept(value: Tensor, bos: Tensor | None, t: int) -> Tensor:
    """The value, or zero in the rows where a document begins at t."""
    return value if bos is None else value.masked_fill(bos[:, t, None, None], 0)
