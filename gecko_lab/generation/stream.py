"""Tokens that continue prompts of one length, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..model import LanguageModel
from .reading import Reader
from .sampling import Chooser, Sampling, mark_seen


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    length: int,
    *,
    bos_id: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Tensor]:
    """Yield ``length`` tokens (B,) that continue the prompt (B, L); ids from ``vocab_size`` on are never chosen.

    Row i has the seed ``seeds[i]``, else ``seed + i``. For texts, stop strings, prompts of different lengths or a state
    to keep: ``Session`` and ``Batch``. Raises LabError for options out of range.
    """
    rows = prompt.shape[0]
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    device, training = model.embed.weight.device, model.training
    seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
    mark_seen(seen, prompt, bos_id)
    seeds = range(seed, seed + rows) if seeds is None else seeds
    chooser = Chooser(sampling, seeds, vocab_size=vocab_size, bos_id=bos_id, seen=seen)
    model.eval()
    try:
        reader = Reader(model, rows, bos_id=bos_id)
        logits = reader.read(prompt, progress)
        for made in range(length):
            tokens = chooser.choose(logits)
            yield torch.tensor(tokens, device=device)
            if made + 1 < length:
                logits = reader.step(tokens)
    finally:
        model.train(training)
