"""Sliding-chunk attention (Gecko): a query sees its own chunk up to itself and the whole chunk before (spec 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels import ops
from ..documents import Documents
from ..registry import ATTENTION, Shape, option
from .base import Attention


@ATTENTION.register("sliding_chunk")
class SlidingChunkAttention(Attention):
    """State: keys and values since the start of the previous chunk, at most 2 C."""

    @dataclass
    class Config:
        name: str = option("sliding_chunk", "the query's own chunk and the one before (Gecko)")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(shape)

    def covered_chunks(self, chunk: int) -> int:
        return 2

    def first_visible(self, position: Tensor) -> Tensor:
        return (position // self.chunk - 1).clamp(min=0) * self.chunk

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: Any) -> tuple[Tensor, Any]:
        return ops.sliding_chunk_attention(
            q, k, v, chunk=self.chunk, segments=None if documents is None else documents.segments, state=state,
            dropout=self.drop if self.training else 0.0,
        )
