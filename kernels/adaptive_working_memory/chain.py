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


def forward(tables: Tensor, mix: Tensor, target: Tensor, rho: Tensor, keep: Tensor, dtype: torch.dtype) -> None:
    """Fill tables[:, :, 1:] (B, H, F + 1, S, E) from tables[:, :, 0]; `dtype` is that of the operation's inputs."""
    if _served(tables, dtype) and dense_heads(mix) and dense_heads(target):
        _launch(tables, mix, rho, keep, target, backward=False)
        return
    torch.mul(target, rho[..., None], out=tables[:, :, 1:])
    flat, steps = tables.flatten(0, 1), _transition(mix, rho, keep).flatten(0, 1)
    for f in range(rho.shape[2]):
        flat[:, f + 1].baddbmm_(steps[:, f], flat[:, f])


def backward(grad: Tensor, mix: Tensor, rho: Tensor, keep: Tensor, dtype: torch.dtype) -> None:
    """Add to grad[:, :, f] (B, H, F + 1, S, E), from the reads of table f, what comes through the tables after."""
    if _served(grad, dtype):
        _launch(grad, mix.transpose(-1, -2).contiguous(), rho, keep, grad, backward=True)
        return
    flat, steps = grad.flatten(0, 1), _transition(mix, rho, keep).flatten(0, 1)
    for f in reversed(range(rho.shape[2])):
        flat[:, f].baddbmm_(steps[:, f].transpose(-1, -2), flat[:, f + 1])


def _served(tables: Tensor, dtype: torch.dtype) -> bool:
    fits = tables.shape[3] in ROWS and tables.shape[4] % 32 == 0 and tables.shape[2] > 1
    return tables.is_cuda and dtype == torch.bfloat16 and fits


def _launch(out: Tensor, matrix: Tensor, rho: Tensor, keep: Tensor, add: Tensor, *, backward: bool) -> None:
    batch, heads, tables, rows, width = out.shape
    columns = 64 if width % 64 == 0 and batch * heads * width // 64 >= _BUSY else 32
    key = (rows, columns, backward)
    if (kernel := _kernels.get(key)) is None:
        made = _module(*key).kernel("chain", args="PPPPPqqiii", block=rows, smem=rows * (columns + 2) * 4)
        kernel = _kernels.setdefault(key, made)
    kernel.launch(
        out.get_device(),
        (width // columns, batch * heads),
        *(x.data_ptr() for x in (matrix, rho, keep, add, out)),
        *(matrix.stride(1), add.stride(1), tables - 1, heads, width),
    )


def _transition(mix: Tensor, rho: Tensor, keep: Tensor) -> Tensor:
    """A = keep (diag(1 - rho) - rho mix), (B, H, F, S, S)."""
    kept = keep[:, None, :, None]
    a = mix * (-rho * kept)[..., None]
    a.diagonal(dim1=-2, dim2=-1).add_((1 - rho) * kept)
    return a
