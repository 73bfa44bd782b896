"""Log-sum-exp, weights and logit gradients in one kernel a group, on sm_90a: tiles.cu."""

from functools import lru_cache

import torch
from torch import Tensor

from ..runtime import Kernel, Module, arch_of, tensor_map_2d
from ..runtime.device import attribute
from .plan import Band, strip_length
from .rows import Rows

_ROWS, _KEYS, _SLICE = 128, 256, 64
_PAIR = 2 * _ROWS
_RING = 4 * (_ROWS + _KEYS) * 128 + 1024
_KERNELS = {  # name: arguments, bytes of shared memory
    "row_norms": ("TTPPPIiiiii", _RING),
    "weights": ("TTPPPPIqiiiiiiiiiiiiii", _RING),
    "weights_and_gradient": ("TTTTPPPPPPIqiiiiiiiiiiiiii", _RING + 32 * 256 * 4),
}
_MODULE = Module(__file__, "tiles.cu", kernels=(*_KERNELS, "row_products"), archs=("sm_90a",))
MODULES = tuple(_MODULE.specialise(DROPOUT=drop) for drop in (False, True))
_TILES = {
    (name, drop): module.kernel(name, args=args, block=384, smem=smem)
    for drop, module in enumerate(MODULES)
    for name, (args, smem) in _KERNELS.items()
}
_PRODUCTS: Kernel = MODULES[0].kernel("row_products", args="PPPiiii", block=384)


def serves(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> bool:
    """Whether the kernels take these inputs."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[3] % _SLICE == 0
        and v.shape[3] % _SLICE == 0
        and chunk % _KEYS == 0
        and all(flat(x) for x in (q, k, v))
        and arch_of(q.get_device()) == "sm_90a"
    )


def flat(x: Tensor) -> bool:
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


def row_norms(q: Tensor, k: Tensor, at: Rows) -> Tensor:
    """lse (B, H, L) float32 of all rows, inf where a row sees nothing."""
    batch, length, heads, features = q.shape
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    _TILES["row_norms", at.seed is not None].launch(
        q.get_device(),
        (_pairs(at.total - length, at.total), batch * heads),
        *(boxes(q), boxes(k)),
        *map(_pointer, (lse, at.starts, at.seed)),
        *(at.threshold, at.chunk, features, length, at.total, heads),
    )
    return lse


def weights(q: Tensor, k: Tensor, out: Tensor, lse: Tensor, at: Rows, band: Band, b: int, h: int) -> None:
    """Fill the band out (gB, gH, numel) of a group that begins at row b and head h; q, k of the whole batch."""
    _launch("weights", (boxes(q), boxes(k)), (out, lse), q.shape[3], 0, out, at, band, b, h)


def weights_and_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    dscores: Tensor,
    norms: tuple[Tensor, Tensor],
    at: Rows,
    band: Band,
    b: int,
    h: int,
) -> None:
    """Fill the bands out, of the weights, and dscores (gB, gH, numel) of a group that begins at row b and head h.

    tensors are q, k, dy, v of the whole batch; norms are lse and delta (B, H, L), delta = sum over E of dy * y.
    """
    q, v = tensors[0], tensors[3]
    maps = tuple(map(boxes, tensors))
    _launch("weights_and_gradient", maps, (out, dscores, *norms), q.shape[3], v.shape[3], out, at, band, b, h)


def _launch(
    name: str,
    maps: tuple[bytes, ...],
    tensors: tuple[Tensor, ...],
    features: int,
    width: int,
    out: Tensor,
    at: Rows,
    band: Band,
    b: int,
    h: int,
) -> None:
    batch, heads, item = out.shape
    _TILES[name, at.seed is not None].launch(
        out.get_device(),
        clusters(out.get_device()),
        *maps,
        *map(_pointer, (*tensors, at.starts, at.seed)),
        *(at.threshold, item, band.first, band.end, band.base, at.chunk, strip_length(at.chunk)),
        *(features, width, at.length, at.total, heads, batch * heads, b, h, at.heads),
    )


@lru_cache
def clusters(device: int) -> int:
    """Blocks of the persistent kernels: one a multiprocessor, in pairs."""
    return attribute(device, "MULTIPROCESSOR_COUNT") // 2 * 2


def _pairs(first: int, end: int) -> int:
    """Blocks that cover the rows [first, end) in whole pairs."""
    return 2 * (-(-end // _PAIR) - first // _PAIR)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def boxes(x: Tensor) -> bytes:
    """A map of x (B, L, H, S), `flat`, in boxes of a block's 128 rows, or half of its keys, by 64 features."""
    return tensor_map_2d(
        x.data_ptr(), x.dtype, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], 2 * x.stride(1), (_ROWS, _SLICE)
    )
