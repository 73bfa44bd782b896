"""Run an operation's kernels on the GPU and compare outputs and gradients with the reference in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .inventory import Example

# Of the largest value: bfloat16 outputs are rounded to 8 bits; float32 kernels may use tf32 tensor cores.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Outcome:
    """One example in one dtype: the largest error relative to the largest value, or the reason why it did not run."""

    op: str
    case: str
    dtype: torch.dtype
    forward: float = float("nan")
    backward: float = float("nan")
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran and both errors, NaN excluded, are within the tolerance of the dtype."""
        limit = TOLERANCE[self.dtype]
        return not self.failure and self.forward <= limit and self.backward <= limit


def compare(example: Example, dtype: torch.dtype, call: Callable[..., Any], device: torch.device) -> Outcome:
    """Compare `call` on a device with the same operation on the CPU in float64.

    Positional tensors of three or more dimensions take `dtype`; all others, such as weights and states, stay
    float32. Gradients are compared for the positional tensors and for `state`.
    """
    try:
        args = [_prepare(leaf, dtype, device) for leaf in example.args]
        kwargs = {
            name: tree_map(lambda leaf, grad=name == "state": _prepare(leaf, torch.float32, device, grad), value)
            for name, value in example.kwargs.items()
        }
        inputs = args, kwargs
        exact = tree_map(_exact, inputs)
        outputs, gradients = _run(call, inputs)
        expected, expected_gradients = _run(call, exact)
        forward = max(_error(a, b) for a, b in zip(outputs, expected, strict=True))
        backward = max(_error(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    except Exception as error:  # the table reports whatever a kernel does wrong
        return Outcome(example.op, example.label, dtype, failure=f"{type(error).__name__}: {error}")
    return Outcome(example.op, example.label, dtype, forward, backward)


def _prepare(leaf: Any, dtype: torch.dtype, device: torch.device, gradient: bool = True) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    narrow = leaf.dtype is torch.float32 and leaf.dim() >= 3
    moved = leaf.detach().to(device, dtype if narrow else leaf.dtype)
    return moved.requires_grad_(gradient and _differentiable(moved))


def _exact(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not _differentiable(leaf):
        return leaf.cpu() if isinstance(leaf, Tensor) else leaf
    wide = torch.complex128 if leaf.is_complex() else torch.float64
    return leaf.detach().to("cpu", wide).requires_grad_(leaf.requires_grad)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _run(call: Callable[..., Any], inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed random weighting of them, all on the CPU in double precision."""
    args, kwargs = inputs
    leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [leaf for leaf in tree_flatten(call(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
    smooth = [output for output in outputs if output.requires_grad]
    random = torch.Generator().manual_seed(1)
    # Multiples of 1/8 are the same numbers in every dtype.
    weights = [(torch.randint(-16, 17, output.shape, generator=random) / 8).to(output) for output in smooth]
    gradients = torch.autograd.grad(smooth, leaves, weights, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)]
    return [_double(output) for output in outputs], [_double(gradient) for gradient in zeros]


def _double(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).cpu().double()


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value expected; NaN where anything is not finite or shapes differ."""
    if actual.shape != expected.shape:
        return float("nan")
    if not expected.numel():
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
