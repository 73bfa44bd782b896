"""Row norms (spec section 2) on CUDA: RMS and layer norms of slices of the features. See norm.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime import Module
from . import launch, reference

_LIBRARY = torch.library.Library("gecko_lab", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "row_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool centered, bool save) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "row_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor saved, int groups, float eps, "
    "bool centered) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    return _row_norm(x, weight, None, groups, eps, False)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5
) -> Tensor:
    return _row_norm(x, weight, bias, groups, eps, True)


def unsupported(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5
) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in launch.TYPES:
            return f"{name}.dtype={tensor.dtype}: the kernels take bfloat16 and float32"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"bias.dtype={bias.dtype}: the kernels take that of weight, {weight.dtype}"
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)}: the kernels need at least one element"
    features = x.shape[-1] // groups
    most = launch.MOST_THREADS * launch.VECTORS_A_THREAD * launch.access(features, x.dtype)
    if features > most:
        return f"D/groups={features}: the kernels take at most {most} features a group of this divisibility and dtype"
    return None


def modules() -> list[Module]:
    """What the 7B shape needs: rows of 4,096 in bf16 and float32."""
    kinds = [(dtype, centered) for dtype in (torch.bfloat16, torch.float32) for centered in (False, True)]
    return [launch.plan(4096, dtype, torch.float32, centered, 1).module for dtype, centered in kinds]


class RowNorm(torch.autograd.Function):
    """y; keeps x and one float32 number (two when centered) a row and group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, centered: bool
    ) -> Tensor:
        ctx.options = groups, eps, centered
        y, saved = torch.ops.gecko_lab.row_norm(x, weight, bias, *ctx.options, True)
        ctx.save_for_backward(x, weight, bias, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.gecko_lab.row_norm_backward(dy, x, weight, bias, saved, *ctx.options)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None, None


def _row_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, centered: bool) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return RowNorm.apply(x, weight, bias, groups, eps, centered)
    return torch.ops.gecko_lab.row_norm(x, weight, bias, groups, eps, centered, False)[0]


def _plan(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, centered: bool) -> launch.Plan:
    like = weight if weight is not None else bias
    parameters = torch.float32 if like is None else like.dtype
    return launch.plan(x.shape[-1] // groups, x.dtype, parameters, centered, groups)


def _forward_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, centered: bool, save: bool
) -> tuple[Tensor, Tensor]:
    return launch.run_forward(_plan(x, weight, bias, groups, centered), eps, x, weight, bias, save)


def _backward_cuda(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    groups: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.run_backward(_plan(x, weight, bias, groups, centered), dy, x, weight, bias, saved)


def _forward_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, centered: bool, save: bool
) -> tuple[Tensor, Tensor]:
    if centered:
        y = reference.layer_norm(x, weight, bias, groups=groups, eps=eps)
    else:
        y = reference.rms_norm(x, weight, groups=groups, eps=eps)
    cells = x.float().view(-1, groups, x.shape[-1] // groups)
    mean = cells.mean(-1) if centered else torch.zeros(cells.shape[:2])
    scale = torch.rsqrt((cells - mean[..., None]).square().mean(-1) + eps)
    return y, torch.stack([scale, mean][: 1 + centered]) if save else torch.empty(0)


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    groups: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = x.shape[-1]
    cells, g = (t.float().view(-1, groups, dim // groups) for t in (x, dy))
    scale = saved[0, ..., None]
    unit = (cells - saved[1, ..., None] if centered else cells) * scale
    gw = g if weight is None else g * (1 + weight.float()).view(groups, -1)
    dx = scale * (gw - unit * (gw * unit).mean(-1, keepdim=True))
    if centered:
        dx = dx - scale * gw.mean(-1, keepdim=True)
    dweight = x.new_empty(0) if weight is None else (g * unit).sum(0).view(dim).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else g.sum(0).view(dim).to(bias.dtype)
    return dx.view(x.shape).to(x.dtype), dweight, dbias


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, centered: bool, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (1 + centered, x.numel() // x.shape[-1], groups) if save else (0,)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(shape, dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    groups: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return dx, dweight, dbias


for _name, _cuda, _cpu, _fake in (
    ("row_norm", _forward_cuda, _forward_cpu, _forward_fake),
    ("row_norm_backward", _backward_cuda, _backward_cpu, _backward_fake),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_LIBRARY)
