"""RMS norm: each token's features divided by their root mean square (spec 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..registry import NORM, Shape, option
from .row import RowNorm


@NORM.register("rms")
class RMSNorm(RowNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight)."""

    @dataclass
    class Config:
        name: str = option("rms", "root mean square of each token")

    def __init__(self, config: Config, shape: Shape, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.zeros(shape.dim)) if affine else None

    def normalize(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)
