"""Plain feed-forward: y = W2 silu(W1 n), n = norm(x) (spec 6.2)."""

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


@FEEDFORWARD.register("mlp")
class MLP(nn.Module):
    """x (B, L, D) -> y (B, L, D); no residual."""

    @dataclass
    class Config:
        name: str = option("mlp", "two layers with silu between them")
        norm: str = option("layer", "row norm of its input: layer or rms")
        bias: bool = option(False, "biases in both layers (Mega)")
        rescale: bool = option(False, "learnable scale of each output feature, starting from 0.1 * 0.5^layer")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        self.norm = row_norm(config.norm, shape)
        self.fc1 = linear(shape.dim, shape.ffn_dim, shape, bias=config.bias)
        self.fc2 = linear(shape.ffn_dim, shape.dim, shape, bias=config.bias)
        self.alpha = rescale(shape) if config.rescale else None
        self.dropout, self.hidden_dropout = shape.dropout, shape.hidden_dropout

    def forward(self, x: Tensor, documents: Documents | None = None, state: None = None) -> tuple[Tensor, None]:
        f = F.dropout(ops.silu(self.fc1(self.norm.normalize(x))), self.hidden_dropout, self.training)
        y = F.dropout(self.fc2(f), self.dropout, self.training)
        return (y if self.alpha is None else self.alpha * y), None
