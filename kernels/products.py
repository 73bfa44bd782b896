"""Matrix products over three batch dimensions of strided views, in as few cuBLAS calls as their strides allow."""

import torch
from torch import Tensor

# A call smaller than this costs more to launch than to copy its operands together.
_WORTH_A_LAUNCH = 1e9


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out (X, Y, N, R, C) = a (X, Y, N, R, K) @ b (X, Y, N, K, C), or += with `add`; sums in float32.

    `out` may be float32 where a and b are bfloat16 (then without `add`). cuBLAS knows one batch stride: where the
    three dimensions do not merge into one, large products are issued in parts and small operands are copied.
    """
    x, y, *_ = out.shape
    if x == y == 1:
        _batched(out.view(out.shape[2:]), a.view(a.shape[2:]), b.view(b.shape[2:]), add)
        return
    if out.numel() == 0:
        return
    parts = [_merge(t) for t in (out, a, b)]
    if all(part is not None for part in parts):
        _batched(parts[0], parts[1], parts[2], add)  # type: ignore[arg-type]
        return
    size, axis = min((size, axis) for axis, size in enumerate(out.shape[:3]) if size > 1)
    if 2.0 * out.numel() * a.shape[-1] / size >= _WORTH_A_LAUNCH:
        for part in zip(out.split(1, axis), a.split(1, axis), b.split(1, axis)):
            product(*part, add=add)
        return
    target = parts[0]
    made = torch.empty((out.shape[:3].numel(), *out.shape[3:]), dtype=out.dtype, device=out.device)
    left, right = (t.reshape(-1, *t.shape[3:]) if part is None else part for t, part in zip((a, b), parts[1:]))
    if target is not None:
        _batched(target, left, right, add)
        return
    _batched(made, left, right, False)
    if add:
        out.add_(made.view(out.shape))
    else:
        out.copy_(made.view(out.shape))


def _merge(t: Tensor) -> Tensor | None:
    """The view (X * Y * N, R, C) of t (X, Y, N, R, C), or None where the strides allow none."""
    count, step = 1, 0
    for size, stride in zip(reversed(t.shape[:3]), reversed(t.stride()[:3])):
        if size == 1:
            continue
        if count > 1 and stride != step * count:
            return None
        step = stride if count == 1 else step
        count *= size
    return t.as_strided((count, *t.shape[3:]), (step, *t.stride()[3:]))


def _batched(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if add:
        out.baddbmm_(a, b)
    elif out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    elif out.is_cuda:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)
