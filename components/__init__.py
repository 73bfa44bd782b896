"""The pieces of a language model, one file a piece, each registered by kind and name.

Imported as ``gecko_lab.components``; the folder stands at the top of the repository so that it
is the first thing a reader sees. torch only: no Lightning, Hydra or Optuna below this line.
"""

if __name__ == "components":
    raise ImportError(
        "import gecko_lab.components, not components: the folder is linked into the package gecko_lab "
        "(run from the repository's root, or install it with `pip install -e .`)"
    )

from . import attention, block, ema, feedforward, memory, norm
from .documents import Cursor, Documents
from .registry import KINDS, Registry, Shape, UnknownComponent

__all__ = [
    "KINDS",
    "Cursor",
    "Documents",
    "Registry",
    "Shape",
    "UnknownComponent",
    "attention",
    "block",
    "ema",
    "feedforward",
    "memory",
    "norm",
]
