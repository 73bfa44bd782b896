"""Norms over the features of one position in plain PyTorch (spec 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    cells = x.to(acc).unflatten(-1, (groups, -1))
    y = (cells * torch.rsqrt(cells.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return _affine(y, weight, None).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5
) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    cells = x.to(acc).unflatten(-1, (groups, -1))
    centred = cells - cells.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return _affine(y, weight, bias).to(x.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * (1 + weight.to(y.dtype))
    return y if bias is None else y + bias.to(y.dtype)
