"""The gradients of the softmaxes with the products before them, on sm_90a for 256 features a head: tiles.cu."""

import torch
from torch import Tensor

from ..runtime import Module, arch_of
from ..sliding_chunk_attention.tiles import boxes, clusters, flat

_FEATURES, _PAIR, _ROWS, _SLICE = 256, 256, 128, 64
_RING = 4 * (_ROWS + _FEATURES) * 128 + 1024
_KERNELS = {  # name: arguments, bytes of shared memory
    "query_gradient": ("TTPPPqqiiiiiiiii", _RING),
    "key_gradient": ("TTTTTTPPPPPqqiiiii", _RING + 32 * 256 * 4),
}
_MODULE = Module(__file__, "tiles.cu", kernels=(*_KERNELS, "transpose"), archs=("sm_90a",))
MODULES = (_MODULE,)
_TILES = {name: _MODULE.kernel(name, args=args, block=384, smem=smem) for name, (args, smem) in _KERNELS.items()}

_TRANSPOSE = _MODULE.kernel("transpose", args="PP", block=256)


def serves(x: Tensor, v: Tensor, chunk: int, offset: int = 0) -> bool:
    """Whether the kernels take x (B, L, H, S) with v (B, L, H, E), x beginning at row `offset` of a chunk."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[3] == _FEATURES
        and v.shape[3] % _SLICE == 0
        and chunk % _PAIR == offset % _PAIR == 0
        and flat(x)
        and flat(v)
        and arch_of(x.get_device()) == "sm_90a"
    )


def query_gradient(
    aq: Tensor, dy: Tensor, tables: Tensor, live: Tensor | None, chunk: int, offset: int, skip: int
) -> Tensor:
    """d loss / d aq (B, L, H, S) from that of the reads dy (B, L, H, E); tables (B, H, F + 1, S, E) bfloat16.

    offset and skip say which table a row reads, as in `_reads`.
    """
    batch, length, heads, _ = aq.shape
    out = torch.empty(aq.shape, dtype=aq.dtype, device=aq.device)
    least = min(skip, 1)
    _TILES["query_gradient"].launch(
        aq.get_device(),
        clusters(aq.get_device()),
        *(boxes(dy), boxes(tables.view(1, -1, 1, tables.shape[4]))),
        *(aq.data_ptr(), out.data_ptr(), 0 if live is None else live.data_ptr(), aq.stride(0), aq.stride(1)),
        *(batch * heads, length, heads, dy.shape[3], chunk, offset, skip - least, least, tables.shape[2]),
    )
    return out


def key_gradient(
    ak: Tensor,
    v: Tensor,
    softmaxes: tuple[Tensor, Tensor, Tensor],
    dmix: Tensor,
    dtarget: Tensor,
    column: Tensor,
    first: Tensor | None,
) -> Tensor:
    """d loss / d ak (B, L, H, S) from dmix (B, H, N, S, S) and dtarget (B, H, N, S, E), both dense bfloat16.

    softmaxes are weights, answers and lam as softmax_keys gives them; column as in softmax_both_backward.
    """
    weights, answers, lam = softmaxes
    batch, length, heads, _ = ak.shape
    out = torch.empty(ak.shape, dtype=ak.dtype, device=ak.device)
    turned, squares = torch.empty_like(dmix), _FEATURES // 32
    _TRANSPOSE.launch(
        ak.get_device(), (squares, squares, dmix.shape[:3].numel()), dmix.data_ptr(), turned.data_ptr()
    )
    operands = (weights.transpose(1, 2), turned, answers.transpose(1, 2), dmix, v, dtarget)
    _TILES["key_gradient"].launch(
        ak.get_device(),
        clusters(ak.get_device()),
        *(boxes(x if x is v else x.view(1, -1, 1, x.shape[-1])) for x in operands),
        *(x.data_ptr() for x in (ak, lam, column, out)),
        *(0 if first is None else first.data_ptr(), ak.stride(0), ak.stride(1)),
        *(batch * heads, length, heads, v.shape[3], length // lam.shape[2]),
    )
    return out
