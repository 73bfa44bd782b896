"""Which step of a block every GPU kernel of a profile belongs to, under names that a person reads, with its floor.

A kernel belongs to the operator that launched it. Operators of ours name their step; a matrix product is told by its
shape; the rest are additions, sums and copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from . import cost
from .clock import Ceilings
from .sizes import Size

# The first name that the operator's contains; costs as (forward, backward).
STEPS: tuple[tuple[str, str, cost.Cost, cost.Cost], ...] = (
    ("sliding_chunk_attention", "sliding chunk attention", cost.attention_bytes, cost.attention_flops),
    ("memory_", "adaptive working memory", cost.attention_bytes, cost.memory_flops),
    ("complex_ema", "complex moving average", cost.norm_bytes, cost.no_flops),
    ("time", "timestep decay norm", cost.norm_bytes, cost.no_flops),
    ("row_norm", "RMS norm and layer norm", cost.two_norm_bytes, cost.no_flops),
    ("z_views", "views of z", cost.view_bytes, cost.no_flops),
    ("swiglu", "gates", cost.gates_bytes, cost.no_flops),
    ("silu", "gates", cost.gates_bytes, cost.no_flops),
)
PRODUCTS = "matrix products"
REST = "additions, sums, copies"
_PRODUCT = re.compile(r"aten::(b?add)?b?mm_?$")


@dataclass
class KernelRow:
    """A line of the profile: kernels of one name in one step; ms of all calls of one pass; None: no floor is known."""

    step: str
    way: str  # forward, backward
    kernel: str
    calls: float
    ms: float
    floor_ms: float | None


def rows(events: Iterable[Any], size: Size, ceilings: Ceilings, passes: int) -> list[KernelRow]:
    """Of the events of a torch profile, with shapes, over so many passes: the longest first."""
    found: dict[tuple[str, str, str], KernelRow] = {}
    for event in events:
        for kernel in getattr(event, "kernels", ()):
            step, way, name, floor = _place(event, kernel.name, size, ceilings)
            row = found.setdefault((step, way, name), KernelRow(step, way, name, 0.0, 0.0, 0.0))
            row.calls += 1 / passes
            row.ms += kernel.duration / 1e3 / passes
            row.floor_ms = None if floor is None or row.floor_ms is None else row.floor_ms + floor / passes
    return sorted(found.values(), key=lambda row: -row.ms)


def step_floor(step: str, way: str, size: Size, ceilings: Ceilings) -> float | None:
    """The floor of a whole step, in ms; None for what is no operation of ours."""
    for _, name, moved, flops in STEPS:
        if name == step:
            at = way == "backward"
            return ceilings.floor_ms(moved(size, 2)[at], flops(size, 2)[at])
    return None


def readable(kernel: str) -> str:
    """A kernel's name without types and arguments."""
    if re.match(r"nvjet|.*gemm|.*cutlass|sm\d+_", kernel):
        return "cuBLAS product"
    if "::" in kernel:
        for word, name in (("reduce_kernel", "sum"), ("add", "addition"), ("copy", "copy"), ("Fill", "fill")):
            if word in kernel:
                return name
        return "elementwise"
    if kernel.startswith(("Memset", "Memcpy")):
        return kernel.split()[0].lower()
    short = re.sub(r"^void ", "", kernel)
    return re.sub(r"[<(].*", "", short)


def _place(event: Any, kernel: str, size: Size, ceilings: Ceilings) -> tuple[str, str, str, float | None]:
    names, at = [], event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    shapes = [tuple(x) for x in event.input_shapes or ()]
    way = "backward" if any("ackward" in name or name.endswith("_again") for name in names) else "forward"
    product = _product(names[0], shapes)
    floor = None
    if kernel.startswith(("Memset", "Memcpy")):  # cuBLAS clears what it counts with; addmm copies what it adds to
        product, floor = None, 0.0
    if product is not None:
        count, m, k, n = product
        floor = ceilings.floor_ms(2 * count * (m * k + k * n + m * n), 2 * count * m * n * k)
    ours = next((name for name in names if name.startswith("gecko_lab::")), None)
    if ours is not None:
        for part, step, *_ in STEPS:
            if part in ours:
                return step, way, readable(kernel), floor
    if product is not None:
        _, m, k, n = product
        return PRODUCTS, *_role(m, k, n, size, any("FeedForward" in name for name in names), way), floor
    if floor is None and shapes:
        sizes = [math.prod(x) for x in shapes]
        moved = sum(sizes) + (0 if readable(kernel) == "sum" else max(sizes))
        floor = ceilings.floor_ms(2 * moved, 0)
    return REST, way, readable(kernel), floor


def _product(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, int, int, int] | None:
    """(batch, m, k, n) of an operator that is a matrix product."""
    if not _PRODUCT.match(name):
        return None
    a, b = shapes[1:3] if "add" in name else shapes[:2]  # what is added to comes first
    return (a[0] if len(a) == 3 else 1), a[-2], a[-1], b[-1]


def _role(m: int, k: int, n: int, size: Size, feed_forward: bool, way: str) -> tuple[str, str]:
    """forward or backward, and what is multiplied, from the shape of the weight."""
    weight = {m, n} if k == size.tokens else {k, n}
    if feed_forward:
        name = "feed-forward"
    else:
        names = {
            frozenset((size.dim, size.value_dim)): "v, r, output: D x E",
            frozenset((size.dim, size.z_dim)): "z: D x Z",
            frozenset((size.dim,)): "residual path: D x D",
        }
        name = names.get(frozenset(weight), " x ".join(map(str, sorted(weight))))
    what = "" if way == "forward" else ", of weights" if k == size.tokens else ", of inputs"
    return way, f"{name}{what}"
