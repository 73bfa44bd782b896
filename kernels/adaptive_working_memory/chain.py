"""The chain over chunks: chain.cu for bfloat16 inputs, one float32 product a chunk otherwise."""

import torch
from torch import Tensor

from ..runtime import Kernel, Module
from .rows import dense_heads

ROWS = (32, 64, 128, 256)  # S of the kernel
_MODULE = Module(__file__, "chain.cu", kernels=("chain",))
_BUSY = 128  # blocks that keep a large GPU busy
_kernels: dict[tuple[int, int, bool], Kernel] = {}


def _module(rows: int, columns: int, backward: bool) -> Module:
    return _MODULE.specialise(ROWS=rows, COLS=columns, BACKWARD=backward)


MODULES = tuple(_module(256, columns, backward) for columns in (32, 64) for backward in (False, True))


def forward(tables: Tensor, mix: Tensor, target: Tensor, rho: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Fill tables[:, :, 1:] (B, H, F + 1, S, E) from tables[:, :, 0], and return the tables in dtype, the inputs'."""
    if _served(tables, dtype) and dense_heads(mix) and dense_heads(target):
        narrow = torch.empty(tables.shape, dtype=dtype, device=tables.device)
        _launch(tables, mix, rho, keep, target, narrow)
        return narrow
    torch.mul(target, rho[..., None], out=tables[:, :, 1:])
    flat, steps = tables.flatten(0, 1), _transition(mix, rho, keep).flatten(0, 1)
    for f in range(rho.shape[2]):
        flat[:, f + 1].baddbmm_(steps[:, f], flat[:, f])
    return tables.to(dtype)


def backward(
    grad: Tensor, tables: Tensor, mix: Tensor, rho: Tensor, keep: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """From grad (B, H, F + 1, S, E), of the reads of each table, to the gradients of the first table and the targets.

    In place: grad[:, :, 0] is that of the first table, grad[:, :, f + 1] that of target f. Returned are the latter in
    dtype and `turn` (B, H, F, S), rho times the gradient of rho.
    """
    if _served(grad, dtype) and dense_heads(grad) and dense_heads(mix):
        shape = (*rho.shape, grad.shape[4])
        narrow = torch.empty(shape, dtype=dtype, device=grad.device)
        parts = torch.empty((*rho.shape[:3], grad.shape[4] // _columns(grad), rho.shape[3]), device=grad.device)
        _launch(grad, mix, rho, keep, tables, narrow, parts)
        return narrow, parts.sum(3)
    steps = _transition(mix, rho, keep)
    for f in reversed(range(rho.shape[2])):
        grad[:, :, f] += steps[:, :, f].transpose(-1, -2) @ grad[:, :, f + 1]
    after = grad[:, :, 1:]
    turn = (after * (tables[:, :, 1:] - keep[:, None, :, None, None] * tables[:, :, :-1])).sum(-1)
    after *= rho[..., None]
    return after.to(dtype), turn


def _served(tables: Tensor, dtype: torch.dtype) -> bool:
    fits = tables.shape[3] in ROWS and tables.shape[4] % 32 == 0 and tables.shape[2] > 1
    return tables.is_cuda and dtype == torch.bfloat16 and fits


def _columns(out: Tensor) -> int:
    batch, heads, *_, width = out.shape
    return 64 if width % 64 == 0 and batch * heads * width // 64 >= _BUSY else 32


def _launch(
    out: Tensor, matrix: Tensor, rho: Tensor, keep: Tensor, add: Tensor, narrow: Tensor, turn: Tensor | None = None
) -> None:
    """Forward, or backward where `turn` is given; see chain.cu."""
    batch, heads, _, rows, width = out.shape
    columns = _columns(out)
    key = (rows, columns, turn is not None)
    if (kernel := _kernels.get(key)) is None:
        made = _module(*key).kernel("chain", args="PPPPPPPqqqiii", block=rows, smem=rows * (columns + 2) * 4)
        kernel = _kernels.setdefault(key, made)
    kernel.launch(
        out.get_device(),
        (width // columns, batch * heads),
        *(x.data_ptr() for x in (matrix, rho, keep, add, out, narrow)),
        0 if turn is None else turn.data_ptr(),
        *(matrix.stride(1), add.stride(1), out.stride(1), rho.shape[2], heads, width),
    )


def _transition(mix: Tensor, rho: Tensor, keep: Tensor) -> Tensor:
    """A = keep (diag(1 - rho) - rho mix), (B, H, F, S, S)."""
    kept = keep[:, None, :, None]
    a = mix * (-rho * kept)[..., None]
    a.diagonal(dim1=-2, dim2=-1).add_((1 - rho) * kept)
    return a
