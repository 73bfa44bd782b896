"""Loss by position in the document: does a model still gain from what it read long ago?

Bins are powers of two: 0, 1, 2-3, 4-7, 8-15, ... A target's position is that of the token from which it is predicted,
counted from its document's first token in the row (0: the BOS, or the row's first token where a row begins inside a
document: what stands before it cannot be seen).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ..components import Documents

BINS = 40  # positions up to 2^39


def bin_of(positions: Tensor) -> Tensor:
    """Bin of each position: 0 for 0, else 1 + floor(log2(position))."""
    return torch.frexp(positions.double()).exponent.to(torch.int64)


def lower_edge(index: int) -> int:
    """First position of a bin."""
    return 0 if index == 0 else 2 ** (index - 1)


class PositionLoss(Metric):
    """Mean nats of the targets in each bin of positions, over any number of batches and processes."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens"):
            self.add_state(name, torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, tokens: Tensor, bos_id: int | None, scored: Tensor | None = None) -> None:
        """losses (B, L) nats of the targets that follow tokens (B, L); without BOS a row is one document. With
        scored (B, L) bool only these targets count."""
        bos = torch.zeros_like(tokens, dtype=torch.bool) if bos_id is None else tokens == bos_id
        bins, nats = bin_of(Documents.from_bos(bos).positions), losses.detach().double()
        for i in range((tokens.shape[1] - 1).bit_length() + 1):  # sums, as index_add_ varies from run to run on a GPU
            inside = bins == i if scored is None else (bins == i) & scored
            self.nats[i] += (nats * inside).sum()
            self.tokens[i] += inside.sum()

    def compute(self) -> list[dict[str, float]]:
        """One entry {position, loss, tokens} for each bin that has tokens; position is its first."""
        return [
            {"position": lower_edge(i), "loss": n / t, "tokens": t}
            for i, (n, t) in enumerate(zip(self.nats.tolist(), self.tokens.tolist()))
            if t
        ]
