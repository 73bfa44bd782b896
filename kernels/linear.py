"""Linear layers that share an input or a sum, so that what autograd would add in passes of its own is added inside the
matrix products or passes that there are anyway: `linears` the gradients of one input, `add_linear` a second product,
`silu_linear` the gradients of two readers and of the bias, `gated_feed_forward` keeps silu(a) b only as a and b.

Without a GPU, under torch.compile (which fuses additions itself) and in the mode `reference` they are what their
docstrings say, in plain PyTorch. All follow autocast as `torch.nn.functional.linear` does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import backend, ops

__all__ = ["accumulate", "add_linear", "gated_feed_forward", "linears", "silu_linear"]


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """layer(x) for each layer: x (..., K) -> (..., N) each."""
    if _plain(x):
        return tuple(layer(x) for layer in layers)
    x, *tensors = _cast(x, *(t for layer in layers for t in (layer.weight, layer.bias)))
    found: tuple[Tensor, ...] = _Linears.apply(x, *tensors)
    return found


def silu_linear(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """silu(layer(x)) twice, for two readers: x (..., K) -> two tensors (..., N), which may share memory."""
    if not _plain(x) and layer.bias is not None:
        values, weight, bias = _cast(x, layer.weight, layer.bias)
        if values.dtype in (torch.bfloat16, torch.float32):
            pair: tuple[Tensor, Tensor] = _SiluLinear.apply(values, weight, bias)
            return pair
    y = ops.silu(layer(x))
    return y, y


def add_linear(h: Tensor, u: Tensor, layer: nn.Linear) -> Tensor:
    """h + layer(u), the layer without a bias: h (..., N), u (..., K). May use h's memory: nothing else may need h."""
    if not _plain(u):
        values, weight = _cast(u, layer.weight)
        if h.dtype == values.dtype and h.is_contiguous() and layer.bias is None:
            added: Tensor = _AddLinear.apply(h, values, weight)
            return added
    return h + layer(u)


def gated_feed_forward(x: Tensor, fc1: nn.Linear, fc3: nn.Linear, fc2: nn.Linear, dropout: float = 0.0) -> Tensor:
    """fc2(silu(fc1(x)) * fc3(x)), layers without biases: x (..., D) -> (..., N). dropout is that of fc2's input."""
    if not dropout and not _plain(x):
        x, *weights = _cast(x, fc1.weight, fc3.weight, fc2.weight)
        if x.dtype in (torch.bfloat16, torch.float32):
            y: Tensor = _GatedFeedForward.apply(x, *weights)
            return y
    return fc2(F.dropout(ops.swiglu(fc1(x), fc3(x)), dropout))


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (N, M) += a (N, K) @ b (K, M), in the type of total; on a GPU the product is not rounded before."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _plain(x: Tensor) -> bool:
    return (
        not x.is_cuda
        or backend.get_mode() == "reference"
        or torch.compiler.is_compiling()
        or isinstance(backend.load("gates"), str)  # which would define swiglu_again
    )


def _cast(*tensors: Any) -> list[Any]:
    """As autocast casts the operands of a product."""
    if not torch.is_autocast_enabled("cuda"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cuda")
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but never a view, which `_AddLinear` could not change."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    if bias is None:
        torch.mm(_rows(x), weight.T, out=_rows(y))
    else:
        torch.addmm(bias, _rows(x), weight.T, out=_rows(y))
    return y


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = tensors[::2], tensors[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(_linear(x, weight, bias) for weight, bias in zip(weights, biases) if weight is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wanted, dx = ctx.needs_input_grad, None
        gradients: list[Tensor | None] = []
        for i, (dy, weight) in enumerate(zip(dys, weights)):
            if dy is None:
                gradients += [None, None]
                continue
            rows = _rows(dy)
            if wanted[0]:
                dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
            gradients.append(rows.T @ _rows(x) if wanted[1 + 2 * i] else None)
            gradients.append(rows.sum(0) if wanted[2 + 2 * i] else None)
        return None if dx is None else dx.view(x.shape), *gradients


class _SiluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        p = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, p)
        ctx.set_materialize_grads(False)
        ctx.type = bias.dtype
        y = torch.ops.gecko_lab.silu(p)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, p = ctx.saved_tensors
        first, second = sorted(dys, key=lambda dy: dy is None)
        if first is None:
            return None, None, None
        dp, db = torch.ops.gecko_lab.silu_columns(first, second, p)
        rows, (x_wanted, weight_wanted, bias_wanted) = _rows(dp), ctx.needs_input_grad
        dx = (rows @ weight).view(x.shape) if x_wanted else None
        return dx, rows.T @ _rows(x) if weight_wanted else None, db.to(ctx.type) if bias_wanted else None


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(u, weight)
        ctx.mark_dirty(h)
        _rows(h).addmm_(_rows(u), weight.T)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        rows, (_, u_wanted, weight_wanted) = _rows(dy), ctx.needs_input_grad
        du = (rows @ weight).view(u.shape) if u_wanted else None
        return dy, du, rows.T @ _rows(u) if weight_wanted else None


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        a, b = F.linear(x, w1), F.linear(x, w3)
        ctx.save_for_backward(x, w1, w3, w2, a, b)
        return F.linear(torch.ops.gecko_lab.swiglu(a, b, None), w2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w3, w2, a, b = ctx.saved_tensors
        rows, wanted = _rows(dy), ctx.needs_input_grad
        f = rows @ w2  # its gradient, until the next line puts f there
        da, db = torch.ops.gecko_lab.swiglu_again(f, _rows(a), _rows(b))
        dw2 = rows.T @ f if wanted[3] else None
        del f
        dw1, dw3 = (d.T @ _rows(x) if want else None for d, want in zip((da, db), wanted[1:3]))
        dx = (da @ w1).addmm_(db, w3).view(x.shape) if wanted[0] else None
        return dx, dw1, dw3, dw2
