"""Gated feed-forward: y = W2 (silu(W1 n) * W3 n), n = norm(x) (spec 6.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import gated_feed_forward
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
        hidden_dropout = self.hidden_dropout if self.training else 0.0
        y = gated_feed_forward(self.norm.normalize(x), self.fc1, self.fc3, self.fc2, hidden_dropout)
        y = F.dropout(y, self.dropout, self.training)
        return (y if self.alpha is None else self.alpha * y), None
