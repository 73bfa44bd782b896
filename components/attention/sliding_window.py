"""Sliding-window attention: a query sees itself and the W - 1 tokens before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from ..registry import ATTENTION, Shape, option
from . import packed
from .base import Attention
from .buffer import KeyValues, extend, same_document


@ATTENTION.register("sliding_window")
class SlidingWindowAttention(Attention):
    """State: the last W - 1 keys and values."""

    @dataclass
    class Config:
        name: str = option("sliding_window", "the last W tokens")
        window: Optional[int] = option(None, "W, tokens that a query sees, itself included; null: 2 C")  # noqa: UP045

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(shape)
        self.window = 2 * shape.chunk_size if config.window is None else config.window
        if self.window < 1:
            raise ValueError(f"model.attention.window={self.window}: must be at least 1")

    def covered_chunks(self, chunk: int) -> int:
        return self.window // chunk  # 0: not even its own chunk whole

    def first_visible(self, position: Tensor) -> Tensor:
        return (position - self.window + 1).clamp(min=0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: KeyValues | None,
               ) -> tuple[Tensor, KeyValues]:
        held = extend(state, k, v, documents)
        if held.segments is None and q.shape[1] == 1:  # generation: every key that is held is seen
            y = self.softmax(q, held.k, held.v, None)
        elif self.flash(q, held):
            y = packed.attend(q, held, window=self.window)
        else:
            y = self._blocks(q, held)
        return y, held.last(self.window - 1)

    def _blocks(self, q: Tensor, held: KeyValues) -> Tensor:
        """Queries in blocks of W, each against the keys of its own block and the one before: 2 L W scores, not L^2."""
        batch, length = q.shape[:2]
        past, size = held.length - length, min(self.window, length)
        # Slots for W keys before the first query, then whole blocks; what is not a key yet is masked by its index.
        before, after = self.window - past, -length % size
        keys = held.padded(before, after)
        q = F.pad(q, (0, 0, 0, 0, 0, after)).unflatten(1, (-1, size)).flatten(0, 1)
        blocks = (length + after) // size

        def bands(x: Tensor) -> Tensor:
            """(B, K, ...) -> (B blocks, W + size, ...): the keys within reach of each block."""
            return x.unfold(1, self.window + size, size).movedim(-1, 2).flatten(0, 1)

        row = torch.arange(size, device=q.device)[:, None]
        column = torch.arange(self.window + size, device=q.device)
        reach = (column > row) & (column <= row + self.window)
        start = torch.arange(blocks, device=q.device)[:, None] * size
        real = (start + column >= before)[:, None, None, :]
        visible = (reach & real).repeat(batch, 1, 1, 1)  # a padded query still sees itself, so no row is empty
        if keys.segments is not None:
            segments = keys.segments[:, self.window :].unflatten(1, (-1, size)).flatten(0, 1)
            visible = visible & same_document(segments, bands(keys.segments))
        y = self.softmax(q, bands(keys.k), bands(keys.v), visible)
        return y.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]
