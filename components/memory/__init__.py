"""Memory of what lies beyond the attention: adaptive_working (Gecko), none."""

from .adaptive_working import AdaptiveWorkingMemory
from .none import NoMemory

__all__ = [
    "AdaptiveWorkingMemory",
    "NoMemory",
]
