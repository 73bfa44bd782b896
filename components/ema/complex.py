"""Complex exponential moving average: every feature seen through N damped oscillators (spec 3.1-3.4).

    p = sigmoid(alpha)                                      share of the input that enters, and of the state that fades
    q = (1 - p sigmoid(delta)) exp(2 pi i n sigmoid(theta) / N)      n = 1..N: harmonics of one base phase a feature
    h_t = q h_{t-1} + p x_t                                 a document begins with h = 0
    y_t = sum over modes of Re(gamma h_t) + x_t
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..documents import Documents
from ..registry import EMA, Shape, option


def half_life(q: Tensor) -> Tensor:
    """Tokens after which |q|^n is 1/2; a |q| that rounds to 1 counts as the largest number below it."""
    below = 1.0 - torch.finfo(q.abs().dtype).eps / 2
    return -math.log(2) / q.abs().clamp(max=below).log()


@EMA.register("complex")
class ComplexEMA(nn.Module):
    """State: h (B, D, N) complex64."""

    @dataclass
    class Config:
        name: str = option("complex", "complex moving average (Gecko)")
        omega_skip: bool = option(False, "a learnable weight on the skip, omega * x instead of x (Megalodon)")
        scale: bool = option(False, "modes summed with 1/sqrt(N) and gamma starting from N(0, 1) (Megalodon)")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        features, modes = shape.dim, shape.ema_modes
        self.scale = 1.0 / math.sqrt(modes) if config.scale else 1.0
        self.alpha = nn.Parameter(torch.empty(features, modes).normal_(0.0, 0.2))
        self.delta = nn.Parameter(torch.empty(features, modes).normal_(0.0, 0.2))
        rank = torch.randperm(features) + 1
        self.theta = nn.Parameter(torch.logit(features ** (-rank.double() / features)).float())
        self.gamma = nn.Parameter(torch.zeros(features, modes, 2))
        with torch.no_grad():
            self.gamma[..., 0].normal_(0.0, 1.0 if config.scale else 1.0 / math.sqrt(modes))
        self.omega = None
        if config.omega_skip:
            self.omega = nn.Parameter(nn.init.trunc_normal_(torch.empty(features), 0.0, 0.25, -1.0, 1.0))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p (D, N) real, q and gamma (D, N) complex, in float32 or wider whatever the parameters' dtype."""
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        p = self.alpha.to(dtype).sigmoid()
        harmonic = torch.arange(1, p.shape[1] + 1, device=p.device, dtype=dtype) * (2 * math.pi / p.shape[1])
        q = torch.polar(1.0 - p * self.delta.to(dtype).sigmoid(), self.theta.to(dtype).sigmoid()[:, None] * harmonic)
        return p, q, torch.view_as_complex(self.gamma.to(dtype).contiguous()) * self.scale

    def probe(self, x: Tensor, documents: Documents | None, state: Any) -> dict[str, Tensor]:
        """half_life (D, N) in tokens and frequency (D, N) in turns a token, 0 to 1/2, of every mode."""
        _, q, _ = self.coefficients()
        return {"half_life": half_life(q), "frequency": q.angle().abs() / (2 * math.pi)}

    def forward(self, x: Tensor, documents: Documents | None = None, state: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
        p, q, gamma = self.coefficients()
        y, h = ops.complex_ema(x, p, q, gamma, bos=None if documents is None else documents.bos, state=state)
        if self.omega is not None:
            y = y + (self.omega - 1.0).to(x.dtype) * x  # the operation has added x already
        return y, h
