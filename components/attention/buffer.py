"""Keys and values kept from one call to the next, with the documents they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents


class KeyValues(NamedTuple):
    """k (B, M, H, S) rotated, v (B, M, H, E), segments (B, M) int64 or None (one document); tokens read so far."""

    k: Tensor
    v: Tensor
    segments: Tensor | None
    position: int

    @property
    def length(self) -> int:
        """M, keys held."""
        return self.k.shape[1]

    def last(self, count: int) -> KeyValues:
        """Only the last ``count`` keys."""
        if count >= self.length:
            return self
        drop = self.length - count
        segments = None if self.segments is None else self.segments[:, drop:].clone()
        # clones: a view would keep the keys of the whole call alive
        return self._replace(k=self.k[:, drop:].clone(), v=self.v[:, drop:].clone(), segments=segments)

    def padded(self, before: int, after: int) -> KeyValues:
        """With slots of zeros around it, which belong to no document (segment -1)."""
        k, v = (F.pad(x, (0, 0, 0, 0, before, after)) for x in (self.k, self.v))
        segments = self.segments
        if segments is not None:
            segments = F.pad(segments, (before, after), value=-1)
        return self._replace(k=k, v=v, segments=segments)


def extend(state: KeyValues | None, k: Tensor, v: Tensor, documents: Documents | None) -> KeyValues:
    """The buffered keys and values followed by new ones (B, L, H, .); keys read without documents are of segment 0.

    Raises ValueError when earlier calls of the stream had documents and this one has none.
    """
    segments = None if documents is None else documents.segments
    if state is None:
        return KeyValues(k, v, segments, k.shape[1])
    if segments is not None:
        old = segments.new_zeros(state.k.shape[:2]) if state.segments is None else state.segments
        segments = torch.cat((old, segments), 1)
    elif state.segments is not None:
        raise ValueError("documents=None: earlier calls of this stream had documents, so this one needs them too")
    return KeyValues(torch.cat((state.k, k), 1), torch.cat((state.v, v), 1), segments, state.position + k.shape[1])


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """(A, 1, Q, K) bool from segments (A, Q) and (A, K)."""
    return queries[:, None, :, None] == keys[:, None, None, :]
