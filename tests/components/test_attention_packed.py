"""Attention over packed sequences: what flash attention is told must mean what the masks mean."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gecko_lab import laws
from gecko_lab.components.attention import Attention, packed

C = laws.TINY.chunk_size
NAMES = [("full", None), ("chunk", None), ("sliding_window", None), ("sliding_window", 3)]


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What torch documents of varlen_attn: each sequence by itself, causal from its last query and key backwards."""
    assert (window_size[1], len(cu_q)) == (0, len(cu_k))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        row, column = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        seen = column <= row
        if window_size[0] >= 0:
            seen = seen & (row - column <= window_size[0])
        logits = torch.einsum("qhs,khs->hqk", q[a:b], k[c:d]) * scale
        parts.append(torch.einsum("hqk,khe->qhe", logits.masked_fill(~seen, -math.inf).softmax(-1), v[c:d]))
    return torch.cat(parts)


@pytest.mark.parametrize("packs", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("cuts", [[29], [13, 1, 15], [8, 8, 13]], ids=str)
@pytest.mark.parametrize(("name", "window"), NAMES, ids=str)
def test_sequences_mean_what_the_masks_mean(
    name: str, window: int | None, cuts: list[int], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if window is None else {"window": window}
    s = laws.Subject("attention", name, dataclasses.replace(laws.TINY), options)
    documents = laws.random_documents(2, 29) if packs else None
    inputs = s.inputs(2, 29)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        state, found, at = None, [], 0
        for size in cuts:
            piece = None if documents is None else documents._make(x[:, at : at + size] for x in documents)
            y, state = s.module.attend(*(x[:, at : at + size] for x in leaves), piece, state)
            found.append(y)
            at += size
        out = torch.cat(found, 1)
        random = torch.Generator().manual_seed(1)
        return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=random).to(out))]

    masked = run()
    monkeypatch.setattr(packed, "varlen_attn", plain_varlen)
    monkeypatch.setattr(Attention, "flash", lambda *_: True)
    for a, b in zip(run(), masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_documents_are_found_once_for_all_layers() -> None:
    segments = laws.random_documents(2, 29).segments
    first = packed.sequences(segments, 2, 29, 29, None, segments.device)
    assert packed.sequences(segments, 2, 29, 29, None, segments.device) is first
    assert packed.sequences(segments, 2, 29, 29, C, segments.device) is not first
