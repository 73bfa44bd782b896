"""The kernels of memory.cu on CUDA tensors, the same in PyTorch elsewhere. N chunks, F folds."""

import torch
from torch import Tensor

from ..runtime import Kernel, Module

LARGEST_HEAD = 1024
NOTHING = -1e30  # logarithm of an empty sum
_ARGUMENTS = {
    "softmax_features": "PPPqqqiiiii",
    "softmax_backward": "PPPPPPPPPqqqiiiiii",
    "time_sums": "PPPqqqiiiii",
    "softmax_keys": "PPPPPPqqqiiiii",
    "shares": "PPPPPiiii",
    "shares_backward": "PPPPPPiiii",
    "row_dot": "PPPPqqiiii",
    "narrow_tables": "PPPii",
}
_MODULE = Module(__file__, "memory.cu", kernels=tuple(_ARGUMENTS))
_THREADS = 256
_SLAB = 128  # rows a block of the softmax over time


def _module(features: int, dtype: torch.dtype) -> Module:
    return _MODULE.specialise(FEATURES=-(-features // 32), EXACT=features % 32 == 0, BF16=dtype == torch.bfloat16)


MODULES = tuple(_module(features, dtype) for features in (32, 256) for dtype in (torch.bfloat16, torch.float32))
_kernels: dict[tuple[str, int, torch.dtype], Kernel] = {}


def _kernel(name: str, features: int, dtype: torch.dtype) -> Kernel:
    key = (name, features, dtype)
    if (made := _kernels.get(key)) is None:
        made = _module(features, dtype).kernel(name, args=_ARGUMENTS[name], block=_THREADS)
        made = _kernels.setdefault(key, made)
    return made


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x (B, L, H, S) with neighbouring features."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _wide(x: Tensor) -> bool:
    """Whether 16-byte loads fit the rows of x (B, L, H, S)."""
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:3])


def softmax_features(x: Tensor, live: Tensor | None) -> Tensor:
    """Softmax over S of x (B, L, H, S), zero where live (B, L) is false."""
    if not x.is_cuda:
        out = torch.softmax(x.float(), -1)
        return (out if live is None else out * live[..., None, None]).to(x.dtype)
    x = _rows(x)
    batch, length, heads, features = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _kernel("softmax_features", features, x.dtype).launch(
        x.get_device(),
        -(-batch * length * heads // 8),
        *(x.data_ptr(), out.data_ptr(), _pointer(live), *x.stride()[:3], batch, length, heads, features),
        _wide(x),
    )
    return out


def softmax_features_backward(x: Tensor, grad: Tensor, live: Tensor | None) -> Tensor:
    """d loss / d x from the gradient of softmax_features, (B, L, H, S) float32."""
    if not x.is_cuda:
        q = torch.softmax(x.float(), -1)
        dx = q * (grad - (q * grad).sum(-1, keepdim=True))
        return (dx if live is None else dx * live[..., None, None]).to(x.dtype)
    return _softmax_backward(x, grad, live, 1)


def softmax_both_backward(
    x: Tensor,
    over_features: Tensor,
    over_time: tuple[Tensor, Tensor],
    lam: Tensor,
    column: Tensor,
    first: Tensor | None,
) -> Tensor:
    """d loss / d x (B, L, H, S) of both softmaxes of a chunk's keys.

    over_features is the gradient of the answers of softmax_keys, over_time two parts of that of its weights, all
    (B, L, H, S) float32; column (B, H, N, S) is dlam less the sum over time of weights times their gradient.
    """
    if not x.is_cuda:
        chunks = lam.shape[2]
        chunk = x.shape[1] // chunks
        used = _used(first, chunks, chunk, x)
        norm, extra = (t.transpose(1, 2).repeat_interleave(chunk, 1) for t in (lam, column))
        dx = torch.exp(x.float() - norm) * (over_time[0] + over_time[1] + extra)
        dx = torch.where(used, dx + softmax_features_backward(x.float(), over_features, None), torch.zeros_like(dx))
        return dx.to(x.dtype)
    return _softmax_backward(x, over_features, None, x.shape[1] // lam.shape[2], over_time, lam, column, first)


def _softmax_backward(
    x: Tensor,
    dq: Tensor,
    live: Tensor | None,
    chunk: int,
    over_time: tuple[Tensor | None, Tensor | None] = (None, None),
    lam: Tensor | None = None,
    column: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    x = _rows(x)
    batch, length, heads, features = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pointers = map(_pointer, (x, dq, *over_time, lam, column, dx, live, first))
    _kernel("softmax_backward", features, x.dtype).launch(
        x.get_device(),
        -(-batch * length * heads // 8),
        *(*pointers, *x.stride()[:3], batch, length, heads, features, chunk, _wide(x)),
    )
    return dx


def softmax_keys(
    x: Tensor, chunks: int, first: Tensor | None, lam: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both softmaxes of x (B, L, H, S), of its dtype, and lam: weights, answers, lam.

    weights = exp(x - lam) over the rows of each of N chunks, zero before first (B, N), with lam (B, H, N, S) their
    logsumexp in float32, computed where it is not given; answers is the softmax over S.
    """
    batch, length, heads, features = x.shape
    chunk = length // chunks
    if not x.is_cuda:
        keys = x.float().masked_fill(~_used(first, chunks, chunk, x), NOTHING).unflatten(1, (chunks, chunk))
        lam = keys.logsumexp(2).transpose(1, 2).contiguous() if lam is None else lam
        weights = torch.exp(keys - lam.transpose(1, 2)[:, :, None]).flatten(1, 2)
        return weights.to(x.dtype), torch.softmax(x.float(), -1).to(x.dtype), lam
    x = _rows(x)
    # heads apart: a product over (B, H, N) is then one call
    shape = (batch, heads, length, features)
    weights, answers = (torch.empty(shape, dtype=x.dtype, device=x.device).transpose(1, 2) for _ in range(2))
    grid = (-(-chunk // _SLAB), chunks * heads, batch)
    layout = (*x.stride()[:3], chunks, heads, features, chunk, _wide(x))
    partial = None
    if lam is None:
        lam = torch.empty((batch, heads, chunks, features), dtype=torch.float32, device=x.device)
        partial = torch.empty((*lam.shape[:3], grid[0], 2, -(-features // 32) * 32), device=x.device)
        _kernel("time_sums", features, x.dtype).launch(
            x.get_device(), grid, x.data_ptr(), partial.data_ptr(), _pointer(first), *layout
        )
    pointers = map(_pointer, (x, partial, lam, weights, answers, first))
    _kernel("softmax_keys", features, x.dtype).launch(x.get_device(), grid, *pointers, *layout)
    return weights, answers, lam


def _used(first: Tensor | None, chunks: int, chunk: int, x: Tensor) -> Tensor:
    """(B or 1, L, 1, 1): the rows that count in their chunk."""
    steps = torch.arange(chunk, device=x.device)
    used = torch.ones((1, chunks, chunk), dtype=torch.bool, device=x.device)
    if first is not None:
        used = steps >= first[..., None]
    return used.flatten(1)[..., None, None]


def shares(lam: Tensor, keep: Tensor, logz: Tensor) -> tuple[Tensor, Tensor]:
    """rho (B, H, F, S), the share of each chunk in the normaliser as it stands after it, and the last normaliser.

    lam (B, H, F, S), keep (B, F) float32 (0: cleared before the chunk), logz (B, H, S).
    """
    batch, heads, folds, features = lam.shape
    if not lam.is_cuda:
        parts = []
        for f in range(folds):
            before = torch.where(keep[:, f, None, None] == 0, NOTHING, logz)
            logz = torch.logaddexp(lam[:, :, f], before)
            parts.append(torch.exp(lam[:, :, f] - logz))
        return torch.stack(parts, 2) if parts else torch.empty_like(lam), logz.clone()
    rho, last = torch.empty_like(lam), torch.empty_like(logz)
    _kernel("shares", features, torch.float32).launch(
        lam.get_device(),
        -(-logz.numel() // _THREADS),
        *map(_pointer, (lam, keep, logz, rho, last)),
        *(batch * heads, folds, features, heads),
    )
    return rho, last


def shares_backward(turn: Tensor, dlast: Tensor | None, rho: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """dlam (B, H, F, S) and dlogz (B, H, S) from turn = rho * d loss / d rho."""
    batch, heads, folds, features = rho.shape
    if not rho.is_cuda:
        g = rho.new_zeros((batch, heads, features)) if dlast is None else dlast
        parts = []
        for f in reversed(range(folds)):
            r, d = rho[:, :, f], turn[:, :, f]
            parts.append(d + (g - d) * r)
            g = (g - d) * (1 - r) * keep[:, f, None, None]
        return torch.stack(parts[::-1], 2) if parts else torch.empty_like(rho), g
    dlam = torch.empty_like(rho)
    dlogz = torch.empty((batch, heads, features), dtype=rho.dtype, device=rho.device)
    _kernel("shares_backward", features, torch.float32).launch(
        rho.get_device(),
        -(-dlogz.numel() // _THREADS),
        *map(_pointer, (turn, dlast, rho, keep, dlam, dlogz)),
        *(batch * heads, folds, features, heads),
    )
    return dlam, dlogz


def narrow_tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., S, E) contiguous float32 in bfloat16: as it is, and less its mean over S."""
    if not x.is_cuda or x.shape[-1] % 2 or x.shape[-2] > 256:
        return x.to(torch.bfloat16), (x - x.mean(-2, keepdim=True)).to(torch.bfloat16)
    plain, centred = (torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for _ in range(2))
    rows, width = x.shape[-2:]
    _kernel("narrow_tables", 32, torch.float32).launch(
        x.get_device(),
        (-(-width // 64), x.shape[:-2].numel()),
        *(x.data_ptr(), plain.data_ptr(), centred.data_ptr(), rows, width),
    )
    return plain, centred


def row_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over the last dimension of a * b (B, H, N, R, columns), and a in dtype, whose rounded values it sums.

    Both float32, dense but for gaps between the heads.
    """
    if not a.is_cuda or a.numel() == 0:
        narrow = a.to(dtype)
        return (narrow.float() * b).sum(-1), narrow
    out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    a, b = (x if dense_heads(x) else x.contiguous() for x in (a, b))
    narrow = a if dtype == a.dtype else torch.empty(a.shape, dtype=dtype, device=a.device)
    inner, columns = a.shape[2] * a.shape[3], a.shape[4]
    _kernel("row_dot", 32, torch.float32).launch(
        a.get_device(),
        -(-out.numel() // 8),
        *(a.data_ptr(), b.data_ptr(), out.data_ptr(), 0 if narrow is a else narrow.data_ptr()),
        *(a.stride(1), b.stride(1), out.numel(), inner, columns),
        all(x.data_ptr() % 16 == 0 and x.stride(1) % 4 == 0 for x in (a, b)) and columns % 4 == 0,
    )
    return out, narrow


def dense_heads(x: Tensor) -> bool:
    """Whether (B, H) are one dimension of x (B, H, N, R, C) and the others lie dense, as in a slice over chunks."""
    _, heads, _, rows, columns = x.shape
    b, h, n, r, c = x.stride()
    return (c, r, n) == (1, columns, rows * columns) and (x.shape[0] == 1 or b == heads * h)
