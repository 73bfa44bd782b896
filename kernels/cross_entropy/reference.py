"""Cross entropy of each row of logits in plain PyTorch, float32 or wider inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none"), wide.logsumexp(-1)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor) -> Tensor:
    p = (logits.to(lse.dtype) - lse[:, None]).exp()
    p = p.scatter_add(-1, targets[:, None], p.new_full((len(p), 1), -1.0)) * dlosses[:, None]
    return logits.copy_(p)
