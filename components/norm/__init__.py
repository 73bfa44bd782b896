"""Norms: of a row alone (rms, layer) or with statistics that run along time (timestep, timestep_decay)."""

from . import layer, rms, timestep, timestep_decay
from .row import RowNorm, row_norm

__all__ = ["RowNorm", "layer", "rms", "row_norm", "timestep", "timestep_decay"]
