"""Attention: sliding_chunk (Gecko), chunk (Megalodon), sliding_window, full."""

from . import chunk, full, sliding_chunk, sliding_window
from .base import Attention

__all__ = ["Attention", "chunk", "full", "sliding_chunk", "sliding_window"]
