"""Checks of arguments that operations share: each raises ValueError naming the argument, its value and the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import NormState


def _size(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], letters: str) -> None:
    """None in ``expected`` matches any size of at least 1."""
    fits = len(tensor.shape) == len(expected) and all(
        n > 0 if e is None else n == e for n, e in zip(tensor.shape, expected)
    )
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {_size(tensor)}; it must be {letters} = ({wanted})")


def real(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a real floating-point type")


def divides(name: str, value: int, of_name: str, of: int) -> None:
    if value < 1 or of % value:
        raise ValueError(f"{name} is {value}; it must be a positive divisor of {of_name} = {of}")


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; it must lie strictly between 0 and 1")


def mask(name: str, tensor: Tensor | None, batch: int, length: int) -> None:
    if tensor is None:
        return
    shape(name, tensor, (batch, length), "(B, L)")
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be bool")


def ids(name: str, tensor: Tensor | None, batch: int, length: int) -> None:
    if tensor is None:
        return
    shape(name, tensor, (batch, length), "(B, L)")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be int64")


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, bos: Tensor | None, state: NormState | None
) -> None:
    shape("x", x, (None, None, None), "(B, L, D)")
    real("x", x)
    batch, length, dim = x.shape
    divides("groups", groups, "D", dim)
    shape("weight", weight, (dim,), "(D,)")
    shape("bias", bias, (dim,), "(D,)")
    at_least("eps", eps, 0)
    mask("bos", bos, batch, length)
    if state is not None:
        shape("state.count", state.count, (batch,), "(B,)")
        shape("state.mean", state.mean, (batch, groups), "(B, G)")
        shape("state.var", state.var, (batch, groups), "(B, G)")


def row_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> None:
    real("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., D) with D at least 1")
    dim = x.shape[-1]
    divides("groups", groups, "D", dim)
    at_least("eps", eps, 0)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            shape(name, value, (dim,), "(D,)")


def rope(cos: Tensor | None, sin: Tensor | None, length: int, features: int, count: int, rope_heads: int) -> None:
    if not 0 <= rope_heads <= count:
        raise ValueError(f"rope_heads is {rope_heads}; it must lie between 0 and the number of heads, {count}")
    if features % 2:
        raise ValueError(f"the heads have {features} features; rotation needs an even number")
    if cos is None or sin is None:
        raise ValueError(f"cos and sin are needed because rope_heads is {rope_heads}; one of them is None")
    shape("cos", cos, (length, features // 2), "(L, S/2)")
    shape("sin", sin, (length, features // 2), "(L, S/2)")


def heads(names: str, q: Tensor, k: Tensor, v: Tensor, chunk: int, segments: Tensor | None) -> None:
    """``names``: what the caller calls q and k."""
    first, second = names.split()
    shape(first, q, (None, None, None, None), "(B, L, H, S)")
    real(first, q)
    shape(second, k, tuple(q.shape), "(B, L, H, S)")
    shape("v", v, (*q.shape[:3], None), "(B, L, H, E)")
    at_least("chunk", chunk, 1)
    ids("segments", segments, q.shape[0], q.shape[1])
