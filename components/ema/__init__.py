"""Moving averages: complex (Gecko, Megalodon), real (the ablation, and Mega's own), none."""

from . import complex, none, real

__all__ = ["complex", "none", "real"]
