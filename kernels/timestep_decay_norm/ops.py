"""The operators behind both time-step norms, on CUDA, on the CPU and on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import NormState
from . import launch, steps
from .plan import TYPES, VECTORS_A_LANE, Plan, access, plan, rates

_LIBRARY = torch.library.Library("gecko_lab", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "time_norm(Tensor x, Tensor weight, Tensor bias, Tensor? bos, Tensor? count, Tensor? mean, Tensor? var, "
    "int groups, float? beta1, float? beta2, float eps, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "time_norm_backward(Tensor dy, Tensor? dmean, Tensor? dvar, Tensor x, Tensor weight, Tensor saved, Tensor begin, "
    "Tensor? count, bool stateful, int groups, float? beta1, float? beta2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class TimeNorm(torch.autograd.Function):
    """y, and the state after the last step; keeps x and two float32 numbers a step and group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        count: Tensor | None,
        bos: Tensor | None,
        groups: int,
        beta1: float | None,
        beta2: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # a state that nothing uses after the call: no kernels that make zeros
        ctx.options = mean is not None, groups, beta1, beta2
        y, count_out, mean_out, var_out, saved, begin = torch.ops.gecko_lab.time_norm(
            x, weight, bias, bos, count, mean, var, groups, beta1, beta2, eps, True
        )
        ctx.save_for_backward(x, weight, saved, begin, count)
        ctx.mark_non_differentiable(count_out)
        return y, count_out, mean_out, var_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, _: None, dmean: Tensor | None, dvar: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
        dx, dweight, dbias, dmean0, dvar0 = torch.ops.gecko_lab.time_norm_backward(
            dy, dmean, dvar, *ctx.saved_tensors, *ctx.options
        )
        stateful, *_ = ctx.options
        return dx, dweight, dbias, dmean0 if stateful else None, dvar0 if stateful else None, *[None] * 6


def time_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    beta1: float | None,
    beta2: float | None,
    eps: float,
    bos: Tensor | None,
    state: NormState | None,
) -> tuple[Tensor, NormState]:
    """Both norms: decayed by beta1 and beta2 (spec 1.2), or cumulative where they are None (spec 1.1)."""
    count = None if state is None else state.count.to(torch.int64)
    mean, var = (None, None) if state is None else (state.mean.float(), state.var.float())
    leaves = (x, weight, bias, mean, var)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        y, *after = TimeNorm.apply(x, weight, bias, mean, var, count, bos, groups, beta1, beta2, eps)
    else:
        y, *after, _, _ = torch.ops.gecko_lab.time_norm(
            x, weight, bias, bos, count, mean, var, groups, beta1, beta2, eps, False
        )
    return y, NormState(*after)


def unsupported(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    features = x.shape[-1] // groups
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in TYPES:
            return f"{name}.dtype={tensor.dtype}: the kernels take bfloat16 and float32"
    if bias.dtype != weight.dtype:
        return f"bias.dtype={bias.dtype}: the kernels take that of weight, {weight.dtype}"
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)}: the kernels need at least one element"
    if x.shape[1] > 2**30:
        return f"L={x.shape[1]}: the kernels count steps in 32 bits"
    most = 32 * VECTORS_A_LANE * access(features, x.dtype)
    if features > most:
        return f"D/groups={features}: the kernels take at most {most} features a group of this divisibility and dtype"
    return None


def _plan(x: Tensor, weight: Tensor, groups: int, beta1: float | None) -> Plan:
    return plan(x.shape[-1] // groups, x.dtype, weight.dtype, beta1 is not None, groups)


def _forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bos: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    beta1: float | None,
    beta2: float | None,
    eps: float,
    save: bool,
) -> Six:
    cut, rate = _plan(x, weight, groups, beta1), rates(beta1, beta2)
    return launch.run_forward(cut, rate, eps, x, weight, bias, bos, count, mean, var, save)


def _backward_cuda(
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    begin: Tensor,
    count: Tensor | None,
    stateful: bool,
    groups: int,
    beta1: float | None,
    beta2: float | None,
) -> Five:
    cut, rate = _plan(x, weight, groups, beta1), rates(beta1, beta2)
    return launch.run_backward(cut, rate, dy, dmean, dvar, x, weight, saved, begin, count, stateful)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bos: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    beta1: float | None,
    beta2: float | None,
    eps: float,
    save: bool,
) -> Six:
    batch, length, _ = x.shape
    mean_out, var_out = (x.new_empty(batch, groups, dtype=torch.float32) for _ in range(2))
    saved = x.new_empty((2, batch, groups, length) if save else (0,), dtype=torch.float32)
    begin = x.new_empty((0,) if bos is None else (batch, length), dtype=torch.int32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(batch, dtype=torch.int64), mean_out, var_out, saved, begin


def _backward_fake(
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    begin: Tensor,
    count: Tensor | None,
    stateful: bool,
    groups: int,
    beta1: float | None,
    beta2: float | None,
) -> Five:
    shape = (x.shape[0], groups) if stateful else (0,)
    dmean0, dvar0 = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight), dmean0, dvar0


for _name, _cuda, _cpu, _fake in (
    ("time_norm", _forward_cuda, steps.forward, _forward_fake),
    ("time_norm_backward", _backward_cuda, steps.backward, _backward_fake),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_LIBRARY)
