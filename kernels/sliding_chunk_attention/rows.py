"""The row kernels of sliding-chunk attention: attention.cu on a CUDA device, the same in PyTorch elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import Kernel, Module
from .plan import Band, Rectangle

_MODULE = Module(__file__, "attention.cu", kernels=("softmax_rows", "softmax_rows_backward"))
_PLACE = "PPIqiiiiiiiiiiii"
_MASK32 = 0xFFFFFFFF
LARGEST_CHUNK = 16384


@dataclass(frozen=True)
class Rows:
    """What all row kernels of a call share: starts (B, T) int32 or None, seed (1,) int64 or None, sizes."""

    starts: Tensor | None
    seed: Tensor | None
    dropout: float
    chunk: int
    length: int
    total: int
    heads: int

    @property
    def threshold(self) -> int:
        return min(round(self.dropout * 2**32), 2**32 - 1)


def _module(chunk: int, dtype: torch.dtype) -> Module:
    quads = -(-chunk // 2)  # of the 2 * chunk keys of a row
    threads = 32 * min(max(-(-quads // 128), 1), 16)
    vectors = -(-quads // threads)
    return _MODULE.specialise(THREADS=threads, VECS=vectors, BF16=dtype == torch.bfloat16, ALIGNED=chunk % 4 == 0)


MODULES = tuple(_module(chunk, dtype) for chunk in (64, 2048) for dtype in (torch.bfloat16, torch.float32))


def kernel(name: str, chunk: int, dtype: torch.dtype) -> Kernel:
    key = (name, chunk, dtype)
    if (made := _kernels.get(key)) is None:
        module = _module(chunk, dtype)
        args = ("PPP" if name == "softmax_rows" else "PPPPP") + _PLACE
        made = _kernels.setdefault(key, module.kernel(name, args=args, block=int(module.defines["THREADS"])))
    return made


_kernels: dict[tuple[str, int, torch.dtype], Kernel] = {}


def softmax_rows(
    scores: Tensor, weights: Tensor, lse: Tensor, at: Rows, r: Rectangle, band: Band, b: int, h: int
) -> None:
    """scores (gB, gH, count, rows, ld) -> the band weights (gB, gH, numel) and lse (B, H, L); group begins at b, h."""
    if scores.is_cuda:
        pointers = (scores.data_ptr(), weights.data_ptr() + band.offset(r) * weights.element_size(), lse.data_ptr())
        _launch("softmax_rows", pointers, scores, weights, at, r, b, h)
        return
    visible, rows = _visible(scores, at, r, b, h)
    x = scores[..., : r.keys].masked_fill(~visible, -torch.inf)
    total = torch.logsumexp(x, -1)
    total = torch.where(torch.isinf(x.amax(-1)), torch.inf, total)
    band.view(weights, r).copy_(_weights(x, visible, total))
    _lse(lse, scores, b, h)[:, :, rows] = total.to(lse.dtype)


def softmax_rows_backward(
    scores: Tensor,
    grad: Tensor,
    weights: Tensor,
    dscores: Tensor,
    lse: Tensor,
    at: Rows,
    r: Rectangle,
    band: Band,
    b: int,
    h: int,
) -> None:
    """scores and grad (gB, gH, count, rows, ld) -> the bands weights and dscores (gB, gH, numel)."""
    if scores.is_cuda:
        offset = band.offset(r) * weights.element_size()
        outs = (weights.data_ptr() + offset, dscores.data_ptr() + offset)
        _launch(
            "softmax_rows_backward",
            (scores.data_ptr(), grad.data_ptr(), *outs, lse.data_ptr()),
            scores,
            weights,
            at,
            r,
            b,
            h,
        )
        return
    visible, rows = _visible(scores, at, r, b, h)
    w = _weights(scores[..., : r.keys], visible, _lse(lse, scores, b, h)[:, :, rows])
    d = grad[..., : r.keys].masked_fill(~visible, 0.0)
    band.view(weights, r).copy_(w)
    band.view(dscores, r).copy_(w * (d - (w * d).sum(-1, keepdim=True)))


def _launch(
    name: str, pointers: tuple[int, ...], scores: Tensor, weights: Tensor, at: Rows, r: Rectangle, b: int, h: int
) -> None:
    batch, heads, count, rows, ld = scores.shape
    kernel(name, at.chunk, weights.dtype).launch(
        scores.get_device(),
        (count * rows, batch * heads),
        *pointers,
        0 if at.starts is None else at.starts.data_ptr(),
        0 if at.seed is None else at.seed.data_ptr(),
        at.threshold,
        weights.stride(1),
        *(ld, rows, r.row, r.key, r.keys, at.chunk, at.length, at.total, heads, b, h, at.heads),
    )


def _lse(lse: Tensor, scores: Tensor, b: int, h: int) -> Tensor:
    return lse[b : b + scores.shape[0], h : h + scores.shape[1]]


def _weights(x: Tensor, visible: Tensor, lse: Tensor) -> Tensor:
    seen = visible & ~torch.isinf(lse)[..., None]
    return torch.where(seen, torch.exp(x - lse[..., None]), torch.zeros_like(x))


def _visible(scores: Tensor, at: Rows, r: Rectangle, b: int, h: int) -> tuple[Tensor, Tensor]:
    """Which scores count, broadcast to (gB, gH, count, rows, keys), and the rows' index into lse (count, rows)."""
    shift = at.chunk * torch.arange(r.count)[:, None]
    t, k = shift + r.row + torch.arange(r.rows), shift + r.key + torch.arange(r.keys)
    mask = k[:, None, :] <= t[:, :, None]
    batch = slice(b, b + scores.shape[0])
    if at.starts is not None:
        mask = mask & (k[:, None, :] >= at.starts[batch, None][:, :, t][..., None])
    if at.seed is not None:
        seed = int(at.seed.item()) & (2**64 - 1)
        heads = torch.arange(h, h + scores.shape[1])
        head = (torch.arange(b, b + scores.shape[0])[:, None] * at.heads + heads)[..., None, None]
        key = _mix(_mix(((seed & _MASK32) + head * 0x9E3779B9) & _MASK32) ^ (seed >> 32))
        key = _mix((key + t * 0x85EBCA6B) & _MASK32)[..., None]
        j = ((torch.arange(r.keys) + 1) * 0x9E3779B9) & _MASK32
        mask = mask & (_mix(key ^ j) >= at.threshold)
    return mask, t - (at.total - at.length)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)
