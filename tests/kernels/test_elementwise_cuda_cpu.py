"""The CUDA gates and views without a GPU: they compile within budget, and their operators obey torch's rules."""

import pytest
import torch
from torch import Tensor

from gecko_lab.kernels.gates import cuda as gates
from gecko_lab.kernels.z_views import cuda as views
from gecko_lab.kernels.z_views.reference import rotate as rotation
from gecko_lab.kernels.z_views.reference import z_views as reference

OPS = torch.ops.gecko_lab


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_gates_compile_without_spills() -> None:
    for module in gates.KERNELS:
        for name, used in module.compile("sm_90a").resources.items():
            assert (used.stack, used.spill_stores) == (0, 0), (module.label, name)
            assert used.registers <= (80 if name == "backward_columns" else 64), (module.label, name)


@pytest.mark.parametrize(("size", "spills"), [(256, 0), (64, 0), (6, 0), (512, 256)])
def test_views_compile_within_their_registers(size: int, spills: int) -> None:
    kernel, rows = views._kernel("forward", torch.bfloat16, torch.float32, size, 4, True)
    assert rows >= 4
    for name, used in kernel.module.compile("sm_90a").resources.items():
        assert used.spill_stores + used.spill_loads <= spills, name
        if size <= 256:
            assert used.registers <= {"forward": 128, "backward": 168, "reduce": 64}[name]


def test_gates_obey_the_rules_of_operators() -> None:
    a, b, far = normal(3, 5), normal(3, 5), normal(3, 5)
    torch.library.opcheck(OPS.silu.default, (a.detach(),))
    torch.library.opcheck(OPS.silu_backward.default, (b.detach(), a.detach()))
    torch.library.opcheck(OPS.swiglu.default, (a.detach(), b.detach(), far.detach()))
    torch.library.opcheck(OPS.swiglu.default, (a.detach(), b.detach(), None))
    torch.library.opcheck(OPS.swiglu_backward.default, (far.detach(), a.detach(), b.detach()))
    torch.library.opcheck(OPS.swiglu_again.default, (far.detach(), a.detach(), b.detach()))
    torch.library.opcheck(OPS.silu_columns.default, (far.detach(), b.detach(), a.detach()))


@pytest.mark.parametrize("rope_heads", [0, 1])
def test_views_obey_the_rules_of_operators(rope_heads: int) -> None:
    z, gamma, beta = normal(2, 3, 12).detach(), normal(3, 12).detach(), normal(3, 12).detach()
    angles = torch.rand(2, 3, 3)
    rope = (angles[0], angles[1]) if rope_heads else (None, None)
    out = [normal(2, 3, 2, 6).detach() for _ in range(3)]
    torch.library.opcheck(OPS.z_views.default, (z, gamma, beta, *rope, 2, rope_heads, 1e-5, 2))
    torch.library.opcheck(OPS.z_views_backward.default, (out, z, gamma, *rope, 2, rope_heads, 1e-5, 2))


def test_gradients_of_the_gates_are_those_of_autograd() -> None:
    a, b, far, dy = normal(7, 3), normal(7, 3), normal(7, 3), torch.randn(7, 3)
    for ours, plain in (
        (lambda: gates.silu(a), lambda: torch.nn.functional.silu(a)),
        (lambda: gates.swiglu(a, b), lambda: torch.nn.functional.silu(a) * b),
        (lambda: gates.gate(a, b), lambda: a * torch.nn.functional.silu(b)),
        (lambda: gates.gate(a, b, far), lambda: a * torch.nn.functional.silu(b) + far),
    ):
        y, expected = ours(), plain()
        torch.testing.assert_close(y, expected)
        got = torch.autograd.grad(y, (a, b, far), dy, allow_unused=True)
        wanted = torch.autograd.grad(expected, (a, b, far), dy, allow_unused=True)
        for g, w in zip(got, wanted, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w)


@pytest.mark.parametrize("rope_heads", [0, 1, 2])
def test_the_rotation_is_its_own_inverse_in_the_gradient(rope_heads: int) -> None:
    x, dy, angles = normal(2, 5, 2, 6), torch.randn(2, 5, 2, 6), torch.rand(5, 3) * 6
    turns = angles.cos(), angles.sin(), rope_heads
    got, wanted = views.rotate(x, *turns, 0.5), rotation(x, *turns, 0.5)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, dy), torch.autograd.grad(wanted, x, dy))
    torch.library.opcheck(OPS.rotate.default, (x.detach(), *turns, -1.0, 0.5))


@pytest.mark.parametrize("rope_heads", [0, 1, 2])
def test_gradients_of_the_views_are_those_of_autograd(rope_heads: int) -> None:
    z, gamma, beta = normal(2, 5, 12), normal(4, 12), normal(4, 12)
    angles = torch.rand(5, 3) * 6
    options = {"heads": 2, "rope_heads": rope_heads}
    got = views.z_views(z, gamma, beta, angles.cos(), angles.sin(), **options)
    wanted = reference(z, gamma, beta, angles.cos(), angles.sin(), **options)
    torch.testing.assert_close(got, tuple(wanted))
    weights = [torch.randn_like(x) for x in got]
    for g, w in zip(
        torch.autograd.grad(got, (z, gamma, beta), weights),
        torch.autograd.grad(wanted, (z, gamma, beta), weights),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


def test_one_compiled_graph_holds_gates_and_views() -> None:
    z, gamma, beta = normal(2, 5, 12), normal(2, 12), normal(2, 12)

    def chain(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        q, k = views.z_views(z, gamma, beta, heads=2)
        return gates.gate(q, k, gates.silu(q)).sum()

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(z, gamma, beta), (z, gamma, beta))
    wanted = torch.autograd.grad(chain(z, gamma, beta), (z, gamma, beta))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_refused_arguments_name_the_reason() -> None:
    x = torch.zeros(2, 3)
    assert gates.unsupported(x, x) is None
    assert "float64" in (gates.unsupported(x.double()) or "")
    assert "shape" in (gates.unsupported(x, x[:1]) or "")
    z, gamma = torch.zeros(1, 3, 12), torch.zeros(4, 12)
    assert views.unsupported(z, gamma, gamma, heads=2) is None
    assert "features" in (views.unsupported(z, gamma, gamma, heads=4) or "")
    assert "views" in (views.unsupported(z, gamma.repeat(2, 1), gamma.repeat(2, 1), heads=2) or "")
    assert "cos" in (views.unsupported(z, gamma, gamma, torch.zeros(2, 3), torch.zeros(2, 3), heads=2) or "")


@pytest.mark.parametrize("groups", [2, 4, 16])
@pytest.mark.parametrize("heads", [1, 3, 4, 7])
def test_every_group_of_lanes_keeps_its_head(heads: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_multiprocessors", lambda device: 5)
    for rows in (heads, 3 * heads, 1000 * heads):
        grid = views._grid("backward", 0, rows, groups, heads)
        assert grid >= 1
        assert grid * groups % heads == 0
