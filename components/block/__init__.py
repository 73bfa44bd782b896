"""Blocks, the layers of a model: gecko (Megalodon too), mega, llama."""

from . import gecko, llama, mega
from .base import BlockState

__all__ = ["BlockState", "gecko", "llama", "mega"]
