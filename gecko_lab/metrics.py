"""Loss, perplexity, bits per byte and accuracy over any number of batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageMetrics(Metric):
    """Sums nats, tokens, source bytes and right answers; ``compute`` gives loss (nats a token) and perplexity, and

    - of text bits_per_byte = nats / ln 2 / bytes, which compares models whatever their tokenizers are: the bytes are
      those of the text that the targets stand for, and a document's end costs nats but no byte;
    - of a task accuracy, the share of the scored targets that are the likeliest token, and exact, the share of the rows
      in which all are.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    hits: Tensor
    exact: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes", "hits", "exact", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, losses: Tensor, source_bytes: Tensor | int, scored: Tensor | None = None, hits: Tensor | None = None
    ) -> None:
        """losses (B, L) nats of each token; source_bytes: how many bytes of text they stand for.

        Of a task scored (B, L) bool, the targets that count, and hits (B, L), 1 where the answer is right.
        """
        self.nats += losses.detach().double().sum()
        self.bytes += source_bytes
        if scored is None or hits is None:
            self.tokens += losses.numel()
            return
        self.tokens += scored.sum()
        right = (hits > 0) & scored
        self.hits += right.sum()
        self.exact += (right == scored).all(-1).sum()
        self.rows += len(scored)

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        found = {"loss": loss, "perplexity": loss.exp()}
        if self.rows:
            found |= {"accuracy": self.hits / self.tokens, "exact": self.exact / self.rows}
        else:
            found["bits_per_byte"] = self.nats / math.log(2) / self.bytes.clamp(min=1)
        return {name: value.float() for name, value in found.items()}
