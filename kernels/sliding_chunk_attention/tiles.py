"""The backward pass's weights and logit gradients in one kernel a group, on sm_90a: tiles.cu."""

import torch
from torch import Tensor

from ..runtime import Kernel, Module, arch_of, tensor_map_2d
from .plan import Band, strip_length
from .rows import Rows

_ROWS, _KEYS, _SLICE = 128, 256, 64
_SMEM = 3 * (_ROWS + _KEYS) * 128 + 64 * 256 * 4 + 1024
_MODULE = Module(__file__, "tiles.cu", kernels=("weights_and_gradient", "row_products"), archs=("sm_90a",))
MODULES = tuple(_MODULE.specialise(DROPOUT=drop) for drop in (False, True))
_TILES = tuple(
    module.kernel("weights_and_gradient", args="TTTTPPPPPPIqiiiiiiiiiiiii", block=384, smem=_SMEM) for module in MODULES
)
_PRODUCTS: Kernel = MODULES[0].kernel("row_products", args="PPPiiii", block=384)


def serves(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> bool:
    """Whether the kernel can compute the backward pass of these inputs."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[3] % _SLICE == 0
        and v.shape[3] % _SLICE == 0
        and chunk % _KEYS == 0
        and all(_flat(x) for x in (q, k, v))
        and arch_of(q.get_device()) == "sm_90a"
    )


def _flat(x: Tensor) -> bool:
    """Whether x (B, L, H, S) is one matrix of B L rows with the heads side by side."""
    b, t, h, s = x.stride()
    aligned = t % 8 == 0 and x.data_ptr() % 16 == 0
    return aligned and s == 1 and h == x.shape[3] and (x.shape[0] == 1 or b == x.shape[1] * t)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """(B, H, L) float32: sums over E of a * b, both (B, L, H, E) bfloat16 and dense."""
    batch, length, heads, width = a.shape
    out = torch.empty((batch, heads, length), dtype=torch.float32, device=a.device)
    rows = out.numel()
    _PRODUCTS.launch(
        a.get_device(), -(-rows // 12), a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, length, heads, width
    )
    return out


def weights_and_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor,
    dscores: Tensor,
    norms: tuple[Tensor, Tensor],
    at: Rows,
    band: Band,
    b: int,
    h: int,
) -> None:
    """Fill the bands weights and dscores (gB, gH, numel) of a group that begins at row b and head h.

    tensors are q, k, dy, v of the whole batch; norms are lse and delta (B, H, L), delta = sum over E of dy * y.
    """
    q, v = tensors[0], tensors[3]
    batch, heads, item = weights.shape
    boxes = (_ROWS, _KEYS, _ROWS, _KEYS)
    maps = (
        tensor_map_2d(
            x.data_ptr(), x.dtype, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], 2 * x.stride(1), (rows, _SLICE)
        )
        for x, rows in zip(tensors, boxes)
    )
    pointers = (weights, dscores, *norms, at.starts, at.seed)
    tiles = -(-band.end // _ROWS) - band.first // _ROWS
    _TILES[at.seed is not None].launch(
        q.get_device(),
        (2 * at.chunk // _KEYS, tiles, batch * heads),
        *maps,
        *(0 if x is None else x.data_ptr() for x in pointers),
        *(at.threshold, item, band.first, band.end, band.base, at.chunk, strip_length(at.chunk)),
        *(q.shape[3], v.shape[3], at.length, at.total, heads, b, h, at.heads),
    )
