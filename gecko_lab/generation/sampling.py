"""Which token comes next: penalty, temperature, top-k, top-p, min-p, and one draw.

The order is that of Hugging Face's generation: repetition penalty, temperature, top-k, top-p (of what top-k left),
min-p. A draw needs one uniform number, taken from a generator of its own for each row, so a row's text depends on its
seed and not on the rows beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import LabError

RULES = {
    "temperature": (lambda v: 0 <= v < float("inf"), "a number from 0 (always the likeliest token) on"),
    "top_k": (lambda v: v >= 0, "a whole number; 0 keeps all tokens"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 (keeps all tokens) to 1"),
    "repetition_penalty": (lambda v: 0 < v < float("inf"), "above 0; 1 is none, above 1 makes repetition rarer"),
    "seed": (lambda v: v >= 0, "a whole number from 0 on"),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises LabError for a value that is out of range."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # choose among the K likeliest; 0: all
    top_p: float = 1.0  # choose among the fewest tokens that together have this probability (nucleus)
    min_p: float = 0.0  # choose among tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # logits of tokens that were read or made: positive ones divided, others multiplied
    seed: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, (allowed, text) = getattr(self, item.name), RULES[item.name]
            if not allowed(value):
                raise LabError(f"{item.name}={value}: must be {text}")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V) less attractive where ``seen`` (B, V) bool: positive ones divided, the others multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) float64 of logits (B, V): temperature (not 0), then the filters.

    A filter keeps at least the likeliest token; of equally likely ones the lower ids come first.
    """
    logits = logits.double()
    logits = (logits - logits.max(-1, keepdim=True).values) / sampling.temperature
    probabilities = logits.softmax(-1)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        likelier = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))  # probability of all tokens before
        ordered = ordered * (likelier < sampling.top_p)
    if sampling.min_p:
        ordered = ordered * (ordered >= sampling.min_p * ordered[:, :1])
    return torch.zeros_like(ordered).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution of (B, V) passes ``uniform`` (B,), in [0, 1)."""
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


def mark_seen(seen: Tensor, tokens: Tensor, bos_id: int | None, rows: Sequence[int] | None = None) -> None:
    """Set ``seen`` (B, V) bool, in place, for tokens (B, L) other than BOS; or for tokens of ``rows`` of it alone."""
    chosen = torch.arange(seen.shape[0]) if rows is None else torch.tensor(list(rows))
    seen[chosen[:, None], tokens.to("cpu")] = True
    if bos_id is not None and bos_id < seen.shape[1]:
        seen[:, bos_id] = False


class Chooser:
    """Chooses a token a row, call after call; ``seeds`` has one for each row.

    ``seen`` (B, V) bool is what the repetition penalty counts: the tokens of the prompt and of the answer, and never
    BOS, which is no text and which a penalty would keep from ending the document. It is brought up to date. Ids from
    ``vocab_size`` on are never chosen.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], *, vocab_size: int | None = None,
                 bos_id: int | None = None, seen: Tensor | None = None) -> None:
        self.sampling, self.vocab_size, self.bos_id, self.seen = sampling, vocab_size, bos_id, seen
        self._random = [random.Random(seed) for seed in seeds]

    @torch.no_grad()
    def choose(self, logits: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """Tokens from logits (B, V), of all rows or of ``rows`` alone. LabError: a logit that decides is not finite."""
        chosen = range(len(self._random)) if rows is None else rows
        logits = (logits if rows is None else logits[list(rows)])[:, : self.vocab_size]
        if self.seen is not None and self.sampling.repetition_penalty != 1:
            seen = (self.seen if rows is None else self.seen[list(rows)])[:, : self.vocab_size]
            logits = penalise(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            best = logits.max(-1)
            tokens, sure = best.indices, best.values.isfinite()
        else:
            probabilities = distribution(logits, self.sampling)
            uniform = [self._random[row].getrandbits(32) / 2**32 for row in chosen]
            tokens = draw(probabilities, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
            sure = probabilities.sum(-1).isfinite()
        found = torch.where(sure, tokens, -1).tolist()
        if min(found) < 0:
            raise LabError("the model's logits are not finite: its training diverged, or its weights overflow here")
        if self.seen is not None:
            mark_seen(self.seen, torch.tensor(found)[:, None], self.bos_id, rows)
        return found

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self._random = [self._random[row] for row in rows]
        self.seen = None if self.seen is None else self.seen[rows]
