"""Timestep decay norm (spec 1.2) on CUDA: one pass over memory forward, one backward. See norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import Module
from ..types import NormState
from . import ops
from .plan import piece, plan


def timestep_decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    beta1: float,
    beta2: float,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    return ops.time_norm(x, weight, bias, groups, beta1, beta2, eps, bos, state)


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    beta1: float,
    beta2: float,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> str | None:
    return ops.unsupported(x, weight, bias, groups)


def modules() -> list[Module]:
    """What the 7B shape needs, in bf16 and float32, for long sequences and for pieces of one."""
    shapes = [(64, dtype, torch.float32, True) for dtype in (torch.bfloat16, torch.float32)]
    return [plan(*shape, 64).module for shape in shapes] + [piece(*shape).module for shape in shapes]
