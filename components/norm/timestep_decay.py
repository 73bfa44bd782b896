"""Timestep decay norm (Gecko): groups of features normalised by decayed averages along the document (spec 1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.types import NormState
from ..documents import Documents
from ..registry import NORM, Shape, option
from .timestep import check_groups


@NORM.register("timestep_decay")
class TimestepDecayNorm(nn.Module):
    """y = (x - mhat_t) / sqrt(vhat_t + eps) * (1 + weight) + bias, averages with bias correction as in Adam."""

    @dataclass
    class Config:
        name: str = option("timestep_decay", "decayed mean and variance along the document")
        beta1: float = option(0.999, "decay of the running mean")
        beta2: float = option(0.9999, "decay of the running variance within a token")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(config, name) < 1.0:
                raise ValueError(f"model.norm.{name}={getattr(config, name)}: must be between 0 and 1, both excluded")
        self.groups, self.eps = check_groups(shape), shape.norm_eps
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.weight = nn.Parameter(torch.zeros(shape.dim))
        self.bias = nn.Parameter(torch.zeros(shape.dim))

    def probe(self, x: Tensor, documents: Documents | None, state: NormState) -> dict[str, Tensor]:
        """mean, std (B, G): the carried averages, bias corrected."""
        count = state.count.double()[:, None]
        mean, var = (s / (1 - beta**count) for s, beta in ((state.mean, self.beta1), (state.var, self.beta2)))
        return {"mean": mean, "std": var.sqrt()}

    def forward(self, x: Tensor, documents: Documents | None = None, state: Any = None) -> tuple[Tensor, Any]:
        return ops.timestep_decay_norm(
            x, self.weight, self.bias, groups=self.groups, beta1=self.beta1, beta2=self.beta2, eps=self.eps,
            bos=None if documents is None else documents.bos, state=state,
        )
