"""Moving average with complex (or real) modes in plain PyTorch (spec 3.2), as a chunked linear filter.

Inside a chunk of T steps the output is a Toeplitz product with the taps k_j = Re sum_n gamma p q^j plus what the
entering state adds; only states pass from chunk to chunk. Documents are laid out so that each begins a chunk of its
own: a reset is then a zeroed entering state, and nothing is ever subtracted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


class Layout(NamedTuple):
    """place (B, L): row of each token in the padded (chunks * T) axis; keep (B, chunks): the state enters;
    last (B,) index of the row's last chunk, filled (B,) its tokens."""

    chunks: int
    place: Tensor
    keep: Tensor
    last: Tensor
    filled: Tensor


def layout_of(bos: Tensor, size: int) -> Layout:
    batch, length = bos.shape
    steps = torch.arange(length, device=bos.device)
    since = steps - torch.where(bos, steps, 0).cummax(1).values
    slot = since % size
    chunk = (slot == 0).to(torch.int64).cumsum(1) - 1
    chunks = int(chunk[:, -1].max()) + 1
    begins = torch.zeros(batch, chunks, dtype=torch.int64, device=bos.device).scatter_add(1, chunk, bos.to(torch.int64))
    return Layout(chunks, chunk * size + slot, begins == 0, chunk[:, -1], slot[:, -1] + 1)


def as_real(w: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2N) real, interleaved; real stays."""
    return torch.view_as_real(w.resolve_conj()).flatten(-2) if w.is_complex() else w


def powers_of(q: Tensor, count: int) -> Tensor:
    """q^0 .. q^(count-1), new first axis, by doubling: exact at q = 0, where a logarithm is not."""
    powers = torch.stack([torch.ones_like(q), q])
    while len(powers) < count:
        powers = torch.cat([powers, powers[1:] * powers[-1]])
    return powers[:count]


def entering_states(left: Tensor, decay: Tensor, start: Tensor, keep: Tensor | None) -> Tensor:
    """The state that enters each chunk: h_0 = start and h_{c+1} = decay h_c + left_c, with h_c zeroed where not kept.

    left (B, chunks, D, N), decay (D, N), start (B, D, N), keep (B, chunks) -> (B, chunks, D, N). Two loops of the root
    of the number of chunks: within spans of chunks, for all spans at once, then from span to span.
    """
    chunks = left.shape[1]
    span = math.isqrt(chunks - 1) + 1
    spans = -(-chunks // span)
    left = F.pad(left, (0, 0, 0, 0, 0, spans * span - chunks)).unflatten(1, (spans, span))
    kept = None
    if keep is not None:  # whether a state that enters the span reaches the chunk
        keep = F.pad(keep, (0, spans * span - chunks), value=True).unflatten(1, (spans, span))[..., None, None]
        kept = keep.to(torch.int8).cumprod(2).bool()
    h, within = torch.zeros_like(left[:, :, 0]), []
    for c in range(span):
        if keep is not None:
            h = h.masked_fill(~keep[:, :, c], 0)
        within.append(h)
        h = decay * h + left[:, :, c]
    powers, heads = powers_of(decay, span + 1), [start]
    for s in range(spans - 1):
        passed = powers[span] * heads[-1]
        heads.append(h[:, s] + (passed if kept is None else passed.masked_fill(~kept[:, s, -1], 0)))
    carried = powers[:span] * torch.stack(heads, 1)[:, :, None]
    if kept is not None:
        carried = carried.masked_fill(~kept, 0)
    return (torch.stack(within, 2) + carried).flatten(1, 2)[:, :chunks]


def complex_ema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, *, bos: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    modes = p.shape[1]
    acc = torch.promote_types(x.dtype, torch.float32)
    kind = (torch.complex128 if acc == torch.float64 else torch.complex64) if q.is_complex() else acc
    p, q, gamma = p.to(acc), q.to(kind), gamma.to(kind)
    values = x.to(acc)
    size = min(CHUNK, length)
    layout = None if bos is None else layout_of(bos, size)
    chunks = -(-length // size) if layout is None else layout.chunks

    if layout is None:
        padded = F.pad(values, (0, 0, 0, chunks * size - length))
        final_size = torch.full((batch,), length - (chunks - 1) * size, device=x.device)
    else:
        index = layout.place[..., None].expand_as(values)
        padded = values.new_zeros(batch, chunks * size, dim).scatter(1, index, values)
        final_size = layout.filled
    rows = padded.view(batch * chunks, size, dim).permute(2, 0, 1)  # (D, B chunks, T)

    powers = powers_of(q, size + 1)  # (T+1, D, N)
    ends = as_real((p * powers[:size].flip(0)).transpose(0, 1))  # (D, T, 2N): what step s leaves at the chunk's end
    # (D, 2N, T): real parts of gamma q^(t+1) h, as a product of real and imaginary parts
    reads = as_real((gamma * powers[1:]).transpose(0, 1).conj()).transpose(1, 2)
    taps = (p * gamma * powers[:size]).sum(-1).real.T if q.is_complex() else (p * gamma * powers[:size]).sum(-1).T
    # windows[d, t, j] = taps[d, t - (T-1-j)], so flipping j gives the Toeplitz matrix over s
    toeplitz = F.pad(taps, (size - 1, 0)).unfold(-1, size, 1).flip(-1)  # (D, t, s)

    local = torch.bmm(rows, ends)  # (D, B chunks, 2N)
    local = (
        torch.view_as_complex(local.view(dim, batch, chunks, modes, 2))
        if q.is_complex()
        else local.view(dim, batch, chunks, modes)
    )
    start = local.new_zeros(batch, dim, modes) if state is None else state.to(kind)
    left = local.permute(1, 2, 0, 3)  # (B, chunks, D, N): what each chunk adds
    entering = entering_states(left, powers[size], start, None if layout is None else layout.keep)

    flat = as_real(entering.permute(2, 0, 1, 3)).reshape(dim, batch * chunks, -1)
    out = torch.baddbmm(torch.bmm(rows, toeplitz.transpose(1, 2)), flat, reads)  # (D, B chunks, T)
    y = out.permute(1, 2, 0).reshape(batch, chunks * size, dim)
    y = y[:, :length] if layout is None else y.gather(1, index)

    if layout is None and length % size == 0:
        final = powers[size] * entering[:, -1] + left[:, -1]
    else:
        # The last chunk is partial: its tokens, moved to its end, meet the same weights as a whole chunk's.
        tail = values[:, length - size :]
        inside = torch.arange(size, device=x.device) >= size - final_size[:, None]
        tail = torch.where(inside[..., None], tail, torch.zeros_like(tail))
        added = torch.bmm(tail.permute(2, 0, 1), ends)
        added = torch.view_as_complex(added.view(dim, batch, modes, 2)) if q.is_complex() else added
        if layout is None:
            came = entering[:, -1]
        else:
            came = entering[torch.arange(batch, device=x.device), layout.last]
        final = powers[final_size] * came + added.transpose(0, 1)
    return (y + values).to(x.dtype), final
