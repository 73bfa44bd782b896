"""Cumulative timestep norm (spec 1.1) on CUDA: the kernels of the decayed one with other runs. See its norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import Module
from ..timestep_decay_norm import ops
from ..timestep_decay_norm.plan import piece, plan
from ..types import NormState

SPILL_BUDGET = 8  # bytes: a register of the piece kernel, which fills 128 for two blocks a multiprocessor


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    return ops.time_norm(x, weight, bias, groups, None, None, eps, bos, state)


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> str | None:
    return ops.unsupported(x, weight, bias, groups)


def modules() -> list[Module]:
    """What the 7B shape needs, in bf16 and float32, for long sequences and for pieces of one."""
    shapes = [(64, dtype, torch.float32, False) for dtype in (torch.bfloat16, torch.float32)]
    return [plan(*shape, 64).module for shape in shapes] + [piece(*shape).module for shape in shapes]
