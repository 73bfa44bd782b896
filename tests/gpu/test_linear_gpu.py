"""Fused linear layers and the loss head on the GPU against plain layers in float64, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gecko_lab.kernels import backend, linear, ops
from gecko_lab.loss import token_losses

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def close(got: Tensor, exact: Tensor, sums: int = 1) -> None:
    """float32 to 1e-5 relative l2; bfloat16 to so many roundings of the exact value."""
    error = (got.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    limit = 1e-5 if got.dtype == torch.float32 else 0.004 * sums
    assert error <= limit, float(error)


def layer(k: int, n: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, device="cuda", dtype=dtype)


def forward(fused: bool, x: Tensor, layers: list[nn.Linear]) -> Tensor:
    wz, wr, wh1, wh2, fc1, fc3, fc2 = layers
    if fused:
        z, r, h = linear.linears(x, wz, wr, wh1)
        y = linear.add_linear(h, torch.tanh(r), wh2)
        return linear.gated_feed_forward(y, fc1, fc3, fc2) + F.pad(z, (0, y.shape[-1] - z.shape[-1]))
    z, r, h = wz(x), wr(x), wh1(x)
    y = h + wh2(torch.tanh(r))
    return fc2(F.silu(fc1(y)) * fc3(y)) + F.pad(z, (0, y.shape[-1] - z.shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1, 1), (2, 67), (3, 128)])
def test_fused_layers_follow_plain_ones(rows: tuple[int, int], dtype: torch.dtype) -> None:
    sizes = ((64, 24, True), (64, 104, True), (64, 64, True), (104, 64, False), (64, 136, False), (64, 136, False),
             (136, 64, False))  # fmt: skip
    layers = [layer(*size, dtype) for size in sizes]
    wide = [nn.Linear(k, n, bias=bias, device="cuda", dtype=torch.float64) for k, n, bias in sizes]
    for a, b in zip(layers, wide):
        b.load_state_dict(a.state_dict())
    x = torch.randn(*rows, 64, device="cuda").to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dy = torch.randn(*rows, 64, device="cuda").to(dtype)
    with backend.use("strict"):
        y = forward(True, x, layers)
        got = torch.autograd.grad(y, [x, *(p for m in layers for p in m.parameters())], dy)
    wanted_y = forward(False, exact, wide)
    wanted = torch.autograd.grad(wanted_y, [exact, *(p for m in wide for p in m.parameters())], dy.double())
    for a, b in zip((y, *got), (wanted_y, *wanted), strict=True):
        close(a, b, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (67, 13), (1000, 64), (4099, 520)])
@pytest.mark.parametrize("readers", [(1,), (0, 1)], ids=str)
def test_silu_for_two_readers(readers: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype) -> None:
    one = layer(16, columns, True, dtype)
    wide = nn.Linear(16, columns, device="cuda", dtype=torch.float64)
    wide.load_state_dict(one.state_dict())
    x = torch.randn(1, rows, 16, device="cuda").to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dys = [torch.randn(1, rows, columns, device="cuda").to(dtype) for _ in readers]
    with backend.use("strict"):
        ys = [linear.silu_linear(x, one)[i] for i in readers[:1]] if len(readers) == 1 else linear.silu_linear(x, one)
        got = torch.autograd.grad(ys, [x, *one.parameters()], dys)
    y = F.silu(wide(exact))
    wanted = torch.autograd.grad(y, [exact, *wide.parameters()], sum(dy.double() for dy in dys))
    for a, b in zip((ys[0], *got), (y, *wanted), strict=True):
        close(a, b, 3)


def test_under_autocast_weights_stay_float32_and_products_are_bf16() -> None:
    three = [layer(64, 136, False, torch.float32) for _ in range(2)] + [layer(136, 64, False, torch.float32)]
    x = torch.randn(2, 67, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = linear.gated_feed_forward(x, *three)
        (a, b) = linear.linears(x, *three[:2])
    assert {y.dtype, a.dtype, b.dtype} == {torch.bfloat16}
    gradients = torch.autograd.grad((y.sum() + a.sum() + b.sum()), [x, *(m.weight for m in three)])
    assert {g.dtype for g in gradients} == {torch.float32}
    with torch.autocast("cuda", torch.bfloat16), backend.use("reference"):
        plain = linear.gated_feed_forward(x, *three)
    close(y, plain.double(), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 257, 4096, 32000, 50257])
def test_cross_entropy_of_rows(columns: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(37, columns, device="cuda")).to(dtype)
    targets = torch.randint(columns, (37,), device="cuda")
    dlosses = torch.randn(37, device="cuda")
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    (dexact,) = torch.autograd.grad(wanted, exact, dlosses.double())
    with backend.use("strict"):
        losses, lse = ops.cross_entropy(logits, targets)
        gradient = ops.cross_entropy_gradient(logits.clone(), targets, lse, dlosses)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-5)
    if columns > 1:
        close(gradient, dexact)


def test_cross_entropy_shows_what_is_not_finite_or_not_a_token() -> None:
    logits = torch.randn(4, 64, device="cuda")
    logits[1, 3], logits[2, 5] = float("nan"), float("inf")
    losses, _ = ops.cross_entropy(logits, torch.tensor([0, 0, 0, 64], device="cuda"))
    assert losses.isfinite().tolist() == [True, False, False, False]
    logits[0] = -1e30  # far below the others, and all alike
    assert float(ops.cross_entropy(logits[:1], torch.zeros(1, dtype=torch.int64, device="cuda"))[0]) == pytest.approx(
        4.158883, rel=1e-5
    )


@pytest.mark.parametrize("chunk", [0, 64, 100])
def test_the_loss_head_in_bf16(chunk: int) -> None:
    x = torch.randn(2, 160, 64, device="cuda").bfloat16().requires_grad_()
    w = (0.3 * torch.randn(1000, 64, device="cuda")).bfloat16().requires_grad_()
    y = torch.randint(1000, (2, 160), device="cuda")
    scale = torch.rand(2, 160, device="cuda")
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    plain = F.cross_entropy((wide[0] @ wide[1].T).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    wanted = torch.autograd.grad((plain * scale).sum(), wide)
    with backend.use("strict"):
        losses = token_losses(x, w, y, chunk)
        got = torch.autograd.grad((losses * scale).sum(), [x, w], retain_graph=True)
        again = torch.autograd.grad((losses * scale).sum(), [x, w])
    torch.testing.assert_close(losses.double(), plain, rtol=0.01, atol=0.02)
    for a, b, c in zip(got, wanted, again):
        close(a, b, 3)
        close(c, b, 3)
