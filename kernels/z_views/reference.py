"""Queries and keys from the shared representation z in plain PyTorch (spec 6.1, rotation 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, scale: float = 1.0) -> Tensor:
    if rope_heads == 0:
        return x if scale == 1.0 else x * scale
    acc = torch.promote_types(x.dtype, torch.float32)
    even, odd = x[:, :, :rope_heads].to(acc).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = scale * cos.to(acc)[..., None, :], scale * sin.to(acc)[..., None, :]
    turned = torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2).to(x.dtype)
    if rope_heads == x.shape[2]:
        return turned
    rest = x[:, :, rope_heads:]
    return torch.cat([turned, rest if scale == 1.0 else rest * scale], 2)


def z_views(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    rope_heads: int = 0,
    eps: float = 1e-5,
    rotated: int = 2,
) -> tuple[Tensor, ...]:
    acc = torch.promote_types(z.dtype, torch.float32)
    cells = z.to(acc).unflatten(-1, (heads, -1))
    cells = cells * torch.rsqrt(cells.square().mean(-1, keepdim=True) + eps)
    scale = ((1 + gamma.to(acc)) / math.sqrt(cells.shape[-1])).unflatten(-1, (heads, -1))
    shift = beta.to(acc).unflatten(-1, (heads, -1))
    views = []
    for i in range(len(gamma)):
        view = cells * scale[i] + shift[i]
        if i < rotated and cos is not None and sin is not None:
            view = rotate(view, cos, sin, rope_heads)
        views.append(view.to(z.dtype))
    return tuple(views)
