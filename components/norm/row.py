"""What the norms of a row alone share: no time, no state, so a block can also use them inside."""

from __future__ import annotations

from torch import Tensor, nn

from ..documents import Documents
from ..registry import NORM, Shape


class RowNorm(nn.Module):
    """A norm over the features of each token; a subclass defines ``normalize``."""

    def normalize(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, documents: Documents | None = None, state: None = None) -> tuple[Tensor, None]:
        return self.normalize(x), None


def row_norm(name: str, shape: Shape) -> RowNorm:
    """The row norm of this name for use inside a block or a feed-forward; affine if ``shape.norm_affine``.

    Raises ValueError for a norm that mixes time: its state would have no place there.
    """
    cls = NORM[name]
    if not issubclass(cls, RowNorm):
        rows = [n for n in NORM if issubclass(NORM[n], RowNorm)]
        raise ValueError(f"norm={name!r}: must be a norm of a row alone, one of {', '.join(rows)}")
    norm: RowNorm = cls(cls.Config(), shape, affine=shape.norm_affine)
    return norm
