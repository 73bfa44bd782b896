"""Launches of the moving average's kernels: contiguous CUDA tensors in, new tensors out."""

from functools import cache

import torch
from torch import Tensor

from ..runtime import Kernel, Module
from .gradients import Edge

LANES = (4, 16, 32)
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_THREADS = 128
_NAMES = [
    name
    for kind in _TYPES.values()
    for name in (
        f"scan_filter<{kind}, false>",
        f"scan_filter<{kind}, true>",
        f"scan_correlate<{kind}>",
        f"scan_edge<{kind}, false>",
        f"scan_edge<{kind}, true>",
    )
]
SCAN = {lanes: Module(__file__, "scan.cu", defines={"MODES": lanes}, kernels=_NAMES) for lanes in LANES}
MODULES = tuple(SCAN.values())


@cache
def _scan_kernel(name: str, args: str, lanes: int) -> Kernel:
    return SCAN[lanes].kernel(name, args=args, block=_THREADS)


def _scan(name: str, args: str, x: Tensor, *values: int | None) -> None:
    """Launch a kernel of scan.cu over the channels and rows of x (B, L, D)."""
    batch, _, width = x.shape
    modes = values[-1]
    assert modes is not None
    lanes = next(lanes for lanes in LANES if lanes >= modes)
    grid = (-(-width // (_THREADS // lanes)), batch)
    _scan_kernel(name, args, lanes).launch(x.device.index, grid, *(value or 0 for value in values))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def filter_steps(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, first: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, last): the average with its skip, or, backward in time with x = dy, (dx, gradient of the first state)."""
    batch, length, width = x.shape
    modes = p.shape[1]
    y = torch.empty_like(x)
    last = torch.empty((batch, width, modes), dtype=torch.complex64, device=x.device)
    _scan(
        f"scan_filter<{_TYPES[x.dtype]}, {'true' if reverse else 'false'}>",
        "PPPPPPPPiii",
        x,
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
    return y, last


def correlate(x: Tensor, dy: Tensor, q: Tensor, bos: Tensor | None) -> tuple[Tensor, Tensor]:
    """(along_u, along_v), (B, D, N) complex64, of gradients.parameter_gradients."""
    batch, length, width = x.shape
    modes = q.shape[1]
    sums = torch.empty((2, batch, width, modes), dtype=torch.complex64, device=x.device)
    _scan(
        f"scan_correlate<{_TYPES[x.dtype]}>",
        "PPPPPPiii",
        x,
        x.data_ptr(),
        dy.data_ptr(),
        _pointer(bos),
        q.data_ptr(),
        sums[0].data_ptr(),
        sums[1].data_ptr(),
        length,
        width,
        modes,
    )
    return sums[0], sums[1]


def edge(z: Tensor, q: Tensor, bos: Tensor | None, *, reverse: bool) -> Edge:
    """The sums over the document that crosses the start of the sequence, or with `reverse` its end."""
    batch, length, width = z.shape
    modes = q.shape[1]
    sums = torch.empty((2, batch, width, modes), dtype=torch.complex64, device=z.device)
    _scan(
        f"scan_edge<{_TYPES[z.dtype]}, {'true' if reverse else 'false'}>",
        "PPPPPiii",
        z,
        z.data_ptr(),
        _pointer(bos),
        q.data_ptr(),
        sums[0].data_ptr(),
        sums[1].data_ptr(),
        length,
        width,
        modes,
    )
    return Edge(sums[0], sums[1])
