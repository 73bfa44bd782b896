"""Rotary positions as a CUDA kernel (spec 4.1): one read and one write, forward and backward. See rotate.cu."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime import Module
from . import reference

MODULE = Module(__file__, "rotate.cu", kernels=("rotate",), defines={"ELEMENT": "bf16", "WIDTH": 8})
THREADS, UNROLL = 256, 2
_TYPES = {torch.bfloat16: ("bf16", 8), torch.float32: ("float", 4)}
_KERNELS = {
    (dtype, width): MODULE.specialise(ELEMENT=name, WIDTH=width)
    for dtype, (name, widest) in _TYPES.items()
    for width in (2, widest)
}
KERNELS = tuple(_KERNELS.values())
_LAUNCHED = {key: module.kernel("rotate", args="PPPPIIIIiff", block=THREADS) for key, module in _KERNELS.items()}


def unsupported(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, scale: float = 1.0) -> str | None:
    """Why these arguments cannot take the kernel; None: they can."""
    if x.dtype not in _TYPES:
        return f"x.dtype={x.dtype}: bfloat16 and float32 are supported"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.requires_grad or sin.requires_grad:
        return "cos and sin must be float32 and without gradient"
    if not 0 < x.numel() < 2**32:
        return f"{x.numel()} elements: 1 to 2**32 - 1 are supported"
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, scale: float = 1.0) -> Tensor:
    """x (B, L, H, S), cos and sin (L, S/2) -> x turned on its first heads, times scale."""
    turned: Tensor = _Rotate.apply(x, cos, sin, rope_heads, scale)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, scale: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.options = rope_heads, scale
        return torch.ops.gecko_lab.rotate(x, cos, sin, rope_heads, 1.0, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        rope_heads, scale = ctx.options
        return torch.ops.gecko_lab.rotate(dy, *ctx.saved_tensors, rope_heads, -1.0, scale), None, None, None, None


def _cuda(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, sign: float, scale: float) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    if x.data_ptr() % 4:  # a pair is one access
        x = x.clone()
    y = torch.empty_like(x)
    width = _TYPES[x.dtype][1]
    if x.shape[-1] % width or any(t.data_ptr() % 16 for t in (x, cos, sin)):
        width = 2
    count = x.numel() // width
    _LAUNCHED[x.dtype, width].launch(
        x.get_device(), -(-count // (THREADS * UNROLL)), *(t.data_ptr() for t in (y, x, cos, sin)),
        count, x.shape[3] // width, x.shape[2], x.shape[1], rope_heads, sign, scale,
    )  # fmt: skip
    return y


def _cpu(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, sign: float, scale: float) -> Tensor:
    return reference.rotate(x, cos, sign * sin, rope_heads, scale).clone(memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("gecko_lab", "FRAGMENT")
_LIBRARY.define(
    "rotate(Tensor x, Tensor cos, Tensor sin, int rope_heads, float sign, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.impl("rotate", _cuda, "CUDA")
_LIBRARY.impl("rotate", _cpu, "CPU")
torch.library.register_fake("gecko_lab::rotate", lambda x, *_: x.new_empty(x.shape), lib=_LIBRARY)
