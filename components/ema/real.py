"""Real damped moving average: the complex one without phases, so that exactly the complex part is ablated.

    p = sigmoid(alpha)      q = 1 - p sigmoid(delta)      h_t = q h_{t-1} + p x_t      y_t = sum gamma h_t + x_t

With ``mega`` it is Mega's own (spec 3.5): an expansion beta of the input, 1/sqrt(N), a weighted skip, silu inside:

    a = sigmoid(delta)      q = 1 - a sigmoid(alpha)      h_t = q h_{t-1} + a beta x_t
    y_t = silu(sum gamma h_t / sqrt(N) + omega x_t)
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
from .complex import half_life


@EMA.register("real")
class RealEMA(nn.Module):
    """State: h (B, D, N) float32."""

    @dataclass
    class Config:
        name: str = option("real", "real damped moving average: the complex one without phases")
        mega: bool = option(False, "Mega's own: input expansion, 1/sqrt(N), weighted skip and silu inside")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        features, modes = shape.dim, shape.ema_modes
        self.alpha = nn.Parameter(torch.empty(features, modes).normal_(0.0, 0.2))
        self.delta = nn.Parameter(torch.empty(features, modes).normal_(0.0, 0.2))
        std = 1.0 if config.mega else 1.0 / math.sqrt(modes)
        self.gamma = nn.Parameter(torch.empty(features, modes).normal_(0.0, std))
        self.beta: nn.Parameter | None = None
        self.omega: nn.Parameter | None = None
        if config.mega:
            sign = 1.0 - 2.0 * (torch.arange(modes) % 2)
            self.beta = nn.Parameter(torch.empty(features, modes).normal_(0.0, 0.02) + sign)
            self.omega = nn.Parameter(torch.empty(features).normal_())

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, q, gamma (D, N), real, in float32 or wider."""
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        alpha, delta, gamma = self.alpha.to(dtype).sigmoid(), self.delta.to(dtype).sigmoid(), self.gamma.to(dtype)
        q = 1.0 - alpha * delta
        if self.beta is None:
            return alpha, q, gamma
        return delta * self.beta.to(dtype), q, gamma / math.sqrt(gamma.shape[1])

    def probe(self, x: Tensor, documents: Documents | None, state: Any) -> dict[str, Tensor]:
        """half_life (D, N) in tokens, of every mode."""
        return {"half_life": half_life(self.coefficients()[1])}

    def forward(self, x: Tensor, documents: Documents | None = None, state: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
        p, q, gamma = self.coefficients()
        y, h = ops.complex_ema(x, p, q, gamma, bos=None if documents is None else documents.bos, state=state)
        if self.omega is not None:
            y = ops.silu(y + (self.omega - 1.0).to(x.dtype) * x)  # the operation has added x already
        return y, h
