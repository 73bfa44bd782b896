"""How matrices start (spec 6.4). No depth scaling; biases start at zero, norm scales at zero (used as 1 + weight)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .registry import Shape, nearest

MODES = ("he", "bert", "xavier", "gaussian", "none")


@torch.no_grad()
def init_matrix(weight: Tensor, mode: str, dim: int | None = None) -> None:
    """Fill weight (out, in) in place.

    he: normal, std 1 / sqrt(3 in); bert: normal, std 0.02; xavier: uniform; gaussian: normal of std 1 / sqrt(dim)
    cut at three std (dim None: std 1); none: leave what torch put there. Raises ValueError for another mode.
    """
    if mode == "he":
        weight.normal_(0.0, 1.0 / math.sqrt(3 * weight.shape[1]))
    elif mode == "bert":
        weight.normal_(0.0, 0.02)
    elif mode == "xavier":
        nn.init.xavier_uniform_(weight)
    elif mode == "gaussian":
        std = 1.0 if dim is None else 1.0 / math.sqrt(dim)
        nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)
    elif mode != "none":
        raise ValueError(f"model.init={mode!r}: unknown initialiser. {nearest(mode, list(MODES))}")


def linear(inputs: int, outputs: int, shape: Shape, bias: bool = False) -> nn.Linear:
    """A linear map that starts as ``shape.init`` says (gaussian: with std 1 / sqrt(inputs)), its bias at zero."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    init_matrix(layer.weight, shape.init, inputs)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
