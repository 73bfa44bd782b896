"""Launches of the time-step norms' kernels: CUDA tensors in, new tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan, Rates


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where its strides or its address rule out accesses of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _slots(p: Plan, rows: int, tiles: int, like: Tensor) -> Tensor | None:
    """What blocks publish that look back: 8 bytes a tile and a span of 32 tiles, in every row and group."""
    if tiles == 1 or p.cluster:
        return None
    return torch.empty(rows * p.groups * (tiles + (tiles - 1) // 32), dtype=torch.int64, device=like.device)


def _prepare(p: Plan, bos: Tensor | None, begin: Tensor, slots: Tensor | None, length: int) -> None:
    """Clear the slots, and find the documents: begin (B, L) of bos (B, L). Blocks of a cluster need neither."""
    if p.cluster or (bos is None and slots is None):
        return
    rows = 0 if bos is None else bos.shape[0]
    count = 0 if slots is None else slots.numel()
    grid = rows + min(132, -(-count // 4096))
    p.prepare.launch(begin.get_device(), grid, address(bos), address(begin), address(slots), count, rows, length)


def _blocks(p: Plan, rows: int, tiles: int) -> int:
    return rows * (p.cluster or tiles) * p.strips


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
    p = p.suited(rows, length, x.device)
    tiles = -(-length // p.tile)
    y = torch.empty_like(x)
    count_out = torch.empty(rows, dtype=torch.int64, device=x.device)
    mean_out, var_out = (torch.empty(rows, p.groups, dtype=torch.float32, device=x.device) for _ in range(2))
    saved = torch.empty((2, rows, p.groups, length) if save else (0,), dtype=torch.float32, device=x.device)
    begin = torch.empty((0,) if bos is None else (rows, length), dtype=torch.int32, device=x.device)
    slots = _slots(p, rows, tiles, x)
    bos = None if bos is None else bos.contiguous()
    _prepare(p, bos, begin, slots, length)
    count, mean, var = (None if t is None else t.contiguous() for t in (count, mean, var))
    tensors = (x, weight, bias, y, bos, begin, count, mean, var, count_out, mean_out, var_out, saved, slots)
    p.forward.launch(
        x.get_device(),
        _blocks(p, rows, tiles),
        *map(address, tensors),
        rows,
        length,
        p.groups,
        tiles,
        *rate.values,
        eps,
        early=bool(p.cluster),
    )
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
    p = p.suited(rows, length, x.device)
    tiles = -(-length // p.tile)
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    shape = (rows, p.groups) if stateful else (0,)
    dmean0, dvar0 = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    partial = torch.empty(rows * tiles, 2, dim, dtype=torch.float32, device=x.device)
    slots = _slots(p, rows, tiles, x)
    _prepare(p, None, begin, slots, length)
    dmean, dvar, count = (None if t is None else t.contiguous() for t in (dmean, dvar, count))
    tensors = (x, dy, weight, saved, begin, count, dmean, dvar, dx, partial, dmean0, dvar0, slots)
    p.backward.launch(
        x.get_device(),
        _blocks(p, rows, tiles),
        *map(address, tensors),
        rows,
        length,
        p.groups,
        tiles,
        *rate.values,
        early=bool(p.cluster),
    )
    pointers = address(partial), address(dweight), address(dbias)
    p.parameter_sums.launch(x.get_device(), -(-2 * dim // 32), *pointers, rows * tiles, dim, early=bool(p.cluster))
    return dx, dweight, dbias, dmean0, dvar0
