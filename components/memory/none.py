"""No memory: the ablation that adds nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..documents import Documents
from ..registry import MEMORY, Shape, option


@MEMORY.register("none")
class NoMemory(nn.Module):
    """y = None: the block adds nothing and makes no views for it."""

    views = 0  # of z, which the block would have to make

    @dataclass
    class Config:
        name: str = option("none", "no memory beyond the attention")

    def __init__(self, config: Config, shape: Shape, *, covered: int | None = None) -> None:
        super().__init__()

    def forward(self, aq: Tensor | None, ak: Tensor | None, v: Tensor, documents: Documents | None = None,
                state: None = None) -> tuple[None, None]:
        return None, None
