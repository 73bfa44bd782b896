"""Cross entropy of rows of logits on CUDA: one pass over them forward, one backward. See cross_entropy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import Kernel, Module

MODULE = Module(__file__, "cross_entropy.cu", kernels=("forward", "backward"), defines={"ELEMENT": "bf16", "WIDTH": 8})
THREADS = 512
_TYPES = {torch.bfloat16: ("bf16", 8), torch.float32: ("float", 4)}
_VARIANTS = {
    (dtype, width): MODULE.specialise(ELEMENT=name, WIDTH=width)
    for dtype, (name, widest) in _TYPES.items()
    for width in (1, widest)
}
KERNELS = tuple(_VARIANTS.values())
_FORWARD = {key: module.kernel("forward", args="PPPPi", block=THREADS) for key, module in _VARIANTS.items()}
_BACKWARD = {key: module.kernel("backward", args="PPPPi", block=THREADS) for key, module in _VARIANTS.items()}


def unsupported(logits: Tensor, targets: Tensor, *_: Tensor) -> str | None:
    """Why these logits (R, V) and targets (R,) cannot take the kernel; None: they can."""
    if logits.dtype not in _TYPES:
        return f"logits.dtype={logits.dtype}: the kernels take bfloat16 and float32"
    if targets.dtype != torch.int64:
        return f"targets.dtype={targets.dtype}: the kernels take int64"
    if not logits.is_contiguous() or not targets.is_contiguous():
        return "logits or targets are not contiguous"
    if logits.numel() == 0 or logits.shape[1] >= 2**31 - THREADS * 8:
        return f"logits of shape {tuple(logits.shape)}: the kernels need 1 to 2**31 - 4097 columns and a row"
    return None


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, lse = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    rows, columns = logits.shape
    addresses = (x.data_ptr() for x in (losses, lse, logits, targets))
    _pick(_FORWARD, logits).launch(logits.get_device(), rows, *addresses, columns)
    return losses, lse


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor) -> Tensor:
    lse, dlosses = lse.contiguous(), dlosses.float().contiguous()
    rows, columns = logits.shape
    addresses = (x.data_ptr() for x in (logits, targets, lse, dlosses))
    _pick(_BACKWARD, logits).launch(logits.get_device(), rows, *addresses, columns)
    return logits


def _pick(kernels: dict[tuple[torch.dtype, int], Kernel], logits: Tensor) -> Kernel:
    widest = _TYPES[logits.dtype][1]
    aligned = logits.data_ptr() % 16 == 0 and logits.shape[1] % widest == 0
    return kernels[logits.dtype, widest if aligned else 1]
