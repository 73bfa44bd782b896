"""Reading with a state: pieces of any length by the model itself, single tokens by a decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..components import state as states
from ..decoder import Decoder
from ..errors import LabError
from ..model import LanguageModel, ModelState

PIECE = 8192


@torch.no_grad()
def read(
    model: LanguageModel,
    tokens: Tensor,
    state: ModelState | None = None,
    *,
    bos_id: int | None = None,
    piece: int = PIECE,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, ModelState]:
    """Read a prompt (B, L) of any length in pieces: logits (B, V) of the token after it, and the state.

    The tokens may lie elsewhere than the model; ``progress`` is told how many more of the L tokens were read.
    """
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token (a document starts with BOS)")
    device = model.embed.weight.device
    for part in tokens.split(piece, dim=1):
        features, state = model.features(part.to(device), state, bos_id)
        progress(part.shape[1])
    assert state is not None
    return model.head(features[:, -1]).float(), state


def check_tokens(model: LanguageModel, tokens: Tensor) -> None:
    """Raise LabError for an id that the model does not know; the tokens are best on the CPU."""
    if tokens.numel():
        low, high, known = int(tokens.min()), int(tokens.max()), model.config.vocab_size
        if low < 0 or high >= known:
            bad = low if low < 0 else high
            raise LabError(f"unknown token {bad}: this model knows the ids 0 to {known - 1}")


class Reader:
    """A model and ``batch`` streams that stand at the same position.

    A call that fails or is interrupted in ``read`` leaves the state as it was before it.
    """

    def __init__(self, model: LanguageModel, batch: int = 1, *, bos_id: int | None = None,
                 state: ModelState | None = None, piece: int = PIECE) -> None:
        self.model, self.batch, self.bos_id, self.piece = model, batch, bos_id, piece
        self._state = state
        self._decoder: Decoder | None = None

    @property
    def state(self) -> ModelState | None:
        """What was read so far; None at the start."""
        if self._decoder is not None:  # given up here: its buffers and the copy need not both be kept
            self._state, self._decoder = self._decoder.state, None
        return self._state

    @state.setter
    def state(self, state: ModelState | None) -> None:
        self._state, self._decoder = state, None

    def read(self, tokens: Tensor, progress: Callable[[int], None] = lambda count: None) -> Tensor:
        """tokens (B, L) -> logits (B, V) of the token after them."""
        logits, self._state = read(
            self.model, tokens, self.state, bos_id=self.bos_id, piece=self.piece, progress=progress
        )
        return logits

    def step(self, tokens: list[int]) -> Tensor:
        """One token for each stream -> logits (B, V) of the token after it."""
        if self._decoder is None:
            self._decoder = Decoder(self.model, self._state, self.batch, bos_id=self.bos_id)
        return self._decoder.step(torch.tensor(tokens, device=self.model.embed.weight.device))

    def keep(self, rows: list[int]) -> None:
        """Go on with these streams only."""
        self.state = states.rows(self.state, rows)
        self.batch = len(rows)
