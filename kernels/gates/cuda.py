"""The silu gates as CUDA kernels: one pass over memory forward, one backward, float32 arithmetic (spec 6.1, 6.2)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime import Module
from . import reference

MODULE = Module(
    __file__,
    "gates.cu",
    kernels=(
        "forward<false, false>",
        "forward<true, false>",
        "forward<true, true>",
        "backward<false, false>",
        "backward<true, false>",
        "backward<true, true>",
        "backward_columns",
    ),
    defines={"ELEMENT": "bf16", "WIDTH": 8},
)
THREADS, UNROLL = 256, 2
_TYPES = {torch.bfloat16: ("bf16", 8), torch.float32: ("float", 4)}
_VARIANTS = {
    (dtype, width): MODULE.specialise(ELEMENT=name, WIDTH=width)
    for dtype, (name, widest) in _TYPES.items()
    for width in (1, widest)
}
KERNELS = tuple(_VARIANTS.values())
_FORWARD = {
    (*key, b, far): module.kernel(f"forward<{str(b).lower()}, {str(far).lower()}>", args="PPPPIIqq", block=THREADS)
    for key, module in _VARIANTS.items()
    for b, far in ((False, False), (True, False), (True, True))
}
_BACKWARD = {
    (*key, b, again): module.kernel(f"backward<{b}, {again}>".lower(), args="PPPPPIIqq", block=THREADS)
    for key, module in _VARIANTS.items()
    for b, again in ((False, False), (True, False), (True, True))
}
_COLUMNS = {key: module.kernel("backward_columns", args="PPPPPII", block=128) for key, module in _VARIANTS.items()}
SLICE = 64  # rows of a slice, at least


def unsupported(a: Tensor, b: Tensor | None = None, far: Tensor | None = None) -> str | None:
    """Why these operands, of silu(x), swiglu(a, b) or gate(near, r, far), cannot take the kernel; None: they can."""
    if a.dtype not in _TYPES:
        return f"dtype {a.dtype}: bfloat16 and float32 are supported"
    for other in (b, far):
        if other is not None and (other.dtype != a.dtype or other.shape != a.shape or other.device != a.device):
            return "operands differ in dtype, shape or device"
    if a.numel() >= 2**32:
        return f"{a.numel()} elements: fewer than 2**32 are supported"
    return None


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), any shape."""
    return _Silu.apply(x)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b. a and b may be the halves of one projection: rows of any stride are read in place."""
    return _Swiglu.apply(a, b, None)


def gate(near: Tensor, r: Tensor, far: Tensor | None = None) -> Tensor:
    """near * silu(r) + far."""
    return _Swiglu.apply(r, near, far)


def examples() -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Tensor]]]:
    """Calls for `python -m gecko_lab.kernels check`."""
    random = torch.Generator().manual_seed(3)
    near, r, far = torch.randn(3, 2, 67, 128, generator=random)
    yield "silu: odd size", (r[:, :, :77].contiguous(),), {}
    yield "swiglu: wide", (near, r), {}
    yield "gate: with far", (near, r, far), {}


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return torch.ops.gecko_lab.silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return torch.ops.gecko_lab.silu_backward(dy, x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, far):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        ctx.has_far = far is not None
        return torch.ops.gecko_lab.swiglu(a, b, far)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        da, db = torch.ops.gecko_lab.swiglu_backward(dy, a, b)
        return da, db, dy if ctx.has_far else None


def _row_stride(x: Tensor) -> int | None:
    """The distance between rows of the last dimension when it is the same for all of them, else None."""
    if x.dim() < 2 or x.stride(-1) != 1:
        return None
    for i in range(x.dim() - 2):
        if x.stride(i) != x.stride(i + 1) * x.size(i + 1):
            return None
    return x.stride(-2)


class _Layout:
    """How the operands are cut into accesses. `rows` may be strided and `flat` are made contiguous."""

    def __init__(self, rows: list[Tensor], flat: list[Tensor]) -> None:
        self.flat = [x.contiguous() for x in flat]
        columns = rows[0].numel()
        if not all(x.is_contiguous() for x in rows):
            columns = rows[0].shape[-1]
            rows = [x if _row_stride(x) is not None else x.contiguous() for x in rows]
        self.rows = rows
        strides = [_row_stride(x) or columns for x in rows]
        width = _TYPES[rows[0].dtype][1]
        aligned = all(x.data_ptr() % 16 == 0 for x in (*self.rows, *self.flat))
        if not aligned or any(size % width for size in (columns, *strides)):
            width = 1
        self.width, count = width, rows[0].numel() // width
        self.grid = -(-count // (THREADS * UNROLL))
        self.sizes = (count, columns // width, strides[0], strides[-1])


def _forward_cuda(a: Tensor, b: Tensor | None, far: Tensor | None) -> Tensor:
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if y.numel():
        layout = _Layout([x for x in (a, b) if x is not None], [x for x in (far,) if x is not None])
        kernel = _FORWARD[a.dtype, layout.width, b is not None, far is not None]
        kernel.launch(
            a.get_device(),
            layout.grid,
            y.data_ptr(),
            layout.rows[0].data_ptr(),
            layout.rows[1].data_ptr() if b is not None else 0,
            layout.flat[0].data_ptr() if far is not None else 0,
            *layout.sizes,
        )
    return y


def _backward_cuda(dy: Tensor, a: Tensor, b: Tensor | None, again: bool = False) -> list[Tensor]:
    grads = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for x in (a, b) if x is not None]
    if a.numel():
        layout = _Layout([x for x in (a, b) if x is not None], [dy])
        _BACKWARD[a.dtype, layout.width, b is not None, again].launch(
            a.get_device(),
            layout.grid,
            grads[0].data_ptr(),
            grads[1].data_ptr() if b is not None else 0,
            layout.flat[0].data_ptr(),
            layout.rows[0].data_ptr(),
            layout.rows[1].data_ptr() if b is not None else 0,
            *layout.sizes,
        )
    return grads


def _silu_columns_cuda(dy: Tensor, dy2: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dy2 = None if dy2 is None else dy2.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    width = _TYPES[x.dtype][1]
    if columns % width or any(t is not None and t.data_ptr() % 16 for t in (dy, dy2, x)):
        width = 1
    blocks = -(-columns // (128 * width))
    most = 16 * torch.cuda.get_device_properties(x.device).multi_processor_count
    slices = max(1, min(-(-rows // SLICE), most // blocks))
    dx, partial = torch.empty_like(x), torch.empty(slices, columns, dtype=torch.float32, device=x.device)
    addresses = (0 if t is None else t.data_ptr() for t in (dx, partial, dy, dy2, x))
    _COLUMNS[x.dtype, width].launch(x.get_device(), (blocks, slices, 1), *addresses, rows, columns)
    return dx, partial.sum(0)


def _silu_columns_cpu(dy: Tensor, dy2: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    both = dy.float() if dy2 is None else dy.float() + dy2.float()
    dx = (both * _slope(x.float())).to(x.dtype).contiguous()
    return dx, dx.float().flatten(0, -2).sum(0)


def _slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s + a * s * (1 - s)


def _silu_cpu(x: Tensor) -> Tensor:
    return reference.silu(x).contiguous()


def _swiglu_cpu(a: Tensor, b: Tensor, far: Tensor | None) -> Tensor:
    return reference.gate(b, a, far).contiguous()


def _silu_backward_cpu(dy: Tensor, x: Tensor) -> Tensor:
    return (dy.float() * _slope(x.float())).to(x.dtype).contiguous()


def _swiglu_backward_cpu(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    da, db = dy.float() * b.float() * _slope(a.float()), dy.float() * F.silu(a.float())
    return da.to(a.dtype).contiguous(), db.to(b.dtype).contiguous()


def _swiglu_backward_cuda(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    da, db = _backward_cuda(dy, a, b)
    return da, db


def _swiglu_again_cpu(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    gradients = _swiglu_backward_cpu(dy, a, b)
    dy.copy_(reference.swiglu(a, b))
    return gradients


def _swiglu_again_cuda(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if not dy.is_contiguous():
        raise ValueError(f"dy has strides {dy.stride()}; it is overwritten and must be contiguous")
    da, db = _backward_cuda(dy, a, b, again=True)
    return da, db


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = torch.library.Library("gecko_lab", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
for _schema, _cuda, _cpu, _fake in (
    ("silu(Tensor x) -> Tensor", lambda x: _forward_cuda(x, None, None), _silu_cpu, _like),
    ("silu_backward(Tensor dy, Tensor x) -> Tensor", lambda dy, x: _backward_cuda(dy, x, None)[0], _silu_backward_cpu,
     lambda dy, x: _like(x)),
    ("swiglu(Tensor a, Tensor b, Tensor? far) -> Tensor", _forward_cuda, _swiglu_cpu, lambda a, b, far: _like(a)),
    ("swiglu_backward(Tensor dy, Tensor a, Tensor b) -> (Tensor, Tensor)", _swiglu_backward_cuda, _swiglu_backward_cpu,
     lambda dy, a, b: (_like(a), _like(b))),
    ("swiglu_again(Tensor(a!) dy, Tensor a, Tensor b) -> (Tensor, Tensor)", _swiglu_again_cuda, _swiglu_again_cpu,
     lambda dy, a, b: (_like(a), _like(b))),
    ("silu_columns(Tensor dy, Tensor? dy2, Tensor x) -> (Tensor, Tensor)", _silu_columns_cuda, _silu_columns_cpu,
     lambda dy, dy2, x: (_like(x), x.new_empty(x.shape[-1], dtype=torch.float32))),
):  # fmt: skip
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema, tags=_TAGS)
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_LIBRARY)
