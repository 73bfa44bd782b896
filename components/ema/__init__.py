"""Moving averages: complex (Gecko, Megalodon), real (the ablation, and Mega's own), none."""

from .complex import ComplexEMA
from .none import NoEMA
from .real import RealEMA

__all__ = [
    "ComplexEMA",
    "NoEMA",
    "RealEMA",
]
