"""Comparing an operation's kernels with its float64 reference on the GPU: values, states and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOAT32 = 2e-5  # relative l2


def poison() -> None:
    """Leave NaN in the memory that the next allocations take."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in [1 << 22] * 16 + [1 << 12] * 64]
    del blocks


def documents(batch: int, length: int, where: list[int]) -> Tensor:
    """Segments (B, L) whose last row begins a document at each of `where`; the first row is one document."""
    bos = torch.zeros(batch, length, dtype=torch.int64)
    bos[-1, [t for t in where if t < length]] = 1
    return bos.cumsum(1).cuda()


def run(
    function: Callable[..., Any], x: tuple[Tensor, ...], cuts: list[int], segments: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """y, the floating-point leaves of the final state, and the gradients of a fixed random function of all of them."""
    leaves = [t.detach().requires_grad_() for t in x]
    state, outputs, at = None, [], 0
    for size in cuts:
        ids = None if segments is None else segments[:, at : at + size]
        y, state = function(*(t[:, at : at + size] for t in leaves), segments=ids, state=state, **options)
        outputs.append(y)
        at += size
    assert state is not None
    found = {"y": torch.cat(outputs, 1)}
    found |= {name: t for name, t in state._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}
    random = torch.Generator(device="cuda").manual_seed(7)
    loss: Any = 0
    for t in found.values():
        weight = torch.randn(t.shape, generator=random, device="cuda").to(torch.bfloat16)
        if t.requires_grad:
            loss = loss + (t * weight.to(t.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return found | {f"d{name}": grad for name, grad in zip(("query", "key", "value"), grads)}


def relative(a: Tensor, b: Tensor) -> float:
    # the logarithm of nothing, -1e30, must be there in both but not hide the rest
    nothing = b.detach() < -1e29
    assert torch.equal(a < -1e29, nothing)
    a, b = (t.detach().double().masked_fill(nothing, 0) for t in (a, b))
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.numel() else 0.0


def compare(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    x: tuple[Tensor, ...],
    cuts: list[int],
    segments: Tensor | None,
    **options: Any,
) -> None:
    """float32 agrees to FLOAT32; bfloat16 to twice the rounding of the exact result to the result's type."""
    poison()
    got = run(ours, x, cuts, segments, **options)
    wanted = run(theirs, tuple(t.double() for t in x), [sum(cuts)], segments, **options)
    failed = {}
    for name, value in got.items():
        exact = wanted[name]
        # float32 results of bfloat16 products (the state's) may differ by what one rounding of an input makes
        allowed = FLOAT32 if x[0].dtype == torch.float32 else 2 * relative(exact.to(torch.bfloat16), exact)
        error = relative(value, exact)
        if not error <= max(allowed, 1e-12):
            failed[name] = f"{error:.2e} > {allowed:.2e}"
    assert not failed, failed
