"""Gates and views on the GPU against float64: values, gradients, odd sizes, streams, graphs, unwritten memory."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gecko_lab.kernels.gates import cuda as gates
from gecko_lab.kernels.z_views import cuda as views
from gecko_lab.kernels.z_views.reference import z_views as reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1,), (7,), (2, 3, 5), (3, 8), (1, 1, 4096), (2, 129, 256), (5, 1003))
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "silu": (gates.silu, F.silu, 1),
    "swiglu": (gates.swiglu, lambda a, b: F.silu(a) * b, 2),
    "gate": (gates.gate, lambda near, r: near * F.silu(r), 2),
    "gate+far": (gates.gate, lambda near, r, far: near * F.silu(r) + far, 3),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the kernels do not write must show: the pool that they allocate from holds NaN."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (64, 4096, 1 << 16, 1 << 20, 1 << 23)]
    del blocks


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """float32: 1e-5 relative l2. bfloat16: within twice the error of rounding the exact value."""
    exact = wanted.double()
    error = (got.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    rounding = (exact.to(dtype).double() - exact).norm() / exact.norm().clamp_min(1e-30)
    limit = 1e-5 if dtype == torch.float32 else 2 * rounding + 1e-5
    assert error <= limit, (float(error), float(limit))


def compare(ours: Callable[..., object], exact: Callable[..., object], inputs: list[Tensor], params: int = 0) -> None:
    """Outputs and gradients of `inputs`; the last `params` of them are float32 whatever the others are."""
    dtype = inputs[0].dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    got, wanted = ours(*inputs), exact(*wide)
    got, wanted = (list(x) if isinstance(x, tuple | list) else [x] for x in (got, wanted))
    dys = [torch.randn(y.shape, device="cuda").to(dtype) for y in got]
    gradients = torch.autograd.grad(got, inputs, dys)
    exact_gradients = torch.autograd.grad(wanted, wide, [dy.double() for dy in dys])
    for y, w in zip((*got, *gradients), (*wanted, *exact_gradients), strict=True):
        assert y.shape == w.shape
        close(y, w, y.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_gates(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, exact, count = CASES[name]
    compare(ours, exact, [(3 * torch.randn(shape, device="cuda")).to(dtype) for _ in range(count)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -200.0, -89.0, -87.5, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4], device="cuda", dtype=dtype)
    x.requires_grad_()
    y = gates.silu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(exact).sum(), exact)
    torch.testing.assert_close(y.double(), F.silu(exact), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 24, 3])
def test_halves_of_one_projection_are_read_in_place(width: int, dtype: torch.dtype) -> None:
    both = torch.randn(2, 33, 2 * width, device="cuda", dtype=dtype)
    compare(lambda x: gates.swiglu(*x.chunk(2, -1)), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [both])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_take_any_strides_and_unaligned_starts(dtype: torch.dtype) -> None:
    base = torch.randn(3, 64, 65, device="cuda", dtype=dtype)
    transposed, shifted = base.transpose(0, 1), base.flatten()[1 : 1 + 64 * 3 * 64].view(64, 3, 64)
    compare(gates.swiglu, CASES["swiglu"][1], [transposed.detach()[:, :, 1:], shifted.detach()])
    y = torch.randn(4, 6, 10, device="cuda", dtype=dtype)
    compare(lambda x: gates.silu(x).transpose(0, 2), lambda x: F.silu(x).transpose(0, 2), [y])


def angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    turns = torch.rand(length, size // 2, device="cuda") * 6.3
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "size", "count", "rope_heads"),
    [
        (1, 1, 1, 256, 4, 1),
        (2, 300, 4, 256, 4, 4),
        (3, 1001, 2, 256, 4, 1),
        (2, 37, 3, 64, 3, 2),
        (1, 50, 5, 6, 2, 5),
        (2, 19, 1, 2, 1, 1),
        (2, 40, 2, 200, 4, 0),
        (1, 65, 2, 512, 4, 2),
        (1, 33, 3, 510, 4, 3),
        (8, 512, 4, 128, 4, 4),
    ],
)
def test_views(batch: int, length: int, heads: int, size: int, count: int, rope_heads: int, dtype: torch.dtype,
               parameter: torch.dtype) -> None:  # fmt: skip
    z = torch.randn(batch, length, heads * size, device="cuda").to(dtype)
    gamma, beta = (0.3 * torch.randn(2, count, heads * size, device="cuda")).to(parameter).unbind()
    cos, sin = angles(length, size)
    options = {"heads": heads, "rope_heads": rope_heads, "rotated": 2}
    compare(
        lambda *x: views.z_views(*x, cos, sin, **options),
        lambda *x: reference(*x, cos.double(), sin.double(), **options),
        [z, gamma.clone(), beta.clone()],
    )


@pytest.mark.parametrize("rotated", [0, 1, 4])
def test_views_turn_the_first_ones_only(rotated: int) -> None:
    z, gamma, beta = torch.randn(2, 9, 64, device="cuda"), *torch.randn(2, 4, 64, device="cuda")
    cos, sin = angles(9, 32)
    got = views.z_views(z, gamma, beta, cos, sin, heads=2, rope_heads=2, rotated=rotated)
    wanted = reference(z, gamma, beta, cos, sin, heads=2, rope_heads=2, rotated=rotated)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_views_with_one_gradient_missing() -> None:
    z = torch.randn(2, 9, 64, device="cuda", requires_grad=True)
    gamma, beta = torch.randn(2, 4, 64, device="cuda").unbind()
    (got,) = torch.autograd.grad(views.z_views(z, gamma, beta, heads=2)[2].sum(), z)
    (wanted,) = torch.autograd.grad(reference(z, gamma, beta, heads=2)[2].sum(), z)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def chain(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    q, k, aq, ak = views.z_views(z, gamma, beta, heads=2)
    return gates.gate(gates.swiglu(q, k), aq, gates.silu(ak)).float().square().sum()


def chain_inputs() -> list[Tensor]:
    z = torch.randn(2, 300, 512, device="cuda").bfloat16()
    return [x.requires_grad_() for x in (z, *torch.randn(2, 4, 512, device="cuda").unbind())]


def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(chain(*inputs), inputs)


def test_gradients_are_the_same_bits_every_time() -> None:
    inputs = chain_inputs()
    first = gradients(inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs), strict=True))


def test_on_another_stream_and_on_a_fresh_thread() -> None:
    inputs = chain_inputs()
    wanted = gradients(inputs)
    torch.cuda.synchronize()
    stream, found = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        found.append(gradients(inputs))
    stream.synchronize()
    thread = threading.Thread(target=lambda: found.append(gradients(inputs)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 2
    for got in found:
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_captured_in_a_graph_and_replayed_on_new_values() -> None:
    inputs = chain_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(inputs)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients(inputs), strict=True))


def test_checkpointed_compiled_and_under_autocast() -> None:
    inputs = chain_inputs()
    wanted = gradients(inputs)
    again = torch.utils.checkpoint.checkpoint(chain, *inputs, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, inputs), wanted, strict=True))
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled, inputs), wanted, strict=True))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = chain(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(mixed, inputs), wanted, strict=True))
