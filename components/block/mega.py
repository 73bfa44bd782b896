"""The block of Mega, pre-norm (spec 9, first column).

    a = norm(x);  m = ema(a)                                        the average has its own activation
    z = silu(Wz m);  q, k = two scaled and shifted views of z;  v = silu(Wv a)
    r = Wr m;  g = sigmoid(Wu m)
    c = silu(Wh1 m + Wh2 (attention(q, k, v) * silu(r)))
    y = x + g (c - x)                                               the update gate g moves x towards c
    out = y + feedforward(y)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.linear import add_linear, linears
from ..documents import Documents
from ..init import linear
from ..registry import BLOCK, Parts, Shape, option
from .base import BlockState, heads, refuse


@BLOCK.register("mega")
class MegaBlock(nn.Module):
    """Needs ``memory=none``."""

    @dataclass
    class Config:
        name: str = option("mega", "shared z, reset and update gates (Mega)")

    def __init__(self, config: Config, shape: Shape, parts: Parts) -> None:
        super().__init__()
        refuse(parts, "mega", "memory")
        self.shape = shape
        self.norm, self.ema, self.attention = parts.build("norm"), parts.build("ema"), parts.build("attention")
        self.wv = linear(shape.dim, shape.value_dim, shape, bias=True)
        self.wz = linear(shape.dim, shape.z_dim, shape, bias=True)
        self.wr = linear(shape.dim, shape.value_dim, shape, bias=True)
        self.wu = linear(shape.dim, shape.dim, shape, bias=True)
        self.wh1 = linear(shape.dim, shape.dim, shape, bias=True)
        self.wh2 = linear(shape.value_dim, shape.dim, shape)
        self.gamma = nn.Parameter(torch.empty(2, shape.z_dim).normal_(0.0, 0.02))
        self.beta = nn.Parameter(torch.zeros(2, shape.z_dim))
        self.feedforward = parts.build("feedforward")

    def forward(self, x: Tensor, documents: Documents | None = None, state: BlockState | None = None,
                ) -> tuple[Tensor, BlockState]:
        """x (B, L, D) -> (B, L, D) and the state."""
        before, shape = state or BlockState(), self.shape
        a, norm = self.norm(x, documents, before.norm)
        m, ema = self.ema(a, documents, before.ema)
        m = self._hide(m)
        z, r, g, h = linears(m, self.wz, self.wr, self.wu, self.wh1)
        z = ops.silu(z)
        q, k = (heads((z * self.gamma[i] + self.beta[i]).to(z.dtype), shape.num_heads) for i in (0, 1))
        v = heads(self._hide(ops.silu(self.wv(a))), shape.num_heads)
        u, attention = self.attention(
            q, k, v, documents, before.attention, scale=1 / math.sqrt(shape.head_dim)
        )
        c = self._hide(ops.silu(add_linear(h, ops.gate(u.flatten(2), r), self.wh2)))
        y = x + F.dropout(g.sigmoid() * (c - x), shape.dropout, self.training)
        f, feedforward = self.feedforward(y, documents, before.feedforward)
        return y + f, BlockState(norm, ema, attention, None, feedforward)

    def _hide(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.shape.hidden_dropout, self.training)
