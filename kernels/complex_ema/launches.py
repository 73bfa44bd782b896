"""Launches of the moving average's kernels: contiguous CUDA tensors in, new tensors out."""

from functools import cache, lru_cache

import torch
from torch import Tensor

from ..runtime import Kernel, Module

LANES = (4, 16, 32)
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_THREADS = 128
_NAMES = [
    name
    for kind in _TYPES.values()
    for name in (f"scan_filter<{kind}, false>", f"scan_filter<{kind}, true>", f"scan_correlate<{kind}>")
]
SCAN = {lanes: Module(__file__, "scan.cu", defines={"MODES": lanes}, kernels=_NAMES) for lanes in LANES}
FILTER = Module(__file__, "filter.cu", kernels=("filter<false>", "filter<true>"))
PIECE = Module(__file__, "piece.cu", kernels=("piece<false>", "piece<true>"))
CORRELATE = Module(__file__, "correlate.cu", kernels=("correlate",))
PIECE_CORRELATE = Module(__file__, "piece_correlate.cu", kernels=("piece_correlate",))
MODULES = (*SCAN.values(), FILTER, PIECE, CORRELATE, PIECE_CORRELATE)

# As in tiles.cuh.
_CHANNELS, _TILE, _TILE_THREADS, _TILE_MODES = 16, 512, 512, 16
_TILED_LENGTH = 128  # below, a tile of 512 steps is mostly padding
_PIECE_CHANNELS = 32  # a block
# Rows up to which the kernels of one tile, which make their factors for every row, beat those that make them once.
_PIECE_ROWS, _PIECE_GRADIENT_ROWS = 3, 1
_FILTER_SHARED = 2 * 4 * _CHANNELS * 256 + 16 * _CHANNELS * 12 * 32 + 8 * _CHANNELS * 5 * _TILE_MODES + 64
_FILTER = {
    reverse: FILTER.kernel(
        f"filter<{'true' if reverse else 'false'}>", args="PPPPPPPPiiii", block=_TILE_THREADS, smem=_FILTER_SHARED
    )
    for reverse in (False, True)
}
_PIECE_CHANNEL = 2 * 16 * 4 * 32 + 48 * _TILE_MODES + 4 * 24
_PIECE_SHARED = (2 * 4 * 256 + -(-_PIECE_CHANNEL // 128) * 128) * _PIECE_CHANNELS + 64
_PIECE = {
    reverse: PIECE.kernel(
        f"piece<{'true' if reverse else 'false'}>",
        args="PPPPPPPPiii",
        block=32 * _PIECE_CHANNELS,
        smem=_PIECE_SHARED,
        most_shared=True,
    )
    for reverse in (False, True)
}
_CORRELATE_SHARED = 4 * 4 * _CHANNELS * 256 + 16 * _CHANNELS * 16 * 32 + 8 * _CHANNELS * 15 * _TILE_MODES + 64
_CORRELATE = CORRELATE.kernel("correlate", args="PPPPPPPPPPPiiii", block=_TILE_THREADS, smem=_CORRELATE_SHARED)
_PIECE_CORRELATE_SHARED = 2 * 1024 * 32 + (4 * (260 + 324) + 172 * _TILE_MODES) * _PIECE_CHANNELS + 64
_PIECE_CORRELATE = PIECE_CORRELATE.kernel(
    "piece_correlate",
    args="PPPPPPPPPPPiii",
    block=32 * _PIECE_CHANNELS,
    smem=_PIECE_CORRELATE_SHARED,
    most_shared=True,
)


@cache
def _scan_kernel(name: str, args: str, lanes: int) -> Kernel:
    return SCAN[lanes].kernel(name, args=args, block=_THREADS)


def _scan(name: str, args: str, x: Tensor, *values: int) -> None:
    """Launch a kernel of scan.cu over the channels and rows of x (B, L, D)."""
    batch, _, width = x.shape
    lanes = next(lanes for lanes in LANES if lanes >= values[-1])
    grid = (-(-width // (_THREADS // lanes)), batch)
    _scan_kernel(name, args, lanes).launch(x.device.index, grid, *values)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tiled(x: Tensor, modes: int, shared: int) -> bool:
    """Whether a tensor-core kernel takes x (B, L, D): it reads eight channels at once, and needs shared memory."""
    return (
        x.dtype is torch.bfloat16
        and modes <= _TILE_MODES
        and x.shape[1] >= _TILED_LENGTH
        and x.shape[2] % 8 == 0
        and x.data_ptr() % 16 == 0
        and shared <= getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin")  # noqa: B009
    )


def _one_tile(x: Tensor, modes: int, shared: int, rows: int) -> bool:
    """Whether a kernel of one tile takes x (B, L, D): it serves few rows, and counts in 32 bits."""
    batch, length, _ = x.shape
    return length <= _TILE and batch <= rows and x.numel() < 2**32 and _tiled(x, modes, shared)


@lru_cache(maxsize=4096)
def _row_blocks(batch: int, tiles: int, strips: int, processors: int) -> int:
    """How many blocks share the rows of `strips` stretches of channels, one block a multiprocessor at a time.

    A block makes its factors once, in about the time of a tile, then runs its rows one after the other.
    """

    def tile_times(blocks: int) -> int:
        return -(-strips * blocks // processors) * (1 + -(-batch // blocks) * tiles)

    # The least number of blocks for every number of rows a block.
    return min(sorted({-(-batch // rows) for rows in range(1, min(batch, 256) + 1)} | {1}), key=tile_times)


def _tiled_grid(x: Tensor) -> tuple[int, int]:
    batch, length, width = x.shape
    strips = -(-width // _CHANNELS)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return strips, _row_blocks(batch, -(-length // _TILE), strips, processors)


def filter_steps(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, first: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, last): the average with its skip, or, backward in time with x = dy, (dx, gradient of the first state)."""
    batch, length, width = x.shape
    modes = p.shape[1]
    y = torch.empty_like(x)
    last = torch.empty((batch, width, modes), dtype=torch.complex64, device=x.device)
    values = (
        x.data_ptr(),
        _pointer(bos),
        p.data_ptr(),
        q.data_ptr(),
        gamma.data_ptr(),
        _pointer(first),
        y.data_ptr(),
        last.data_ptr(),
        length,
        width,
        modes,
    )
    if _one_tile(x, modes, _PIECE_SHARED, _PIECE_ROWS):
        _PIECE[reverse].launch(x.device.index, (-(-width // _PIECE_CHANNELS), batch), *values, early=True)
    elif _tiled(x, modes, _FILTER_SHARED):
        _FILTER[reverse].launch(x.device.index, _tiled_grid(x), *values[:8], batch, *values[8:], early=True)
    else:
        _scan(f"scan_filter<{_TYPES[x.dtype]}, {'true' if reverse else 'false'}>", "PPPPPPPPiii", x, *values)
    return y, last


def parameter_gradients(
    x: Tensor,
    dy: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    bos: Tensor | None,
    first: Tensor | None,
    dlast: Tensor | None,
    *,
    after_filter: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dp, dq, dgamma), (D, N); first and dlast are the state before the first step and the gradient of the last.

    `after_filter`: the launch before this one is that of filter_steps, which makes none of the arguments; both may then
    run at once.
    """
    batch, length, width = x.shape
    modes = q.shape[1]
    aligned = dy.data_ptr() % 16 == 0
    piece = aligned and _one_tile(x, modes, _PIECE_CORRELATE_SHARED, _PIECE_GRADIENT_ROWS)
    tiled = not piece and aligned and _tiled(x, modes, _CORRELATE_SHARED)
    grid = _tiled_grid(x) if tiled else (-(-width // _PIECE_CHANNELS), batch)
    # A block sums over its rows, and one block a stretch of channels often takes all of them.
    dp = torch.empty((grid[1], width, modes), dtype=torch.float32, device=x.device)
    dq, dgamma = (torch.empty(dp.shape, dtype=torch.complex64, device=x.device) for _ in range(2))
    pointers = tuple(_pointer(t) for t in (x, dy, bos, p, q, gamma, first, dlast, dp, dq, dgamma))
    if piece:
        _PIECE_CORRELATE.launch(x.device.index, grid, *pointers, length, width, modes, early=after_filter)
    elif tiled:
        _CORRELATE.launch(x.device.index, grid, *pointers, batch, length, width, modes, early=after_filter)
    else:
        _scan(f"scan_correlate<{_TYPES[x.dtype]}>", "PPPPPPPPPPPiii", x, *pointers, length, width, modes)
    dp, dq, dgamma = (t.view(width, modes) if grid[1] == 1 else t.sum(0) for t in (dp, dq, dgamma))
    return dp, dq, dgamma
