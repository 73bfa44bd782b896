"""Cumulative timestep norm (spec 1.1) on CUDA: the kernels of the decayed one with other runs. See its norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import Module
from ..timestep_decay_norm import ops
from ..timestep_decay_norm.plan import CLUSTER, plan
from ..types import NormState


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
    types = (torch.bfloat16, torch.float32)
    return [plan(64, dtype, torch.float32, False, 64, cluster).module for cluster in (0, CLUSTER) for dtype in types]
