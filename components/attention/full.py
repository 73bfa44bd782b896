"""Full attention: a query sees every token of its document before it; the state grows with the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..documents import Documents
from ..registry import ATTENTION, Shape, option
from . import packed
from .base import Attention
from .buffer import KeyValues, extend, same_document


@ATTENTION.register("full")
class FullAttention(Attention):
    """State: all keys and values. Memory is linear in L where flash attention serves: a GPU, bfloat16, heads of at most
    256 features, no DropKey. Elsewhere the scores of L queries and K keys are L K numbers."""

    constant_state = False

    @dataclass
    class Config:
        name: str = option("full", "the whole document; the state grows with the stream")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(shape)

    def covered_chunks(self, chunk: int) -> None:
        return None

    def first_visible(self, position: Tensor) -> Tensor:
        return torch.zeros_like(position)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: KeyValues | None,
               ) -> tuple[Tensor, KeyValues]:
        held = extend(state, k, v, documents)
        length, total = q.shape[1], held.length
        if held.segments is None and length == total:
            return self.softmax(q, held.k, held.v, None, causal=True), held
        if held.segments is None and length == 1:  # generation: every key is seen
            return self.softmax(q, held.k, held.v, None), held
        if self.flash(q, held):
            return packed.attend(q, held), held
        visible = q.new_ones(length, total, dtype=torch.bool).tril(total - length)[None, None]
        if held.segments is not None:
            visible = visible & same_document(held.segments[:, total - length :], held.segments)
        return self.softmax(q, held.k, held.v, visible), held
