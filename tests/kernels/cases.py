"""The operations with a time axis behind one signature, so that one test states a law for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gecko_lab.kernels import ops

D, G, N, H, S, E = 8, 4, 3, 2, 4, 6
BETAS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Operation:
    """``widths``: trailing shape of each input over time; ``weights``: the other inputs;
    ``call(inputs, weights, bos, segments, state)`` -> (y, state)."""

    name: str
    widths: tuple[tuple[int, ...], ...]
    weights: Callable[[torch.dtype], tuple[Tensor, ...]]
    call: Callable[..., tuple[Tensor, Any]]

    def inputs(self, batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        return tuple(draw(batch, length, *w, seed=i).to(dtype) for i, w in enumerate(self.widths))


def norm_weights(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(0.3 * draw(D, seed=7 + i).to(dtype) for i in range(2))


def ema_weights(dtype: torch.dtype) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    phase, radius = draw(D, N, seed=11).to(wide), torch.sigmoid(draw(D, N, seed=12)).to(wide)
    gamma = torch.complex(draw(D, N, seed=13), draw(D, N, seed=14))
    return torch.sigmoid(draw(D, N, seed=10)).to(wide), torch.polar(radius, phase), gamma.to(phase.dtype.to_complex())


def real_ema_weights(dtype: torch.dtype) -> tuple[Tensor, ...]:
    p, q, gamma = ema_weights(dtype)
    return p, q.abs(), gamma.real.contiguous()


def decay(x: Any, w: Any, bos: Any, segments: Any, state: Any) -> Any:
    return ops.timestep_decay_norm(x[0], *w, groups=G, **BETAS, bos=bos, state=state)


def cumulative(x: Any, w: Any, bos: Any, segments: Any, state: Any) -> Any:
    return ops.timestep_norm(x[0], *w, groups=G, eps=1e-5, bos=bos, state=state)


def ema(x: Any, w: Any, bos: Any, segments: Any, state: Any) -> Any:
    return ops.complex_ema(x[0], *w, bos=bos, state=state)


def attention(x: Any, w: Any, bos: Any, segments: Any, state: Any) -> Any:
    return ops.sliding_chunk_attention(*x, chunk=4, segments=segments, state=state)


def memory(lag: int) -> Callable[..., tuple[Tensor, Any]]:
    def call(x: Any, w: Any, bos: Any, segments: Any, state: Any) -> Any:
        return ops.adaptive_working_memory(*x, chunk=4, segments=segments, state=state, lag=lag)

    return call


HEADS = ((H, S), (H, S), (H, E))
OPERATIONS = [
    Operation("timestep_decay_norm", ((D,),), norm_weights, decay),
    Operation("timestep_norm", ((D,),), norm_weights, cumulative),
    Operation("complex_ema", ((D,),), ema_weights, ema),
    Operation("real_ema", ((D,),), real_ema_weights, ema),
    Operation("sliding_chunk_attention", HEADS, lambda _: (), attention),
    Operation("memory_lag2", HEADS, lambda _: (), memory(2)),
    Operation("memory_lag1", HEADS, lambda _: (), memory(1)),
    Operation("memory_lag3", HEADS, lambda _: (), memory(3)),
]


def boundaries(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """bos and segments of random documents; the last row begins with one, and has two in a row."""
    bos = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.12
    bos[-1, 0] = True
    bos[0, -2:] = True
    return bos, bos.to(torch.int64).cumsum(1)
