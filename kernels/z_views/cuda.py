"""The views of z as CUDA kernels: one read of z and R writes forward, R + 1 reads and one write backward (spec 6.1)."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime import Kernel, Module
from . import reference
from . import rotate as turning

MODULE = Module(
    __file__,
    "z_views.cu",
    kernels=("forward", "backward", "reduce"),
    defines={"ELEMENT": "bf16", "PARAMETER": "float", "HEAD": 256, "VIEWS": 4, "WIDTH": 8, "LANES": 32},
)
KERNELS = (MODULE, MODULE.specialise(PARAMETER="bf16"), MODULE.specialise(ELEMENT="float"), *turning.KERNELS)
rotate, unsupported_rotate = turning.rotate, turning.unsupported
THREADS, REDUCE_COLUMNS, REDUCE_SLICES = 128, 32, 16
BLOCKS_PER_SM = {"forward": 4, "backward": 3}  # about what the registers let one multiprocessor hold
_TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
_ARGS = {"forward": "PPPPPPPPPIIIiif", "backward": "PPPPPPPPPPIIIiif", "reduce": "PPPII"}


def unsupported(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    rope_heads: int = 0,
    eps: float = 1e-5,
    rotated: int = 2,
) -> str | None:
    """Why these arguments cannot take the kernel; None: they can."""
    size = z.shape[-1] // heads
    if z.dtype not in _TYPES or gamma.dtype not in _TYPES or gamma.dtype != beta.dtype:
        return f"dtypes {z.dtype}, {gamma.dtype}, {beta.dtype}: bfloat16 or float32 z, and likewise gamma with beta"
    if size % 2 or size > 512:
        return f"{size} features a head: even numbers up to 512 are supported"
    if not 1 <= gamma.shape[0] <= 4:
        return f"{gamma.shape[0]} views: 1 to 4 are supported"
    if z.dim() != 3 or z.numel() // size >= 2**31:
        return f"z {tuple(z.shape)}: (B, L, Z) with fewer than 2**31 heads in all is supported"
    for table in (cos, sin):
        if table is not None and (table.dtype != torch.float32 or table.shape != (z.shape[1], size // 2)):
            return f"cos or sin {tuple(table.shape)} {table.dtype}: float32 ({z.shape[1]}, {size // 2}) is supported"
    if any(x is not None and x.requires_grad for x in (cos, sin)):
        return "cos and sin have no gradient here"
    if any(x is not None and x.device != z.device for x in (gamma, beta, cos, sin)):
        return "operands on different devices"
    return None


def z_views(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    rope_heads: int = 0,
    eps: float = 1e-5,
    rotated: int = 2,
) -> tuple[Tensor, ...]:
    """z (B, L, Z), gamma and beta (R, Z), cos and sin (L, S/2) -> R views (B, L, H, S) of the normalised heads."""
    if cos is None or sin is None or rope_heads == 0:
        cos = sin = None
    views: tuple[Tensor, ...] = _ZViews.apply(z, gamma, beta, cos, sin, heads, rope_heads, eps, rotated)
    return views


class _ZViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gamma, beta, cos, sin, *options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, gamma, cos, sin)
        ctx.options = options
        return tuple(torch.ops.gecko_lab.z_views(z, gamma, beta, cos, sin, *options))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dviews):  # type: ignore[no-untyped-def]
        z, gamma, cos, sin = ctx.saved_tensors
        grads = torch.ops.gecko_lab.z_views_backward(list(dviews), z, gamma, cos, sin, *ctx.options)
        return (*grads, None, None, None, None, None, None)


def examples() -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """Calls for `python -m gecko_lab.kernels check`."""
    random = torch.Generator().manual_seed(2)
    for heads, size in ((2, 256), (3, 64)):
        z = torch.randn(2, 67, heads * size, generator=random)
        yield (
            f"z_views: {heads} x {size}",
            (z, *0.2 * torch.randn(2, 4, heads * size, generator=random)),
            {"heads": heads},
        )
        angles = torch.arange(67)[:, None] * torch.rand(size // 2, generator=random)
        turn = {"cos": angles.cos(), "sin": angles.sin(), "rope_heads": heads - 1, "scale": 0.5}
        yield f"rotate: {heads} x {size}", (z.unflatten(-1, (heads, size)),), turn


@lru_cache(maxsize=256)
def _kernel(
    name: str, dtype: torch.dtype, parameter: torch.dtype, size: int, views: int, aligned: bool
) -> tuple[Kernel, int]:
    """The kernel for these types and sizes, and how many rows a block of it has in hand."""
    width = 8 if size % 8 == 0 and aligned else 2
    lanes = min(32, 1 << (size // width - 1).bit_length())
    types = {"ELEMENT": _TYPES[dtype], "PARAMETER": _TYPES[parameter]}
    module = MODULE.specialise(**types, HEAD=size, VIEWS=views, WIDTH=width, LANES=lanes)
    block = REDUCE_COLUMNS * REDUCE_SLICES if name == "reduce" else THREADS
    return module.kernel(name, args=_ARGS[name], block=block), THREADS // lanes


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grid(name: str, device: int, rows: int, groups: int, heads: int) -> int:
    """Blocks of one wave, no more than there are rows, so many that every group of lanes keeps its head."""
    unit = heads // math.gcd(heads, groups)
    wanted = min(_multiprocessors(device) * BLOCKS_PER_SM[name], -(-rows // groups))
    return -(-wanted // unit) * unit


def _aligned(*tensors: Tensor | None) -> bool:
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _forward_cuda(
    z: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor | None, sin: Tensor | None,
    heads: int, rope_heads: int, eps: float, rotated: int,
) -> list[Tensor]:  # fmt: skip
    z, gamma, beta = z.contiguous(), gamma.contiguous(), beta.contiguous()
    cos, sin = (None if x is None else x.contiguous() for x in (cos, sin))
    batch, length, width = z.shape
    device, size, views = z.get_device(), width // heads, gamma.shape[0]
    out = [z.new_empty(batch, length, heads, size) for _ in range(views)]
    if z.numel():
        kernel, groups = _kernel("forward", z.dtype, gamma.dtype, size, views, _aligned(z, gamma, beta, cos, sin))
        rows = batch * length * heads
        kernel.launch(
            device,
            _grid("forward", device, rows, groups, heads),
            *(x.data_ptr() for x in out),
            *(0,) * (4 - views),
            *map(_pointer, (z, gamma, beta, cos, sin)),
            rows,
            heads,
            length,
            rope_heads,
            rotated,
            eps,
        )
    return out


def _backward_cuda(
    dviews: list[Tensor], z: Tensor, gamma: Tensor, cos: Tensor | None, sin: Tensor | None,
    heads: int, rope_heads: int, eps: float, rotated: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dviews, z, gamma = [x.contiguous() for x in dviews], z.contiguous(), gamma.contiguous()
    cos, sin = (None if x is None else x.contiguous() for x in (cos, sin))
    batch, length, width = z.shape
    device, size, views = z.get_device(), width // heads, gamma.shape[0]
    dz, dgamma, dbeta = torch.empty_like(z), torch.empty_like(gamma), torch.empty_like(gamma)
    if not z.numel():
        return dz, dgamma.zero_(), dbeta.zero_()
    variant = (z.dtype, gamma.dtype, size, views, _aligned(*dviews, z, gamma, cos, sin))
    kernel, groups = _kernel("backward", *variant)
    rows = batch * length * heads
    grid = _grid("backward", device, rows, groups, heads)
    partial = torch.empty(grid * groups, 2 * views, size, dtype=torch.float32, device=z.device)
    kernel.launch(
        device,
        grid,
        dz.data_ptr(),
        partial.data_ptr(),
        *(x.data_ptr() for x in dviews),
        *(0,) * (4 - views),
        *map(_pointer, (z, gamma, cos, sin)),
        rows,
        heads,
        length,
        rope_heads,
        rotated,
        eps,
    )
    reduce, _ = _kernel("reduce", *variant)
    blocks = -(-2 * views * width // REDUCE_COLUMNS)
    reduce.launch(
        device, blocks, dgamma.data_ptr(), dbeta.data_ptr(), partial.data_ptr(), grid * groups // heads, heads
    )
    return dz, dgamma, dbeta


def _forward_cpu(
    z: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor | None, sin: Tensor | None,
    heads: int, rope_heads: int, eps: float, rotated: int,
) -> list[Tensor]:  # fmt: skip
    with torch.no_grad():
        views = reference.z_views(
            z, gamma, beta, cos, sin, heads=heads, rope_heads=rope_heads, eps=eps, rotated=rotated
        )
    return [view.contiguous() for view in views]


def _backward_cpu(
    dviews: list[Tensor], z: Tensor, gamma: Tensor, cos: Tensor | None, sin: Tensor | None,
    heads: int, rope_heads: int, eps: float, rotated: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = z.float().unflatten(-1, (heads, -1))
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x, root = x * r, 1 / math.sqrt(x.shape[-1])
    dx, dgamma, dbeta = torch.zeros_like(x), [], []
    for i, g in enumerate(gamma.float()):
        d = dviews[i].float()
        if cos is not None and sin is not None and i < rotated:
            d = reference.rotate(d, cos, -sin, rope_heads)
        dbeta.append(d.sum((0, 1)).flatten())
        dgamma.append((d * x).sum((0, 1)).flatten() * root)
        dx = dx + d * (1 + g.view(heads, -1)) * root
    dz = r * (dx - x * (dx * x).mean(-1, keepdim=True))
    return dz.flatten(-2).to(z.dtype), torch.stack(dgamma).to(gamma.dtype), torch.stack(dbeta).to(gamma.dtype)


def _forward_fake(z: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int,
                  rope_heads: int, eps: float, rotated: int) -> list[Tensor]:  # fmt: skip
    batch, length, width = z.shape
    return [z.new_empty(batch, length, heads, width // heads) for _ in range(gamma.shape[0])]


def _backward_fake(dviews: list[Tensor], z: Tensor, gamma: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)


_LIBRARY = torch.library.Library("gecko_lab", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_OPTIONS = "Tensor? cos, Tensor? sin, int heads, int rope_heads, float eps, int rotated"
for _schema, _cuda, _cpu, _fake in (
    (f"z_views(Tensor z, Tensor gamma, Tensor beta, {_OPTIONS}) -> Tensor[]",
     _forward_cuda, _forward_cpu, _forward_fake),
    (f"z_views_backward(Tensor[] dviews, Tensor z, Tensor gamma, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
     _backward_cuda, _backward_cpu, _backward_fake),
):  # fmt: skip
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema, tags=_TAGS)
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_LIBRARY)
