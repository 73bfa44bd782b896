"""Gated feed-forward: y = W2 (silu(W1 n) * W3 n), n = norm(x) (spec 6.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ..documents import Documents
from ..init import linear
from ..norm import row_norm
from ..registry import FEEDFORWARD, Shape, option
from .rescale import rescale


@FEEDFORWARD.register("swiglu")
class SwiGLU(nn.Module):
    """x (B, L, D) -> y (B, L, D); no residual."""

    @dataclass
    class Config:
        name: str = option("swiglu", "silu-gated feed-forward")
        norm: str = option("layer", "row norm of its input: layer or rms")
        rescale: bool = option(False, "learnable scale of each output feature, starting from 0.1 * 0.5^layer")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        self.norm = row_norm(config.norm, shape)
        self.fc1 = linear(shape.dim, shape.ffn_dim, shape)
        self.fc2 = linear(shape.ffn_dim, shape.dim, shape)
        self.fc3 = linear(shape.dim, shape.ffn_dim, shape)
        self.alpha = rescale(shape) if config.rescale else None
        self.dropout, self.hidden_dropout = shape.dropout, shape.hidden_dropout

    def forward(self, x: Tensor, documents: Documents | None = None, state: None = None) -> tuple[Tensor, None]:
        n = self.norm.normalize(x)
        f = F.dropout(ops.swiglu(self.fc1(n), self.fc3(n)), self.hidden_dropout, self.training)
        y = F.dropout(self.fc2(f), self.dropout, self.training)
        return (y if self.alpha is None else self.alpha * y), None
