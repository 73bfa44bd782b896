"""Causal attention inside documents, chunks and windows without a mask: torch's flash attention over packed sequences.

A sequence is a maximal run of keys of one row, document and chunk. Its queries are the last of them, because what a
call holds is keys read before and then the call's own tokens.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils.weak import WeakTensorKeyDictionary

from .buffer import KeyValues

varlen_attn: Any = varlen.varlen_attn
WIDEST = 256  # features of a head
_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters


class Sequences(NamedTuple):
    """Where the sequences begin, and the end: (N + 1,) int32 among all queries, and among all keys; longest of each."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    def alike(self, queries: int, keys: int) -> bool:
        """Whether all are as long as the longest, and their queries are all of their keys."""
        count = len(self.queries) - 1
        return self.most_queries * count == queries and self.most_keys * count == keys and queries == keys


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why `attend` cannot serve q (B, L, H, S), v (B, M, H, E); None: it can."""
    if not _WINDOWS:
        return f"torch {torch.__version__} has no windows in varlen_attn"
    if q.dtype not in (torch.bfloat16, torch.float16) or v.dtype != q.dtype:
        return f"q is {q.dtype} and v {v.dtype}: flash attention takes bfloat16 and float16"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads of {q.shape[-1]} and {v.shape[-1]} features: flash attention takes at most {WIDEST}"
    return _too_old(q.get_device())


@torch._dynamo.assume_constant_result
def _too_old(device: int) -> str | None:
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    return None if able else "flash attention needs compute capability 8.0"


@torch.compiler.disable  # how many sequences there are depends on the data
def attend(q: Tensor, keys: KeyValues, *, chunk: int | None = None, window: int | None = None) -> Tensor:
    """q (B, L, H, S), scaled, and the M >= L keys whose last L are the queries' own -> y (B, L, H, E).

    A query sees itself and the keys before it: of its document where ``keys.segments`` tells them apart, of its chunk,
    the first key being the first of one, and of the last ``window``.
    """
    batch, length, heads, _ = q.shape
    found = sequences(keys.segments, batch, length, keys.length, chunk, q.device)
    if window is None and found.alike(batch * length, batch * keys.length):  # no document cuts a chunk or row
        q, k, v = (x.reshape(-1, found.most_keys, *x.shape[2:]).transpose(1, 2) for x in (q, keys.k, keys.v))
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # the fastest that torch has
        return whole.transpose(1, 2).reshape(batch, length, heads, -1)
    # Flash attention knows one width of head, in steps of 8; zeros change neither scores nor values.
    width = -(-max(q.shape[-1], keys.v.shape[-1]) // 8) * 8
    packed = (F.pad(x, (0, width - x.shape[-1])).flatten(0, 1) for x in (q, keys.k, keys.v))
    y: Tensor = varlen_attn(*packed, *found, scale=1.0, window_size=(-1 if window is None else window - 1, 0))
    return y[..., : keys.v.shape[-1]].view(batch, length, heads, -1)


_found: Any = WeakTensorKeyDictionary()  # every layer of a model asks with the same segments


def sequences(
    segments: Tensor | None, batch: int, length: int, total: int, chunk: int | None, device: torch.device
) -> Sequences:
    """Cut B rows of M = total keys, of which the last ``length`` are queries, by segments (B, M) and chunks of keys.

    Finding documents waits for the GPU, once a batch.
    """
    if segments is None:
        return _cut(torch.arange(batch) * total, batch, length, total, device)
    known = _found.setdefault(segments, {})
    if (length, chunk) not in known:
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        if chunk is not None:
            starts[:, ::chunk] = True
        known[length, chunk] = _cut(starts.flatten().nonzero().squeeze(1).cpu(), batch, length, total, device)
    cut: Sequences = known[length, chunk]
    return cut


def _cut(first: Tensor, batch: int, length: int, total: int, device: torch.device) -> Sequences:
    """first (N,), on the CPU: the index of each sequence's first key among all B M."""
    row, place = first // total, first % total
    queries = row * length + (place - (total - length)).clamp(min=0)
    both = [torch.cat((x, x.new_tensor([batch * n]))) for x, n in ((queries, length), (first, total))]
    longest = [int(x.diff().max()) for x in both]
    found = [x.to(device, torch.int32, non_blocking=True) for x in both]
    return Sequences(found[0], found[1], *longest)
