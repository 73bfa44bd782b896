"""What holds for every operation over time: any cut, documents apart, gradients, half precision, bounded state."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import OPERATIONS, Operation, boundaries
from torch import Tensor
from torch.utils import _pytree as pytree

over_operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def loss(tensors: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(t for t in tensors if t.is_floating_point() or t.is_complex()):
        t = torch.view_as_real(t) if t.is_complex() else t
        weights = torch.cos(torch.arange(t.numel(), dtype=torch.float64) + i).view(t.shape)
        total = total + (torch.where(t.abs() < 1e20, t, 0.0) * weights).sum()  # -1e30 stands for an empty sum
    return total


def in_pieces(
    operation: Operation, inputs: Any, weights: Any, bos: Any, segments: Any, cuts: list[int]
) -> tuple[Tensor, Any]:
    state, outputs = None, []
    for begin, end in zip([0, *cuts], [*cuts, inputs[0].shape[1]]):
        part = [None if t is None else t[:, begin:end] for t in (*inputs, bos, segments)]
        y, state = operation.call(part[:-2], weights, part[-2], part[-1], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@over_operations
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("seed", [0, 1, None], ids=["cuts0", "cuts1", "tokens"])
def test_pieces_equal_the_whole(operation: Operation, documents: bool, seed: int | None) -> None:
    length = 77 if seed is not None else 29
    cuts = list(range(1, length)) if seed is None else sorted(random.Random(seed).sample(range(1, length), 6))
    bos, segments = boundaries(2, length) if documents else (None, None)
    results = []
    for pieces in ([], cuts):
        inputs = [t.requires_grad_() for t in operation.inputs(2, length)]
        weights = [t.requires_grad_() for t in operation.weights(torch.float64)]
        y, state = in_pieces(operation, inputs, weights, bos, segments, pieces)
        gradients = torch.autograd.grad(loss([y, *leaves(state)]), [*inputs, *weights])
        results.append((y, state, gradients))
    torch.testing.assert_close(leaves(results[0]), leaves(results[1]), rtol=1e-9, atol=1e-9)


@over_operations
def test_a_packed_document_equals_the_document_alone(operation: Operation) -> None:
    """The memory's chunk grid is absolute, so its document begins on it."""
    inputs, weights = operation.inputs(2, 70), operation.weights(torch.float64)
    bos = torch.zeros(2, 70, dtype=torch.bool)
    bos[0, [0, 12, 61]] = True
    bos[1, [3, 12, 60]] = True
    packed, _ = operation.call(inputs, weights, bos, bos.to(torch.int64).cumsum(1), None)
    alone, _ = operation.call([t[:, 12:60] for t in inputs], weights, None, None, None)
    torch.testing.assert_close(packed[:, 12:60], alone, rtol=1e-9, atol=1e-9)


@over_operations
def test_documents_do_not_leak(operation: Operation) -> None:
    inputs, weights = [t.requires_grad_() for t in operation.inputs(1, 70)], operation.weights(torch.float64)
    bos = torch.zeros(1, 70, dtype=torch.bool)
    bos[0, [7, 41]] = True
    y, _ = operation.call(inputs, weights, bos, bos.to(torch.int64).cumsum(1), None)
    for gradient in torch.autograd.grad(y[:, 41:].square().sum(), inputs):
        assert gradient[:, :41].abs().max() == 0
        assert gradient[:, 41:].abs().max() > 0


@over_operations
def test_gradients(operation: Operation) -> None:
    length = 13
    inputs = [t.requires_grad_() for t in operation.inputs(1, length)]
    weights = [t.requires_grad_() for t in operation.weights(torch.float64)]
    bos, segments = boundaries(1, length, seed=3)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(inputs)
        y, state = in_pieces(operation, tensors[:n], tensors[n:], bos, segments, [3])
        return y, *(t for t in leaves(state) if t.requires_grad)

    assert torch.autograd.gradcheck(function, (*inputs, *weights), fast_mode=True)


@over_operations
def test_bf16_is_finite_and_close(operation: Operation) -> None:
    bos, segments = boundaries(2, 65)
    inputs = [t.requires_grad_() for t in operation.inputs(2, 65, torch.bfloat16)]
    weights = operation.weights(torch.bfloat16)
    y, state = operation.call(inputs, weights, bos, segments, None)
    wide = [t.detach().double() for t in inputs]
    exact, _ = operation.call(
        wide, [t.to(torch.promote_types(t.dtype, torch.float64)) for t in weights], bos, segments, None
    )
    assert y.dtype == torch.bfloat16
    assert float((y - exact).detach().norm() / exact.norm()) < 8e-3
    y.float().square().sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)
    if "attention" not in operation.name:
        assert not any(t.dtype == torch.bfloat16 for t in leaves(state))


@over_operations
def test_state_size_is_constant_and_owns_its_memory(operation: Operation) -> None:
    sizes = []
    for length in (16, 64):
        with torch.no_grad():
            _, state = operation.call(operation.inputs(2, length), operation.weights(torch.float64), None, None, None)
        sizes.append(sum(t.numel() for t in leaves(state)))
        if operation.name == "sliding_chunk_attention":
            assert sum(t.untyped_storage().nbytes() for t in leaves(state)) == 8 * sizes[-1]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["sliding_chunk_attention", "memory_lag2"])
def test_a_stream_may_gain_and_lose_its_ids(name: str) -> None:
    """None continues the open document; a stream without ids was document 0."""
    operation = next(o for o in OPERATIONS if o.name == name)
    inputs = operation.inputs(2, 30)
    zeros = torch.zeros(2, 30, dtype=torch.int64)
    for given in (torch.cat([zeros[:, :15], zeros[:, 15:]], 1), torch.cat([zeros[:, :15], 1 + zeros[:, 15:]], 1)):
        want, _ = operation.call(inputs, (), None, given, None)
        first, state = operation.call([t[:, :15] for t in inputs], (), None, None, None)
        second, state = operation.call([t[:, 15:22] for t in inputs], (), None, given[:, 15:22], state)
        third, _ = operation.call([t[:, 22:] for t in inputs], (), None, None, state)
        torch.testing.assert_close(torch.cat([first, second, third], 1), want)
