"""Blocks, the layers of a model: gecko (Megalodon too), mega, llama."""

from .base import BlockState
from .gecko import GeckoBlock
from .llama import LlamaBlock
from .mega import MegaBlock

__all__ = [
    "BlockState",
    "GeckoBlock",
    "LlamaBlock",
    "MegaBlock",
]
