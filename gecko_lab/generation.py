"""Sampling from a model as a stream: the prompt is read in pieces, then one token at a time, in constant memory."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .data.tokenizers import Tokenizer
from .model import LanguageModel, ModelState

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


def pick(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
) -> Tensor:
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
def generate(
    model: LanguageModel,
    prompt: Tensor,
    length: int,
    *,
    bos_id: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Tensor]:
    """Yield ``length`` tokens (B,) that continue the prompt (B, L); ids from ``vocab_size`` on are never chosen."""
    training = model.training
    model.eval()
    try:
        logits, state = read(model, prompt, bos_id=bos_id, progress=progress)
        for made in range(length):
            token = pick(logits[:, :vocab_size], temperature=temperature, top_k=top_k, generator=generator)
            yield token
            if made + 1 < length:
                features, state = model.features(token[:, None], state, bos_id)
                logits = model.head(features[:, -1]).float()
    finally:
        model.train(training)


class TextStream:
    """Tokens to text as they come: characters whole, and all of them together what ``decode`` says of the tokens."""

    LONGEST = 16  # tokens that may wait for the rest of a character

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.name == "bytes" else None
        self._shown: list[int] = []  # the tokens of the last text: a decoder may join or space what follows them
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([token]) if token < 256 else b"")
        self._waiting.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._waiting) < self.LONGEST:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """What still waits, broken characters replaced."""
        text = self._bytes.decode(b"", final=True) if self._bytes is not None else self._text()
        self._waiting = []
        return text

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._waiting)[len(before) :]
