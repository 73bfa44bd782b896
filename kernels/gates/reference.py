"""Products with silu in plain PyTorch, rounded once (spec 6.1, 6.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    acc = torch.promote_types(a.dtype, torch.float32)
    return (F.silu(a.to(acc)) * b.to(acc)).to(a.dtype)


def gate(near: Tensor, r: Tensor, far: Tensor | None = None) -> Tensor:
    acc = torch.promote_types(near.dtype, torch.float32)
    y = near.to(acc) * F.silu(r.to(acc))
    return (y if far is None else y + far.to(acc)).to(near.dtype)
