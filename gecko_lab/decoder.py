"""Token after token: one step of a model for each row of a batch, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .components import state as states
from .model import LanguageModel, ModelState


class Decoder:
    """Feeds a model one token a row at a time, in constant memory.

    ``state`` is what a call of the model left, its tensors with ``batch`` rows, or None for the start of a stream; it
    is not changed. With ``bos_id`` that token begins a new document in its row. The model's weights must not change
    while a decoder lives. Raises ValueError where the rows of ``state`` are not ``batch``.
    """

    def __init__(self, model: LanguageModel, state: ModelState | None, batch: int, *, bos_id: int | None = None,
                 ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: must be at least 1")
        rows = {t.shape[0] for t in states.tensors(state)}
        if rows - {batch}:
            raise ValueError(f"state: its tensors have {rows} rows; a decoder of batch={batch} needs as many")
        self.model, self.batch, self.bos_id = model, batch, bos_id
        self._state = state

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 -> logits (B, V) float32 of the token after them."""
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens: expected ({self.batch},), a token for each row, got {tuple(tokens.shape)}")
        features, self._state = self.model.features(tokens[:, None], self._state, self.bos_id)
        return self.model.head(features[:, 0]).float()

    @property
    def state(self) -> ModelState:
        """The state after the last step, which any call of the model can continue.

        Raises RuntimeError at the start of a stream, where there is none.
        """
        if self._state is None:
            raise RuntimeError("state: nothing was read yet; take a step first")
        return self._state
