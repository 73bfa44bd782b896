"""The learnable output scale of a feed-forward, smaller in deeper layers."""

from __future__ import annotations

import torch
from torch import nn

from ..registry import Shape


def rescale(shape: Shape) -> nn.Parameter:
    """alpha (D,), starting from 0.1 * 0.5^layer (spec 6.2)."""
    return nn.Parameter(torch.full((shape.dim,), 0.1 * 0.5**shape.layer))
