"""Timestep norm (Megalodon): groups of features normalised by the mean and variance of all tokens so far (spec 1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.types import NormState
from ..documents import Documents
from ..registry import NORM, Shape, option


def check_groups(shape: Shape) -> int:
    """The number of feature groups; a group needs at least two features, or its variance is zero."""
    if shape.dim % shape.norm_groups or shape.norm_groups >= shape.dim:
        raise ValueError(
            f"model.norm_groups={shape.norm_groups}: must divide model.dim={shape.dim} and be smaller than it"
        )
    return shape.norm_groups


@NORM.register("timestep")
class TimestepNorm(nn.Module):
    """y = (x - m_t) / sqrt(v_t + eps) * (1 + weight) + bias, m_t and v_t over tokens 0..t of the document."""

    @dataclass
    class Config:
        name: str = option("timestep", "cumulative mean and variance along the document")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        self.groups, self.eps = check_groups(shape), shape.norm_eps
        self.weight = nn.Parameter(torch.zeros(shape.dim))
        self.bias = nn.Parameter(torch.zeros(shape.dim))

    def probe(self, x: Tensor, documents: Documents | None, state: NormState) -> dict[str, Tensor]:
        """mean, std (B, G): the carried moments."""
        return {"mean": state.mean, "std": state.var.sqrt()}

    def forward(self, x: Tensor, documents: Documents | None = None, state: Any = None) -> tuple[Tensor, Any]:
        bos = None if documents is None else documents.bos
        return ops.timestep_norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps, bos=bos, state=state)
