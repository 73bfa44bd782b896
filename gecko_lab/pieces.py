"""Rows longer than memory allows: a row is cut inside the step, the state carried with its gradient between the cuts.

Each piece is one activation checkpoint around the model's features and their losses, so that a step holds the
activations of one piece, and of the others only the states between them. Losses and gradients are those of the row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .loss import token_losses
from .model import LanguageModel, ModelState


def row_losses(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    state: ModelState | None = None,
    bos_id: int | None = None,
    *,
    piece_len: int = 0,
    loss_chunk: int = 4096,
    scored: Tensor | None = None,
    measure: Callable[..., Tensor] = token_losses,
) -> tuple[Tensor, ModelState]:
    """Nats of every target (B, L) float32 and the state after the row; tokens, targets (B, L) int64.

    ``piece_len`` tokens are in memory at once, 0: all L; ``loss_chunk`` positions have their logits at once. With
    ``scored`` (B, L) bool only these targets count. ``measure`` may take another measure of a target than its nats.
    """

    def piece(x: Tensor, y: Tensor, s: Tensor | None, before: ModelState | None) -> tuple[Tensor, ModelState]:
        features, after = model.features(x, before, bos_id)
        return measure(features, model.head.weight, y, loss_chunk, s), after

    length = tokens.shape[1]
    if piece_len == 0 or piece_len >= length:
        return piece(tokens, targets, scored, state)
    losses = []
    for start in range(0, length, piece_len):
        x, y, s = (None if t is None else t[:, start : start + piece_len] for t in (tokens, targets, scored))
        if torch.is_grad_enabled():
            part, state = checkpoint(piece, x, y, s, state, use_reentrant=False)
        else:
            part, state = piece(x, y, s, state)  # type: ignore[arg-type]
        losses.append(part)
    assert state is not None
    return torch.cat(losses, 1), state
