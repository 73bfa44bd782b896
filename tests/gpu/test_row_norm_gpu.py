"""Row norms on the GPU against the references in float64, and how they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gecko_lab.kernels import ops
from gecko_lab.kernels.backend import use
from gecko_lab.kernels.row_norm import reference

KINDS = ("rms_norm", "layer_norm")
FLOAT32, BFLOAT16 = 1e-5, 5e-3


@pytest.fixture(autouse=True)
def kernels_only() -> Any:
    with use("strict"):
        yield


def poison(device: torch.device) -> None:
    """Fill memory that the allocator will hand out again with NaN."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22)]
    del blocks


def leaves_of(kind: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=random) + 0.5
    parameters = [0.3 * torch.randn(shape[-1], generator=random) for _ in range(1 + (kind == "layer_norm"))]
    return [
        t.to(device, t_dtype).requires_grad_() for t, t_dtype in zip([x, *parameters], [dtype] + [torch.float32] * 2)
    ]


def run(norm: Callable[..., Tensor], leaves: list[Tensor], **options: Any) -> list[Tensor]:
    y = norm(*leaves, **options)
    random = torch.Generator().manual_seed(3)
    weights = (torch.randint(-16, 17, y.shape, generator=random) / 8).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check(kind: str, leaves: list[Tensor], **options: Any) -> None:
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = run(getattr(reference, kind), wide, **options)
    poison(leaves[0].device)
    actual = run(getattr(ops, kind), leaves, **options)
    for name, leaf, got, want in zip(("y", "dx", "dweight", "dbias"), [leaves[0], *leaves], actual, expected):
        assert got.dtype is leaf.dtype
        error = float((got.cpu().double() - want).norm() / want.norm().clamp_min(1e-6))
        assert error <= (BFLOAT16 if leaf.dtype is torch.bfloat16 else FLOAT32), name


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 8), 1),
        ((3, 5, 64), 8),
        ((2, 33, 256), 1),
        ((7, 300), 3),
        ((2, 257, 1024), 4),
        ((2, 3, 2048), 8),
        ((5, 130, 2048), 1),
        ((2, 700, 4096), 1),
        ((2, 65, 4096), 64),
        ((3, 77, 35), 5),
        ((9, 8192), 1),
        ((1, 4, 11008), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(
    cuda: torch.device, kind: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int
) -> None:
    if dtype is torch.float32 and shape[-1] // groups > 8192:
        pytest.skip("more features a group than the kernels take")
    check(kind, leaves_of(kind, cuda, shape, dtype), groups=groups, eps=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(cuda: torch.device, kind: str) -> None:
    check(kind, leaves_of(kind, cuda, (20_001, 256), torch.float32), groups=2, eps=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_parameters_and_with_bf16_ones(cuda: torch.device, kind: str) -> None:
    leaves = leaves_of(kind, cuda, (3, 40, 512), torch.bfloat16)
    check(kind, leaves[:1], groups=2, eps=1e-5)
    check(kind, [leaves[0], *(leaf.detach().bfloat16().requires_grad_() for leaf in leaves[1:])], groups=2, eps=1e-5)
    check(kind, leaves[:2], groups=2, eps=1e-5)


def test_large_mean_keeps_its_digits(cuda: torch.device) -> None:
    x = torch.randn(50, 1024, device=cuda) + 1000
    want = reference.layer_norm(x.double(), eps=1e-5)
    torch.testing.assert_close(ops.layer_norm(x, eps=1e-5).double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay_on_a_side_stream(cuda: torch.device, kind: str) -> None:
    leaves = leaves_of(kind, cuda, (2, 500, 1024), torch.bfloat16)
    norm = getattr(ops, kind)

    def step() -> list[Tensor]:
        return _ones(norm, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    for _ in range(3):
        graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def _ones(norm: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = norm(*leaves, eps=1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize("kind", KINDS)
def test_compile_checkpoint_and_autocast(cuda: torch.device, kind: str) -> None:
    leaves = leaves_of(kind, cuda, (2, 30, 512), torch.bfloat16)
    norm = getattr(ops, kind)
    call = lambda *tensors: norm(*tensors, eps=1e-5).float().square().sum()
    want = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16):
        found = [
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False), leaves),
        ]
    for got in found:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
