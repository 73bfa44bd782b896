"""Where documents begin in a batch: derived from the tokens once, read by every component.

A document begins at a BOS token and nothing leaks across (spec 7.1). Tokens before the first BOS of a
stream form segment 0. A stream is read in pieces of any length: the ``Cursor`` that one call returns
makes the next call's ids and positions continue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cursor(NamedTuple):
    """Where each row of a stream stands: (B,) int64 id of the open document, (B,) int64 tokens read of it."""

    segment: Tensor
    length: Tensor


class Documents(NamedTuple):
    """bos (B, L) bool; segments (B, L) int64, never decreasing along a row; positions (B, L) int64 from the
    document's first token (a document that was open when the piece began continues its count)."""

    bos: Tensor
    segments: Tensor
    positions: Tensor

    @property
    def cursor(self) -> Cursor:
        """What the next piece of the stream needs."""
        return Cursor(self.segments[:, -1], self.positions[:, -1] + 1)

    @staticmethod
    def from_bos(bos: Tensor, cursor: Cursor | None = None) -> Documents:
        """From the mask of first tokens, bos (B, L) bool, and the cursor of the piece before (None: start)."""
        batch, length = bos.shape
        if cursor is None:
            zero = torch.zeros(batch, dtype=torch.int64, device=bos.device)
            cursor = Cursor(zero, zero)
        segments = cursor.segment[:, None] + bos.to(torch.int64).cumsum(1)
        steps = torch.arange(length, device=bos.device).expand(batch, length)
        started = torch.where(bos, steps, -1).cummax(1).values  # index of the last BOS so far, -1: none in this piece
        positions = torch.where(started >= 0, steps - started, cursor.length[:, None] + steps)
        return Documents(bos, segments, positions)

    @staticmethod
    def from_tokens(tokens: Tensor, bos_id: int, cursor: Cursor | None = None) -> Documents:
        """From tokens (B, L): a document begins wherever the token is ``bos_id``."""
        return Documents.from_bos(tokens == bos_id, cursor)
