"""Loss, perplexity and bits per byte over any number of batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageMetrics(Metric):
    """Sums nats, tokens and source bytes; ``compute`` gives loss (nats a token), perplexity and bits per byte.

    Bits per byte = nats / ln 2 / bytes compares models whatever their tokenizers are: the bytes are those of the text
    that the targets stand for, and a document's end costs nats but no byte.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, source_bytes: Tensor | int) -> None:
        """losses (B, L) nats of each token; source_bytes: how many bytes of text they stand for."""
        self.nats += losses.detach().double().sum()
        self.tokens += losses.numel()
        self.bytes += source_bytes

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        return {
            "loss": loss.float(),
            "perplexity": loss.exp().float(),
            "bits_per_byte": (self.nats / math.log(2) / self.bytes.clamp(min=1)).float(),
        }
