"""Token after token: one step of a model for each row of a batch, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .components import state as states
from .decode_graph import GraphStep, unsupported
from .kernels import backend
from .model import LanguageModel, ModelState


class Decoder:
    """Feeds a model one token a row at a time, in constant memory.

    ``state`` is what a call of the model left, its tensors with ``batch`` rows, or None for the start of a stream; it
    is not changed. With ``bos_id`` that token begins a new document in its row. The model's weights must not change
    while a decoder lives. On a GPU a step is one CUDA graph where ``decode_graph.unsupported`` has nothing against it,
    else the model's own call: logged once, an error under kernels=strict. Raises ValueError where the rows of ``state``
    are not ``batch``.
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
        self._graph = self._captured()

    def _captured(self) -> GraphStep | None:
        weight = self.model.embed.weight
        if not weight.is_cuda or backend.get_mode() == "reference":
            return None
        reason = unsupported(self.model)
        if reason is not None:
            backend.note("decode_step", reason)
            return None
        with torch.inference_mode(False), torch.no_grad():  # its buffers are written in place wherever steps are taken
            made = GraphStep(self.model, self._state, self.batch, self.bos_id)
        self._state = None
        return made

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 -> logits (B, V) float32 of the token after them."""
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens: expected ({self.batch},), a token for each row, got {tuple(tokens.shape)}")
        if self._graph is not None:
            return self._graph.step(tokens)
        features, self._state = self.model.features(tokens[:, None], self._state, self.bos_id)
        return self.model.head(features[:, 0]).float()

    @property
    @torch.no_grad()
    def state(self) -> ModelState:
        """The state after the last step, which any call of the model can continue.

        Raises RuntimeError at the start of a stream, where there is none.
        """
        if self._graph is not None and self._graph.read:
            return self._graph.state()
        if self._state is None:
            raise RuntimeError("state: nothing was read yet; take a step first")
        return self._state
