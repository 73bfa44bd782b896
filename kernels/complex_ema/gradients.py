"""The parameter gradients of the complex moving average, from sums over time by the kernels. Source: spec 3.3."""

from typing import NamedTuple

import torch
from torch import Tensor


class Edge(NamedTuple):
    """Over the steps of the document across an end: power = sum q^t z_t and slope = d power / dq, (B, D, N)."""

    power: Tensor
    slope: Tensor


def parameter_gradients(
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    along_u: Tensor,
    along_v: Tensor,
    *,
    entering: tuple[Tensor, Edge] | None = None,
    leaving: tuple[Tensor, Edge] | None = None,
    crossing: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dp, dq, dgamma), (D, N), of h_t = q h_{t-1} + p x_t and y_t = Re(gamma h_t).

    Without a state h = p u and dh/dq = p v, where u is h for p = 1 and v = du/dq: `along_u` = sum_t dy_t u_t and
    `along_v` = sum_t dy_t v_t, (B, D, N), hold all. `entering` is the incoming state with the edge of dy at the
    start, `leaving` the gradient of the final state with the edge of x at the end; `crossing` (B, 1, 1) is L where
    a row has no BOS, so that the incoming state reaches the final one, else 0.
    """
    # Conjugates are physical: inside an operator under torch.compile the lazy ones are lost.
    sum_u, sum_v = along_u.sum(0), along_v.sum(0)
    dp = (gamma * sum_u).real
    sum_h, sum_s = p * sum_u, p * sum_v
    if entering is not None:
        state, edge = entering
        sum_h = sum_h + (state * q * edge.power).sum(0)
        sum_s = sum_s + (state * (edge.power + q * edge.slope)).sum(0)
    dq = torch.conj_physical(gamma * sum_s)
    if leaving is not None:
        dh, edge = leaving
        dp = dp + (torch.conj_physical(edge.power) * dh).real.sum(0)
        slope = p * edge.slope
        if entering is not None and crossing is not None:
            slope = slope + _power_slope(q, crossing) * entering[0]
        dq = dq + (torch.conj_physical(slope) * dh).sum(0)
    return dp, dq, torch.conj_physical(sum_h)


def _power_slope(q: Tensor, exponent: Tensor) -> Tensor:
    """exponent q^(exponent - 1), and 0 where the exponent is 0; the power is taken in double precision."""
    wide = q.to(torch.complex128)
    power = torch.polar(wide.abs().pow((exponent - 1).clamp(min=0)), wide.angle() * (exponent - 1))
    return (exponent * power).to(q.dtype)
