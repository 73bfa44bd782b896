"""Sampling from a model as a stream: the prompt is read in pieces, then one token at a time, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .model import LanguageModel, ModelState


def read(model: LanguageModel, tokens: Tensor, state: ModelState | None = None, *, bos_id: int | None = None,
         piece: int = 8192) -> tuple[Tensor, ModelState]:
    """Read a prompt (B, L) of any length in pieces: logits (B, V) of the token after it, and the state."""
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token (a document starts with BOS)")
    for part in tokens.split(piece, dim=1):
        features, state = model.features(part, state, bos_id)
    assert state is not None
    return model.head(features[:, -1]).float(), state


def pick(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """One token id (B,) from logits (B, V); temperature 0 is greedy, top_k 0 keeps all."""
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature={temperature}, top_k={top_k}: neither may be negative")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, length: int, *, bos_id: int | None = None, temperature: float = 1.0,
             top_k: int = 0, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yield ``length`` tokens (B,) that continue the prompt (B, L)."""
    training = model.training
    model.eval()
    try:
        logits, state = read(model, prompt, bos_id=bos_id)
        for _ in range(length):
            token = pick(logits, temperature=temperature, top_k=top_k, generator=generator)
            yield token
            features, state = model.features(token[:, None], state, bos_id)
            logits = model.head(features[:, -1]).float()
    finally:
        model.train(training)
