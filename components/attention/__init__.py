"""Attention: sliding_chunk (Gecko), chunk (Megalodon), sliding_window, full."""

from .base import Attention
from .chunk import ChunkAttention
from .full import FullAttention
from .sliding_chunk import SlidingChunkAttention
from .sliding_window import SlidingWindowAttention

__all__ = [
    "Attention",
    "ChunkAttention",
    "FullAttention",
    "SlidingChunkAttention",
    "SlidingWindowAttention",
]
