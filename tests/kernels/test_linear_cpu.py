"""Linear layers with their sums inside: the fused functions, run on the CPU, against plain layers; what they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gecko_lab.kernels import linear
from gecko_lab.kernels.gates import cuda as gates  # noqa: F401 (defines the operators)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(linear, "_plain", lambda x: False)


def layers(*sizes: tuple[int, int, bool]) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(k, n, bias=bias) for k, n, bias in sizes]


def gradients(call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], modules: list[nn.Linear]) -> list[Tensor]:
    leaves = [*inputs, *(p for layer in modules for p in layer.parameters())]
    out = call(*inputs)
    random = torch.Generator().manual_seed(1)
    found = torch.autograd.grad(out, leaves, [torch.randn(y.shape, generator=random).to(y) for y in out])
    return [*out, *found]


def same(fused: list[Tensor], plain: list[Tensor]) -> None:
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_of_one_input() -> None:
    three = layers((6, 5, True), (6, 3, False), (6, 7, True))
    x = [torch.randn(2, 4, 6, requires_grad=True)]
    same(
        gradients(lambda x: linear.linears(x, *three), x, three),
        gradients(lambda x: tuple(layer(x) for layer in three), x, three),
    )


def test_an_unused_layer_and_a_frozen_one_get_no_gradient() -> None:
    one, two = layers((6, 5, True), (6, 3, True))
    one.weight.requires_grad_(False)
    x = torch.randn(2, 4, 6, requires_grad=True)
    a, _ = linear.linears(x, one, two)
    a.sum().backward()
    assert one.weight.grad is two.weight.grad is None
    torch.testing.assert_close(one.bias.grad, torch.full((5,), 8.0))
    torch.testing.assert_close(x.grad, one.weight.sum(0).expand_as(x))


def test_a_second_product_is_added_in_place() -> None:
    first, second = layers((6, 5, True), (3, 5, False))
    x, u = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    same(
        gradients(lambda x, u: (linear.add_linear(linear.linears(x, first)[0], u, second),), [x, u], [first, second]),
        gradients(lambda x, u: (first(x) + second(u),), [x, u], [first, second]),
    )
    with torch.no_grad():
        h = first(x)
        assert linear.add_linear(h, u, second).data_ptr() == h.data_ptr()


@pytest.mark.parametrize("readers", [(0,), (1,), (0, 1)], ids=str)
def test_silu_for_two_readers(readers: tuple[int, ...]) -> None:
    one = layers((6, 5, True))
    x = [torch.randn(2, 4, 6, requires_grad=True)]
    same(
        gradients(lambda x: tuple(linear.silu_linear(x, one[0])[i] for i in readers), x, one),
        gradients(lambda x: (F.silu(one[0](x)),) * len(readers), x, one),
    )


def test_the_gated_feed_forward_keeps_no_product() -> None:
    fc1, fc3, fc2 = three = layers((6, 16, False), (6, 16, False), (16, 6, False))
    x = [torch.randn(2, 4, 6, requires_grad=True)]

    def plain(x: Tensor) -> tuple[Tensor]:
        return (fc2(F.silu(fc1(x)) * fc3(x)),)

    same(gradients(lambda x: (linear.gated_feed_forward(x, *three),), x, three), gradients(plain, x, three))
    assert kept(lambda: linear.gated_feed_forward(x[0], *three)) == 2  # a and b
    assert kept(lambda: plain(x[0])) > 2


def kept(call: Callable[[], object]) -> int:
    """How many tensors of 2 * 4 * 16 elements are kept for the backward pass."""
    found = set[int]()

    def pack(t: Tensor) -> Tensor:
        if t.numel() == 128:
            found.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return len(found)


def test_products_add_up_in_the_type_of_the_total() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        total = torch.ones(3, 5)
        linear.accumulate(total, a.to(dtype), b.to(dtype))
        torch.testing.assert_close(total, 1 + a @ b, rtol=tolerance, atol=tolerance)


def test_dropout_takes_the_plain_layers() -> None:
    three = layers((6, 16, False), (6, 16, False), (16, 6, False))
    x = torch.randn(64, 6)
    torch.manual_seed(0)
    y = linear.gated_feed_forward(x, *three, dropout=0.5)
    assert not torch.allclose(y, linear.gated_feed_forward(x, *three))
