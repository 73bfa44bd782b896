"""Full, chunk and window attention by flash attention against their masks; rotary positions by their kernel."""

import pytest
import torch
from torch import Tensor

from gecko_lab.components import Documents
from gecko_lab.components.registry import KINDS, Shape
from gecko_lab.kernels import backend, ops
from gecko_lab.kernels.z_views import reference

pytestmark = pytest.mark.gpu
SHAPE = Shape(dim=256, z_dim=256, value_dim=256, num_heads=4, ffn_dim=64, chunk_size=128, ema_modes=2, norm_groups=2)
NAMES = [("full", {}), ("chunk", {}), ("sliding_window", {}), ("sliding_window", {"window": 37})]


def close(got: Tensor, exact: Tensor) -> None:
    error = (got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    assert error <= 0.008, float(error)


def attend(module, inputs: list[Tensor], cuts: list[int], documents: Documents | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    state, found, at = None, [], 0
    for size in cuts:
        piece = None if documents is None else Documents(*(x[:, at : at + size] for x in documents))
        y, state = module.attend(*(x[:, at : at + size] for x in leaves), piece, state)
        found.append(y)
        at += size
    out = torch.cat(found, 1)
    random = torch.Generator(device="cuda").manual_seed(1)
    dy = torch.randn(out.shape, generator=random, device="cuda").to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, dy)]


@pytest.mark.parametrize("packs", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("cuts", [[517], [200, 1, 316]], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (32, 64), (20, 20)], ids=str)
@pytest.mark.parametrize(("name", "options"), NAMES, ids=str)
def test_flash_follows_the_masks(name, options, widths, cuts, packs) -> None:
    cls = KINDS["attention"][name]
    module = cls(cls.Config(**options), SHAPE)
    torch.manual_seed(0)
    shapes = [(3, 517, 4, w) for w in (widths[0], widths[0], widths[1])]
    inputs = [torch.randn(s, device="cuda").bfloat16() for s in shapes]
    inputs[0] /= widths[0] ** 0.5
    documents = None
    if packs:
        bos = torch.rand(3, 517, device="cuda") < 0.02
        bos[0] = False
        bos[1, 60:200] = True  # documents of one token
        documents = Documents.from_bos(bos)
    with backend.use("strict"):
        got = attend(module, inputs, cuts, documents)
    with backend.use("reference"):
        wanted = attend(module, [x.float() for x in inputs], [517], documents)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


def test_what_flash_cannot_serve_is_said_and_is_an_error_under_strict() -> None:
    cls = KINDS["attention"]["sliding_window"]
    module = cls(cls.Config(), SHAPE)
    x = torch.randn(1, 300, 4, 64, device="cuda")
    with backend.use("strict"), pytest.raises(RuntimeError, match="float32"):
        module.attend(x, x, x, None, None)
    module.attend(x, x, x, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "rope_heads", "size"), [(4, 4, 128), (3, 1, 64), (2, 2, 6), (2, 0, 8)])
def test_rotation(heads: int, rope_heads: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 67, heads, size, device="cuda").to(dtype).requires_grad_()
    angle = 6 * torch.rand(67, size // 2, device="cuda")
    dy = torch.randn_like(x)
    with backend.use("strict"):
        y = ops.rotate(x, angle.cos(), angle.sin(), rope_heads, 0.3)
        (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    wanted = reference.rotate(wide, angle.cos().double(), angle.sin().double(), rope_heads, 0.3)
    (dwanted,) = torch.autograd.grad(wanted, wide, dy.double())
    for a, b in ((y, wanted), (dx, dwanted)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
