"""The states that operations carry from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NormState(NamedTuple):
    """count (B,) int64 steps since the document began; mean, var (B, G) float32 or wider.

    For the cumulative norm, mean and var are the moments of all that was seen (spec 1.1); for the decayed norm they
    are the decayed sums before bias correction (spec 1.2).
    """

    count: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    mean: Tensor
    var: Tensor


class AttentionState(NamedTuple):
    """Keys k (B, M, H, S) and values v (B, M, H, E) since the start of the previous chunk, M <= 2C; their segments
    (B, M) int64, or None while the stream has no document ids; position: tokens read so far, the same in all rows."""

    k: Tensor
    v: Tensor
    segments: Tensor | None
    position: int


class MemoryState(NamedTuple):
    """State of the adaptive working memory (spec 5.2), of constant size.

    table (B, H, S, E) and logz (B, H, S) hold the chunks folded so far, all of the document ``owner`` (B,).
    The last ``lag`` chunks are not folded yet. Each is kept as three sums over the tokens of its last document
    (``ends`` (B, lag), -1: none), oldest first and the open chunk last: ``lam`` (B, lag, H, S) the logsumexp of the
    keys, ``mix`` (B, lag, H, S, S) and ``target`` (B, lag, H, S, E) the key-weighted means of softmax(key) and value.
    ``current`` (B,) is the document of the last token read. ``position``: tokens read so far. "Nothing" in logz and
    lam is -1e30, which unlike -inf keeps gradients finite.
    """

    table: Tensor
    logz: Tensor
    owner: Tensor
    lam: Tensor
    mix: Tensor
    target: Tensor
    ends: Tensor
    current: Tensor
    position: int
