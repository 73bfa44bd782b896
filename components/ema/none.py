"""No moving average: the ablation that lets the input through."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..documents import Documents
from ..registry import EMA, Shape, option


@EMA.register("none")
class NoEMA(nn.Module):
    """y = x."""

    @dataclass
    class Config:
        name: str = option("none", "no moving average")

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor, documents: Documents | None = None, state: None = None) -> tuple[Tensor, None]:
        return x, None
