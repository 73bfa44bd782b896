"""Layer norm: each token's features centred and scaled to variance one (spec 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..registry import NORM, Shape, option
from .row import RowNorm


@NORM.register("layer")
class LayerNorm(RowNorm):
    """y = (x - mean) / sqrt(var + eps) * (1 + weight) + bias."""

    @dataclass
    class Config:
        name: str = option("layer", "mean and variance of each token")

    def __init__(self, config: Config, shape: Shape, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.zeros(shape.dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape.dim)) if affine else None

    def normalize(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)
