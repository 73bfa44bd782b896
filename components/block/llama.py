"""The pre-norm transformer block of Llama: the baseline that the others are compared with; any attention fits.

    n = norm(x);  y = x + Wo attention(Wq n, Wk n, Wv n)
    out = y + feedforward(y)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import linears
from ..documents import Documents
from ..init import linear
from ..registry import BLOCK, Parts, Shape, option
from .base import BlockState, heads, refuse


@BLOCK.register("llama")
class LlamaBlock(nn.Module):
    """Needs ``ema=none`` and ``memory=none``; no biases."""

    @dataclass
    class Config:
        name: str = option("llama", "pre-norm transformer (Llama)")

    def __init__(self, config: Config, shape: Shape, parts: Parts) -> None:
        super().__init__()
        refuse(parts, "llama", "ema", "memory")
        self.shape = shape
        self.norm, self.attention = parts.build("norm"), parts.build("attention")
        self.wq = linear(shape.dim, shape.z_dim, shape)
        self.wk = linear(shape.dim, shape.z_dim, shape)
        self.wv = linear(shape.dim, shape.value_dim, shape)
        self.wo = linear(shape.value_dim, shape.dim, shape)
        self.feedforward = parts.build("feedforward")

    def forward(self, x: Tensor, documents: Documents | None = None, state: BlockState | None = None,
                ) -> tuple[Tensor, BlockState]:
        """x (B, L, D) -> (B, L, D) and the state."""
        before, shape = state or BlockState(), self.shape
        n, norm = self.norm(x, documents, before.norm)
        q, k, v = (heads(w, shape.num_heads) for w in linears(n, self.wq, self.wk, self.wv))
        u, attention = self.attention(
            q, k, v, documents, before.attention, scale=1 / math.sqrt(shape.head_dim)
        )
        y = x + F.dropout(self.wo(u.flatten(2)), shape.dropout, self.training)
        f, feedforward = self.feedforward(y, documents, before.feedforward)
        return y + f, BlockState(norm, None, attention, None, feedforward)
