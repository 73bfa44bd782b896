"""Norms: of a row alone (rms, layer) or with statistics that run along time (timestep, timestep_decay)."""

from .layer import LayerNorm
from .rms import RMSNorm
from .row import RowNorm, row_norm
from .timestep import TimestepNorm
from .timestep_decay import TimestepDecayNorm

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "RowNorm",
    "TimestepDecayNorm",
    "TimestepNorm",
    "row_norm",
]
