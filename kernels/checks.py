"""Checks of arguments that operations share: each raises ValueError naming the argument, its value and the rule."""

from __future__ import annotations

import torch
from torch import Tensor


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
