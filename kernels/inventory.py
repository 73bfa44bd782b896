"""Every kernel module of the package, and small examples of every operation for the self check.

A folder `kernels/OP/` declares what it compiles in `cuda.py`, as `KERNELS` (a sequence of Module) or `modules()`
(returning one). It may add `SPILL_BUDGET`, in bytes, and `examples()`, yielding (label, args, kwargs) of float32 CPU
tensors; the label is the operation's name, a colon and the case. See docs/kernels.md.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .runtime import Module

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")


class Entry(NamedTuple):
    """A module, the folder that declares it, and the most bytes that a kernel of it may spill on any architecture."""

    folder: str
    module: Module
    spill_budget: int = 0


@dataclass(frozen=True)
class Example:
    """One call of an operation, with float32 tensors on the CPU."""

    op: str
    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def folders() -> dict[str, ModuleType]:
    """{folder: its cuda.py, imported}, of every operation that has one."""
    here = Path(__file__).parent
    found = sorted(path.parent.name for path in here.glob("*/cuda.py"))
    return {name: importlib.import_module(f"{__package__}.{name}.cuda") for name in found}


def entries() -> list[Entry]:
    """Every module that the folders declare. Raises ValueError where one declares nothing."""
    found = []
    for folder, declared in folders().items():
        if hasattr(declared, "modules"):
            modules = declared.modules()
        elif hasattr(declared, "KERNELS"):
            modules = declared.KERNELS
        else:
            raise ValueError(f"kernels/{folder}/cuda.py declares no kernels: it needs KERNELS or modules()")
        budget = getattr(declared, "SPILL_BUDGET", 0)
        found += [Entry(folder, module, budget) for module in modules]
    return found


def examples() -> list[Example]:
    """The calls that `python -m gecko_lab.kernels check` compares: those below, then those of the folders."""
    found = [Example(op, label, args, kwargs) for op, label, args, kwargs in _examples()]
    for folder, declared in folders().items():
        for label, args, kwargs in getattr(declared, "examples", list)():
            op, _, case = label.partition(":")
            found.append(Example(op if case else folder, case.strip() or label, tuple(args), dict(kwargs)))
    return found


def _examples() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=random)

    batch, length, width = 2, 67, 256
    bos = torch.zeros(batch, length, dtype=torch.bool)
    bos[0, [0, 5, 6, length - 1]] = True
    segments = bos.cumsum(1)

    weights = normal(width, scale=0.1), normal(width, scale=0.1)
    norm = {"groups": 4, "eps": 1e-5}
    decay = {**norm, "beta1": 0.999, "beta2": 0.9999}
    for op, options in (("timestep_decay_norm", decay), ("timestep_norm", norm)):
        yield op, "one document", (normal(batch, length, width), *weights), options
        yield op, "documents", (normal(batch, length, width), *weights), {**options, "bos": bos}
        _, state = getattr(ops, op)(normal(batch, 9, width), *weights, **options)
        yield op, "carried state", (normal(batch, 1, width), *weights), {**options, "state": state}

    radius = torch.rand(width, 16, generator=random) * 0.5 + 0.45
    angle = torch.rand(width, 16, generator=random) * math.pi
    p = torch.rand(width, 16, generator=random)
    q = torch.polar(radius, angle)
    gamma = torch.complex(normal(width, 16, scale=0.2), normal(width, 16, scale=0.2))
    x = normal(batch, length, width)
    yield "complex_ema", "one document", (x, p, q, gamma), {}
    yield "complex_ema", "documents", (x, p, q, gamma), {"bos": bos}
    yield "complex_ema", "real", (x, p, radius, gamma.real.contiguous()), {"bos": bos}
    _, state = ops.complex_ema(x[:, :9], p, q, gamma)
    yield "complex_ema", "carried state", (x, p, q, gamma), {"bos": bos, "state": state}
    yield "complex_ema", "one token", (x[:, :1], p, q, gamma), {"state": state}

    heads, features, values, chunk = 2, 64, 128, 16
    keys = [normal(batch, length, heads, features) / features**0.25 for _ in range(2)]
    v = normal(batch, length, heads, values)
    yield "sliding_chunk_attention", "one document", (*keys, v), {"chunk": chunk}
    yield "sliding_chunk_attention", "documents", (*keys, v), {"chunk": chunk, "segments": segments}
    yield "adaptive_working_memory", "one document", (*keys, v), {"chunk": chunk}
    yield "adaptive_working_memory", "documents", (*keys, v), {"chunk": chunk, "segments": segments}

    yield "rms_norm", "weighted", (x, weights[0]), {"eps": 1e-5}
    yield "rms_norm", "grouped", (x, weights[0]), {"eps": 1e-5, "groups": 4}
    yield "layer_norm", "weighted", (x, *weights), {"eps": 1e-5}
    yield "layer_norm", "grouped", (x, *weights), {"eps": 1e-5, "groups": 4}

    other, third = normal(batch, length, width), normal(batch, length, width)
    yield "silu", "plain", (x,), {}
    yield "swiglu", "plain", (x, other), {}
    yield "gate", "near and far", (x, other, third), {}
    scales, shifts = normal(4, width, scale=0.1), normal(4, width, scale=0.1)
    turns = torch.arange(length)[:, None] * torch.rand(features // 2, generator=random)
    rotation = {"cos": turns.cos(), "sin": turns.sin()}
    yield "z_views", "rotated", (x, scales, shifts), {**rotation, "heads": 4, "rope_heads": 4}
    yield "z_views", "plain", (x, scales, shifts), {"heads": 4}
