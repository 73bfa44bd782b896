"""Rows longer than memory allows: a row is cut inside the step, the state carried with its gradient between the cuts.

Each piece is one activation checkpoint around the model's features and their losses, so that a step holds the
activations of one piece, and of the others only the states between them. Losses and gradients are those of the row.
"""

from __future__ import annotations

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
) -> tuple[Tensor, ModelState]:
    """Nats of every target (B, L) float32 and the state after the row; tokens, targets (B, L) int64.

    ``piece_len`` tokens are in memory at once, 0: all L; ``loss_chunk`` positions have their logits at once.
    """

    def piece(x: Tensor, y: Tensor, before: ModelState | None) -> tuple[Tensor, ModelState]:
        features, after = model.features(x, before, bos_id)
        return token_losses(features, model.head.weight, y, loss_chunk), after

    length = tokens.shape[1]
    if piece_len == 0 or piece_len >= length:
        return piece(tokens, targets, state)
    losses = []
    for x, y in zip(tokens.split(piece_len, 1), targets.split(piece_len, 1)):
        if torch.is_grad_enabled():
            part, state = checkpoint(piece, x, y, state, use_reentrant=False)
        else:
            part, state = piece(x, y, state)
        losses.append(part)
    assert state is not None
    return torch.cat(losses, 1), state
