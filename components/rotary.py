"""Rotary positions whose angles stay exact however long the stream is (spec 4.1).

In float32 the angle of the fastest pair is off by 0.06 rad at position 1M; float64 keeps it below 1e-9 there, and
only the finished cosines and sines are rounded to float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)  # every layer of a model asks for the same table; older ones would be memory held for nothing
def tables(start: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (L, S / 2) float32 for positions start .. start + length - 1.

    Pair j, features (2j, 2j + 1), turns by position * base^(-2j / S), counter-clockwise.
    """
    with torch.inference_mode(False):  # a table first made while generating must still serve training
        pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
        position = torch.arange(start, start + length, dtype=torch.float64, device=device)
        angle = position[:, None] * base ** (-pair / head_dim)
        return angle.cos().float(), angle.sin().float()
