"""How likely a model finds continuations of texts: the arithmetic under multiple choice, LAMBADA and the harness.

A text and its continuation are tokenised together and cut where the text's own tokens end, so that a token never
reaches over the cut in one place and not in another; white space at the text's end goes to the continuation, where a
tokenizer that joins a space to the following word wants it. The text begins with BOS: it is a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.tokenizers import Tokenizer
from .base import Column, Progress, nothing
from .files import share
from .subject import Scored, Subject

PIECE = 8192  # tokens of a row that are read at once
AT_ONCE = 32768  # tokens of all rows of a batch that are read at once


class Pair(NamedTuple):
    """Tokens of a text, BOS first, and of what continues it; both have at least one."""

    text: np.ndarray
    continuation: np.ndarray


def pair(tokenizer: Tokenizer, text: str, continuation: str) -> Pair:
    """The tokens of both. Raises ValueError for a continuation without tokens."""
    kept = text.rstrip()
    both = tokenizer.encode(kept + text[len(kept) :] + continuation).astype(np.int64)
    start = len(tokenizer.encode(kept))
    if start >= len(both):
        raise ValueError(f"nothing to score: {continuation!r} after {text[-40:]!r} has no token of its own")
    return Pair(np.concatenate([[tokenizer.bos_id], both[:start]]), both[start:])


def score(subject: Subject, pairs: Sequence[Pair], progress: Progress = nothing) -> Scored:
    """Nats, tokens, tokens that greedy decoding would choose, and whether it would choose all: one of each a pair.

    Rows of similar length are read side by side, long ones in pieces with the state carried.
    """
    count = len(pairs)
    found = Scored(np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, bool))
    order = sorted(range(count), key=lambda i: (-len(pairs[i].text) - len(pairs[i].continuation), i))
    done = 0
    while done < count:
        longest = len(pairs[order[done]].text) + len(pairs[order[done]].continuation) - 1
        rows = order[done : done + max(1, AT_ONCE // min(longest, PIECE))]
        nats, right = _batch(subject, [pairs[i] for i in rows], longest)
        found.nats[rows], found.right[rows] = nats, right
        found.tokens[rows] = [len(pairs[i].continuation) for i in rows]
        done += len(rows)
        progress(done, count)
    found.exact[:] = found.right == found.tokens
    return found


WORTH = (
    Column("rows", "rows", ",d"), Column("exact", "exact", ".1%"), Column("exact_error", "+-", ".1%"),
    Column("token_accuracy", "tokens right", ".1%"), Column("nats", "nats a token", ".3f"),
    Column("gain", "gain", "+.3f"),
)  # fmt: skip


def worth(nats: np.ndarray, tokens: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """What ``WORTH`` shows, from ``score``'s numbers as (n, 2): after the text with what is asked for, and without it.

    ``gain`` is how many nats a token cheaper the answer is with it.
    """
    exact, error = share(right[:, 0] == tokens[:, 0])
    each = nats / tokens
    return {
        "rows": len(nats), "exact": exact, "exact_error": error,
        "token_accuracy": float(right[:, 0].sum() / tokens[:, 0].sum()),
        "nats": float(each[:, 0].mean()), "gain": float((each[:, 1] - each[:, 0]).mean()),
    }  # fmt: skip


def _batch(subject: Subject, pairs: list[Pair], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and right tokens of rows of at most ``length`` tokens; what pads a row follows it and changes nothing."""
    read, targets = (np.zeros((len(pairs), length), np.int64) for _ in range(2))
    scored = np.zeros((len(pairs), length), bool)
    for row, (text, continuation) in enumerate(pairs):
        whole = np.concatenate([text, continuation])
        read[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
        scored[row, len(text) - 1 : len(whole) - 1] = True
    nats = torch.zeros(len(pairs), dtype=torch.float64, device=subject.device)
    right = torch.zeros(len(pairs), dtype=torch.int64, device=subject.device)
    state = None
    for begin in range(0, length, PIECE):
        part = slice(begin, begin + PIECE)
        features, state = subject.features(torch.from_numpy(read[:, part]), state)
        rows, at = (torch.from_numpy(i).to(subject.device) for i in scored[:, part].nonzero())
        if len(rows):
            wanted = torch.from_numpy(targets[:, part]).to(subject.device)[rows, at]
            losses, best = _against(subject, features[rows, at], wanted)
            nats.index_add_(0, rows, losses.double())
            right.index_add_(0, rows, best.long())
    return nats.cpu().numpy(), right.cpu().numpy()


def _against(subject: Subject, features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Nats (n,) of the wanted tokens and whether each is the most likely, the logits of few positions at a time."""
    losses, best = [], []
    for x, y in zip(features.split(2048), wanted.split(2048), strict=True):
        logits = subject.logits(x)
        losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="none"))
        best.append(logits.argmax(-1) == y)
    return torch.cat(losses), torch.cat(best)
