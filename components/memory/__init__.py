"""Memory of what lies beyond the attention: adaptive_working (Gecko), none."""

from . import adaptive_working, none

__all__ = ["adaptive_working", "none"]
