"""The block of Gecko, and with other parts of Megalodon (spec 6.1, 6.2).

    a = norm(x);  e = ema(a);  m = rms(e)
    q, k, aq, ak = four scaled and shifted views of one z = Wz m, normalised in each head
    v = silu(Wv a);  r = Wr m
    y = x + Wh1 m + Wh2 (attention(q, k, v) * silu(r) + memory(aq, ak, v))
    out = y + feedforward(y)

With ``memory=none`` there are only two views, as in Megalodon.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.linear import add_linear, linears, silu_linear
from ..documents import Documents
from ..init import linear
from ..norm import row_norm
from ..registry import BLOCK, Parts, Shape, option
from .base import BlockState, heads


@BLOCK.register("gecko")
class GeckoBlock(nn.Module):
    """Parameter names are those of the official checkpoints without the ``mega.`` of the first half."""

    @dataclass
    class Config:
        name: str = option("gecko", "one shared z, gated attention plus memory (Gecko, Megalodon)")
        two_hop_residual: bool = option(False, "the feed-forward adds to the block's input, not its middle (Megalodon)")

    def __init__(self, config: Config, shape: Shape, parts: Parts) -> None:
        super().__init__()
        self.shape, self.two_hop = shape, config.two_hop_residual
        self.timenorm, self.cema = parts.build("norm"), parts.build("ema")
        self.rmsnorm = row_norm("rms", shape)
        self.attention = parts.build("attention")
        self.memory = parts.build("memory", covered=self.attention.covered_chunks(shape.chunk_size))
        self.wv = linear(shape.dim, shape.value_dim, shape, bias=True)
        self.wz = linear(shape.dim, shape.z_dim, shape, bias=True)
        self.wr = linear(shape.dim, shape.value_dim, shape, bias=True)
        self.wh1 = linear(shape.dim, shape.dim, shape, bias=True)
        self.wh2 = linear(shape.value_dim, shape.dim, shape)
        views = 2 + self.memory.views
        self.gamma = nn.Parameter(torch.zeros(views, shape.z_dim))
        self.beta = nn.Parameter(torch.zeros(views, shape.z_dim))
        self.nffn = parts.build("feedforward")

    def forward(self, x: Tensor, documents: Documents | None = None, state: BlockState | None = None,
                ) -> tuple[Tensor, BlockState]:
        """x (B, L, D) -> (B, L, D) and the state."""
        before, shape = state or BlockState(), self.shape
        a, norm = self.timenorm(x, documents, before.norm)
        e, ema = self.cema(a, documents, before.ema)
        m = self._hide(self.rmsnorm.normalize(e))
        z, r, h = linears(m, self.wz, self.wr, self.wh1)

        cos, sin = self.attention.tables(self.attention.position(before.attention), x.shape[1], x.device)
        q, k, *far_views = ops.z_views(
            z, self.gamma, self.beta, cos, sin,
            heads=shape.num_heads, rope_heads=self.attention.rope_heads, eps=shape.norm_eps,
        )
        v, far_v = (heads(x, shape.num_heads) for x in silu_linear(a, self.wv))
        near, attention = self.attention.attend(q, k, v, documents, before.attention)
        aq, ak = far_views or (None, None)
        far, memory = self.memory(aq, ak, far_v, documents, before.memory)
        u = ops.gate(near.flatten(2), r, None if far is None else far.flatten(2))
        y = x + F.dropout(add_linear(h, self._hide(u), self.wh2), shape.dropout, self.training)

        f, feedforward = self.nffn(y, documents, before.feedforward)
        return f + (x if self.two_hop else y), BlockState(norm, ema, attention, memory, feedforward)

    def _hide(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.shape.hidden_dropout, self.training)
