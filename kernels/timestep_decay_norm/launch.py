"""Launches of the time-step norms' kernels: CUDA tensors in, new tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import PIECE_BLOCKS, Plan, Rates


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where its strides or its address rule out accesses of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _slots(p: Plan, rows: int, tiles: int, like: Tensor) -> Tensor | None:
    """What blocks publish that look back: 8 bytes a tile and a span of 32 tiles, in every row and group."""
    if tiles == 1:
        return None
    return torch.empty(rows * p.groups * (tiles + (tiles - 1) // 32), dtype=torch.int64, device=like.device)


def _prepare(p: Plan, bos: Tensor | None, begin: Tensor, slots: Tensor | None, length: int) -> None:
    """Clear the slots, and find the documents: begin (B, L) of bos (B, L)."""
    if bos is None and slots is None:
        return
    rows = 0 if bos is None else bos.shape[0]
    count = 0 if slots is None else slots.numel()
    grid = rows + min(132, -(-count // 4096))
    p.prepare.launch(begin.get_device(), grid, address(bos), address(begin), address(slots), count, rows, length)


def run_forward(
    p: Plan,
    rate: Rates,
    eps: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bos: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, final count, mean and var; then, for the backward, saved (2, B, G, L) centre and scale, and begin (B, L)."""
    x, weight, bias = aligned(x), aligned(weight), aligned(bias)
    rows, length, _ = x.shape
    y = torch.empty_like(x)
    count_out = torch.empty(rows, dtype=torch.int64, device=x.device)
    mean_out, var_out = (torch.empty(rows, p.groups, dtype=torch.float32, device=x.device) for _ in range(2))
    saved = torch.empty((2, rows, p.groups, length) if save else (0,), dtype=torch.float32, device=x.device)
    begin = torch.empty((0,) if bos is None else (rows, length), dtype=torch.int32, device=x.device)
    bos = None if bos is None else bos.contiguous()
    count, mean, var = (None if t is None else t.contiguous() for t in (count, mean, var))
    tensors = (begin, count, mean, var, count_out, mean_out, var_out, saved)
    numbers, device = (*rate.values, eps), x.get_device()
    if piece := p.piece(rows, length, x.device):
        blocks, pointers = rows * p.groups * PIECE_BLOCKS, map(address, (x, weight, bias, y, bos, *tensors))
        piece.forward.launch(device, blocks, *pointers, rows, length, p.groups, *numbers, early=True)
    else:
        tiles = -(-length // p.tile)
        slots = _slots(p, rows, tiles, x)
        _prepare(p, bos, begin, slots, length)
        blocks, pointers = rows * tiles * p.strips, map(address, (x, weight, bias, y, *tensors, slots))
        p.forward.launch(device, blocks, *pointers, rows, length, p.groups, tiles, *numbers)
    return y, count_out, mean_out, var_out, saved, begin


def run_backward(
    p: Plan,
    rate: Rates,
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    begin: Tensor,
    count: Tensor | None,
    stateful: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and, if `stateful`, of the mean and the var before the first step."""
    x, dy, weight = aligned(x), aligned(dy), aligned(weight)
    rows, length, dim = x.shape
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    shape = (rows, p.groups) if stateful else (0,)
    dmean0, dvar0 = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    dmean, dvar, count = (None if t is None else t.contiguous() for t in (dmean, dvar, count))
    piece, tiles, device = p.piece(rows, length, x.device), -(-length // p.tile), x.get_device()
    # One row of a piece sums the gradients of the parameters itself.
    sums = rows * tiles if piece is None else rows if rows > 1 else 0
    partial = torch.empty(sums, 2, dim, dtype=torch.float32, device=x.device)
    before, after = (x, dy, weight, saved, begin, count, dmean, dvar, dx, partial), (dmean0, dvar0)
    if piece:
        blocks, pointers = rows * p.groups * PIECE_BLOCKS, map(address, (*before, dweight, dbias, *after))
        piece.backward.launch(device, blocks, *pointers, rows, length, p.groups, *rate.values, early=True)
    else:
        slots = _slots(p, rows, tiles, x)
        _prepare(p, None, begin, slots, length)
        blocks, pointers = rows * tiles * p.strips, map(address, (*before, *after, slots))
        p.backward.launch(device, blocks, *pointers, rows, length, p.groups, tiles, *rate.values)
    if sums:
        pointers = map(address, (partial, dweight, dbias))
        (piece or p).parameter_sums.launch(device, -(-2 * dim // 32), *pointers, sums, dim, early=piece is not None)
    return dx, dweight, dbias, dmean0, dvar0
