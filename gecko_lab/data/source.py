"""Documents as token arrays, in memory or mapped from a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .tokenizers import Tokenizer


class ShardedTokens:
    """One long token array that lies in several files; a read must not cross a file's edge (documents never do).

    Files are mapped when first read, so that a copy sent to a worker process carries paths and no tokens.
    """

    def __init__(self, paths: list[Path], sizes: list[int], dtype: str) -> None:
        self.paths, self.dtype = paths, dtype
        self.edges = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))])
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        shard = int(np.searchsorted(self.edges, span.start, side="right")) - 1
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.paths[shard], dtype=self.dtype, mode="r")
        base = int(self.edges[shard])
        return self._maps[shard][span.start - base : span.stop - base]


@dataclass(frozen=True)
class TokenSource:
    """Documents: ``tokens[starts[i] : starts[i] + lengths[i]]``, without BOS.

    ``byte_counts`` (256,) int64 counts the bytes of the source text, for its unigram entropy.
    """

    tokens: np.ndarray | ShardedTokens | _Joined
    starts: np.ndarray
    lengths: np.ndarray
    byte_counts: np.ndarray
    fingerprint: str

    @property
    def documents(self) -> int:
        return len(self.starts)

    @property
    def token_count(self) -> int:
        """Tokens without BOS."""
        return int(self.lengths.sum())

    @property
    def byte_count(self) -> int:
        """Bytes of the source text."""
        return int(self.byte_counts.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, without BOS."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def cut(self, longest: int) -> TokenSource:
        """The same tokens with every document cut into pieces of at most ``longest`` tokens."""
        if self.documents == 0 or int(self.lengths.max()) <= longest:
            return self
        pieces = np.maximum(-(-self.lengths // longest), 1)
        owner = np.repeat(np.arange(self.documents), pieces)
        inner = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * longest
        lengths = np.minimum(self.lengths[owner] - inner, longest)
        return replace(self, starts=self.starts[owner] + inner, lengths=lengths)


def encode_documents(texts: Iterable[tuple[str, bytes]], tokenizer: Tokenizer) -> TokenSource:
    """Tokens in memory of (name, UTF-8 text) pairs; the fingerprint covers names and contents."""
    digest, counts = hashlib.sha256(), np.zeros(256, dtype=np.int64)
    arrays: list[np.ndarray] = []
    for name, text in texts:
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        counts += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
        arrays.append(tokenizer.encode(text))
    lengths = np.asarray([len(a) for a in arrays], dtype=np.int64)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=tokenizer.dtype)
    return TokenSource(tokens, np.cumsum(lengths) - lengths, lengths, counts, digest.hexdigest())


def unigram_entropy(counts: np.ndarray) -> float:
    """Bits per byte of the best model that knows only how often each byte occurs."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


class _Joined:
    """The token arrays of several sources as one."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        sizes = [len(p) for p in parts]
        self.edges = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))])

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        part = int(np.searchsorted(self.edges, span.start, side="right")) - 1
        base = int(self.edges[part])
        return self.parts[part][span.start - base : span.stop - base]


def join(sources: list[TokenSource]) -> TokenSource:
    """The documents of several sources, one source after another."""
    joined = _Joined([s.tokens for s in sources])
    return TokenSource(
        joined,
        np.concatenate([s.starts + base for s, base in zip(sources, joined.edges)]),
        np.concatenate([s.lengths for s in sources]),
        np.sum([s.byte_counts for s in sources], axis=0),
        hashlib.sha256("".join(s.fingerprint for s in sources).encode()).hexdigest(),
    )
