"""Chunk attention (Megalodon): a query sees the tokens before it in its own chunk of the absolute grid (spec 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from ..registry import ATTENTION, Shape, option
from . import packed
from .base import Attention
from .buffer import KeyValues, extend, same_document


@ATTENTION.register("chunk")
class ChunkAttention(Attention):
    """State: keys and values of the open chunk, at most C - 1 of them."""

    @dataclass
    class Config:
        name: str = option("chunk", "the query's own chunk only")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(shape)

    def covered_chunks(self, chunk: int) -> int:
        return 1

    def first_visible(self, position: Tensor) -> Tensor:
        return position // self.chunk * self.chunk

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: KeyValues | None,
               ) -> tuple[Tensor, KeyValues]:
        length, size = q.shape[1], self.chunk
        held = extend(state, k, v, documents)
        open_keys = held.length - length
        if held.segments is not None and self.flash(q, held):
            y = packed.attend(q, held, chunk=size)
        elif held.length <= size:  # within one chunk, a single new token above all: no padding
            y = self._within(q, held)
        else:
            after = -held.length % size
            keys = held.padded(0, after)
            q = F.pad(q, (0, 0, 0, 0, open_keys, after))  # queries read before: computed, dropped
            y = self._chunks(q, keys)[:, open_keys : open_keys + length]
        return y, held.last(held.position % size)

    def _within(self, q: Tensor, keys: KeyValues) -> Tensor:
        length, total = q.shape[1], keys.length
        if keys.segments is None and length in (1, total):
            return self.softmax(q, keys.k, keys.v, None, causal=length > 1)
        visible = q.new_ones(length, total, dtype=torch.bool).tril(total - length)[None, None]
        if keys.segments is not None:
            visible = visible & same_document(keys.segments[:, total - length :], keys.segments)
        return self.softmax(q, keys.k, keys.v, visible)

    def _chunks(self, q: Tensor, keys: KeyValues) -> Tensor:
        """Every chunk is a row of one batched causal attention; padding stands behind each real query of its chunk."""

        def fold(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, self.chunk)).flatten(0, 1)

        batch, q = q.shape[0], fold(q)
        if keys.segments is None:
            y = self.softmax(q, fold(keys.k), fold(keys.v), None, causal=True)
        else:
            segments = fold(keys.segments)
            causal = q.new_ones(self.chunk, self.chunk, dtype=torch.bool).tril()
            y = self.softmax(q, fold(keys.k), fold(keys.v), causal & same_document(segments, segments))
        return y.unflatten(0, (batch, -1)).flatten(1, 2)
