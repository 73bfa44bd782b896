"""The moving average's operators and gradient algebra on the CPU: what the GPU adds is only the kernels' sums."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gecko_lab.kernels.complex_ema import cuda, launches
from gecko_lab.kernels.complex_ema.reference import complex_ema as reference


def inputs(batch: int, length: int, width: int, modes: int, *, wide: bool = False) -> tuple[Tensor, ...]:
    real = torch.float64 if wide else torch.float32
    random = torch.Generator().manual_seed(batch * length + width)
    p = torch.rand(width, modes, generator=random, dtype=real)
    radius = 0.4 + 0.55 * torch.rand(width, modes, generator=random, dtype=real)
    q = torch.polar(radius, math.tau * torch.rand(width, modes, generator=random, dtype=real))
    gamma = torch.randn(width, modes, generator=random, dtype=q.dtype)
    x = torch.randn(batch, length, width, generator=random, dtype=real)
    state = torch.randn(batch, width, modes, generator=random, dtype=q.dtype)
    return x, p, q, gamma, state


def boundaries(batch: int, length: int, where: tuple[int, ...]) -> Tensor | None:
    if not where:
        return None
    bos = torch.zeros(batch, length, dtype=torch.bool)
    bos[0, list(where)] = True
    return bos


@pytest.mark.parametrize("where", [(), (0,), (3, 4, 10)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_gradients_from_the_sums_are_those_of_autograd(where: tuple[int, ...], carried: bool, final: bool) -> None:
    x, p, q, gamma, state = inputs(2, 11, 3, 4, wide=True)
    bos = boundaries(2, 11, where)
    dy, dh = torch.randn_like(x), torch.randn_like(state)
    leaves = [t.requires_grad_() for t in (x, p, q, gamma, state)]
    y, h = reference(x, p, q, gamma, bos=bos, state=state if carried else None)
    ours = torch.ops.gecko_lab.complex_ema(x, p, q, gamma, bos, state if carried else None)
    torch.testing.assert_close(ours, (y, h))
    wanted = torch.autograd.grad(
        [y, h] if final else [y], leaves, [dy, dh] if final else [dy], allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        got = torch.ops.gecko_lab.complex_ema_backward(
            dy, dh if final else None, x, p, q, gamma, bos, state if carried else None
        )
    for name, ours_, theirs in zip(("x", "p", "q", "gamma", "state"), got, wanted):
        if carried or name != "state":
            torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("with_state", [False, True])
def test_operators_pass_opcheck(with_state: bool) -> None:
    x, p, q, gamma, state = inputs(2, 5, 3, 4)
    bos = boundaries(2, 5, (2,)) if with_state else None
    entering = state if with_state else None
    torch.library.opcheck(torch.ops.gecko_lab.complex_ema.default, (x, p, q, gamma, bos, entering))
    gradient = None if entering is None else torch.randn_like(entering)
    arguments = (torch.randn_like(x), gradient, x, p, q, gamma, bos, entering)
    torch.library.opcheck(torch.ops.gecko_lab.complex_ema_backward.default, arguments)


@pytest.mark.parametrize("real", [False, True])
def test_public_function_matches_the_reference_with_gradients(real: bool) -> None:
    x, p, q, gamma, state = inputs(2, 7, 3, 4)
    if real:
        q, gamma, state = q.abs(), gamma.real.clone(), state.real.clone()
    leaves = [t.requires_grad_() for t in (x, p, q, gamma, state)]
    bos = boundaries(2, 7, (5,))
    results = []
    for function in (cuda.complex_ema, reference):
        y, h = function(x, p, q, gamma, bos=bos, state=state)
        assert h.is_complex() != real
        results.append((y, h, *torch.autograd.grad(y.square().sum() + h.abs().square().sum(), leaves)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks_and_under_checkpointing() -> None:
    x, p, q, gamma, state = inputs(2, 7, 4, 4)
    leaves = [t.requires_grad_() for t in (x, p, q, gamma)]

    def loss(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
        y, h = cuda.complex_ema(x, p, q, gamma, state=state)
        return y.square().sum() + h.real.sum()

    def only_output(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
        return cuda.complex_ema(x, p, q, gamma)[0].square().sum()

    for function in (loss, only_output):
        plain = torch.autograd.grad(function(*leaves), leaves)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for variant in (compiled, lambda *a, f=function: checkpoint(f, *a, use_reentrant=False)):
            for ours, theirs in zip(torch.autograd.grad(variant(*leaves), leaves), plain):
                torch.testing.assert_close(ours, theirs)


def test_autocast_keeps_parameters_and_gradients_in_float32() -> None:
    x, p, q, gamma, _ = inputs(1, 6, 3, 4)
    p.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, h = cuda.complex_ema(x.bfloat16(), p, q, gamma)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.complex64)
    (gradient,) = torch.autograd.grad(y.float().sum(), p)
    assert gradient.dtype == torch.float32


def test_unsupported_names_the_reason() -> None:
    x, p, q, gamma, _ = inputs(1, 4, 3, 33)
    assert "N=33" in str(cuda.unsupported(x, p, q, gamma))
    x, p, q, gamma, _ = inputs(1, 4, 3, 4)
    assert cuda.unsupported(x, p, q, gamma) is None
    assert "float64" in str(cuda.unsupported(x.double(), p, q, gamma))


@pytest.mark.parametrize(
    ("batch", "tiles", "strips", "blocks"), [(1, 64, 256, 1), (8, 1, 256, 1), (300, 1, 2, 60), (3, 2, 4, 3)]
)
def test_rows_share_blocks_where_they_are_more_than_the_multiprocessors(
    batch: int, tiles: int, strips: int, blocks: int
) -> None:
    assert launches._row_blocks(batch, tiles, strips, 132) == blocks
