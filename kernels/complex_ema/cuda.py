"""The complex moving average on the GPU: operators, gradients and what they support. Source: spec section 3."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launches, steps

KERNELS = launches.MODULES
SPILL_BUDGET = 256  # bytes: the tensor-core kernels fill the 128 registers of a 512-thread block
MAX_MODES = max(launches.LANES)
MAX_BATCH = 65535  # of a grid's second dimension
_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, *, bos: Tensor | None = None, state: Tensor | None = None
) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    if x.dtype not in _DTYPES:
        return f"x.dtype={x.dtype}: the kernels take bfloat16 and float32"
    if p.shape[1] > MAX_MODES:
        return f"N={p.shape[1]} modes: the kernels take at most {MAX_MODES}"
    if x.shape[0] > MAX_BATCH:
        return f"B={x.shape[0]}: the kernels take at most {MAX_BATCH}"
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)}: the kernels need at least one element"
    if wide := [t.dtype for t in (p, q, gamma) if t.dtype in (torch.float64, torch.complex128)]:
        return f"parameters in {wide[0]}: the kernels compute in float32"
    return None


def complex_ema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, *, bos: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = Re(sum_n gamma h_t) + x_t (B, L, D) in x's dtype and the last h (B, D, N); h_t = keep_t q h_{t-1} + p x_t.

    x (B, L, D) bfloat16 or float32; p, q, gamma (D, N), q and gamma both real or both complex; bos (B, L); state is
    the h before the first step. Only the arguments are kept for the backward pass.
    """
    wide = torch.complex64
    entering = None if state is None else state.to(wide)
    y, h = _Average.apply(x, p.to(torch.float32), q.to(wide), gamma.to(wide), bos, entering)
    return y, h if q.is_complex() else h.real


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, p, q, gamma, bos, state)
        ctx.set_materialize_grads(False)
        return torch.ops.gecko_lab.complex_ema(x, p, q, gamma, bos, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, p, q, gamma, bos, state = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dp, dq, dgamma, dstate = torch.ops.gecko_lab.complex_ema_backward(dy, dh, x, p, q, gamma, bos, state)
        return dx, dp, dq, dgamma, None, None if state is None else dstate


def _forward(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, p, q, gamma, bos, state = (_plain(t) for t in (x, p, q, gamma, bos, state))
    sums: Any = launches if x.is_cuda else steps
    y, h = sums.filter_steps(x, p, q, gamma, bos, state, reverse=False)
    return y, h


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    bos: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, dh, x, p, q, gamma, bos, state = (_plain(t) for t in (dy, dh, x, p, q, gamma, bos, state))
    sums: Any = launches if x.is_cuda else steps
    dx, dstate = sums.filter_steps(dy, p, q, gamma, bos, dh, reverse=True)
    dp, dq, dgamma = sums.parameter_gradients(x, dy, p, q, gamma, bos, state, dh, after_filter=True)
    return dx, dp, dq, dgamma, dstate


def _plain(tensor: Any) -> Any:
    """The tensor as its memory says: contiguous, without the lazy conjugation and negation of complex views."""
    return None if tensor is None else tensor.resolve_conj().resolve_neg().contiguous()


def _forward_fake(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, bos: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), q.new_empty((x.shape[0], *q.shape))


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    bos: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dstate = q.new_empty((x.shape[0], *q.shape))
    return x.new_empty(x.shape), p.new_empty(p.shape), q.new_empty(q.shape), gamma.new_empty(gamma.shape), dstate


_FORWARD = "Tensor x, Tensor p, Tensor q, Tensor gamma, Tensor? bos, Tensor? state"
_library = torch.library.Library("gecko_lab", "FRAGMENT")
_library.define(f"complex_ema({_FORWARD}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"complex_ema_backward(Tensor dy, Tensor? dh, {_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CUDA", "CPU"):
    _library.impl("complex_ema", _forward, _key)
    _library.impl("complex_ema_backward", _backward, _key)
torch.library.register_fake("gecko_lab::complex_ema", _forward_fake, lib=_library)
torch.library.register_fake("gecko_lab::complex_ema_backward", _backward_fake, lib=_library)
