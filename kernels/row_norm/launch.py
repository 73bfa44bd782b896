"""How the row norms (spec section 2) are cut into blocks, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..runtime import Kernel, Module
from ..timestep_decay_norm.launch import address, aligned
from ..timestep_decay_norm.plan import TYPES, access, power_of_two

MODULE = Module(__file__, "norm.cu", kernels=("forward", "backward", "parameters"))
MOST_THREADS = 1024
VECTORS_A_THREAD = 2


@dataclass(frozen=True)
class Plan:
    """One specialisation; a block holds `block_rows` rows of some groups at a time."""

    features: int
    dtype: torch.dtype
    parameters: torch.dtype
    centered: bool
    groups: int

    @cached_property
    def defines(self) -> dict[str, int | str]:
        vector = access(self.features, self.dtype)
        count = self.features // vector
        if count <= 64:
            lanes, threads = min(32, power_of_two(count)), 256
            wanted = max(1, 1024 // (self.features * self.dtype.itemsize))
            groups = min(power_of_two(wanted), power_of_two(self.groups), threads // lanes)
        else:
            lanes = threads = min(MOST_THREADS, power_of_two(-(-count // 2)))
            groups = 1
        vectors = -(-count // lanes)
        return {
            "CENTERED": int(self.centered),
            "INPUT": TYPES[self.dtype],
            "PARAMETER": TYPES[self.parameters],
            "FEATURES": self.features,
            "VECTOR": vector,
            "LANES": lanes,
            "VECTORS": vectors,
            "GROUPS": groups,
            "FORWARD_ROWS": max(1, (6 if self.centered else 8) // vectors),
            "BACKWARD_ROWS": max(1, 2 // vectors),
            "THREADS": threads,
            "FORWARD_BLOCKS": max(1, 512 // threads),
            "BACKWARD_BLOCKS": max(1, 512 // threads),
        }

    @cached_property
    def strips(self) -> int:
        return -(-self.groups // int(self.defines["GROUPS"]))

    def chunks(self, rows: int, direction: str, device: torch.device) -> int:
        """Blocks down the rows, at most one a step of work: forward several rounds of what the device holds, which
        balances them; backward one round, since every block leaves its sums for the parameters."""
        d = {key: int(value) for key, value in self.defines.items() if key not in ("INPUT", "PARAMETER")}
        step = d["THREADS"] // (d["LANES"] * d["GROUPS"]) * d[f"{direction}_ROWS"]
        rounds = 4 if direction == "FORWARD" else 1
        resident = torch.cuda.get_device_properties(device).multi_processor_count * d[f"{direction}_BLOCKS"]
        return max(1, min(-(-rows // step), rounds * resident // self.strips))

    @cached_property
    def module(self) -> Module:
        return MODULE.specialise(**self.defines)

    @cached_property
    def forward(self) -> Kernel:
        return self.module.kernel("forward", args="PPPPPqif", block=int(self.defines["THREADS"]))

    @cached_property
    def backward(self) -> Kernel:
        return self.module.kernel("backward", args="PPPPPPqi", block=int(self.defines["THREADS"]))

    @cached_property
    def parameter_sums(self) -> Kernel:
        return self.module.kernel("parameters", args="PPPii", block=(32, 32))


@lru_cache(maxsize=64)
def plan(features: int, dtype: torch.dtype, parameters: torch.dtype, centered: bool, groups: int) -> Plan:
    """The plan of a shape; equal shapes share one, and plans of equal defines share their module."""
    return Plan(features, dtype, parameters, centered, groups)


def run_forward(
    p: Plan, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """y and, for the backward, saved (1 or 2, rows, G): the scale and, when centered, the mean."""
    x = aligned(x)
    weight, bias = (None if t is None else aligned(t) for t in (weight, bias))
    rows = x.numel() // x.shape[-1]
    y = torch.empty_like(x)
    saved = torch.empty((1 + p.centered, rows, p.groups) if save else (0,), dtype=torch.float32, device=x.device)
    p.forward.launch(
        x.get_device(),
        p.strips * p.chunks(rows, "FORWARD", x.device),
        *map(address, (x, weight, bias, y, saved)),
        rows,
        p.groups,
        eps,
    )
    return y, saved


def run_backward(
    p: Plan, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for a parameter that is not there."""
    x, dy = aligned(x), aligned(dy)
    weight = None if weight is None else aligned(weight)
    dim = x.shape[-1]
    rows = x.numel() // dim
    dx = torch.empty_like(x)
    like = weight if weight is not None else bias
    chunks = p.chunks(rows, "BACKWARD", x.device)
    partial = None
    if like is not None:
        partial = torch.empty(chunks, 1 + p.centered, dim, dtype=torch.float32, device=x.device)
    tensors = (x, dy, weight, saved, dx, partial)
    p.backward.launch(x.get_device(), p.strips * chunks, *map(address, tensors), rows, p.groups)
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    if like is not None:
        # The kernel sums whatever the rows left: a gradient that nobody asked for goes to a tensor that is dropped.
        first = dweight if weight is not None else torch.empty_like(like)
        second = None if not p.centered else dbias if bias is not None else torch.empty_like(like)
        grid = -(-(1 + p.centered) * dim // 32)
        p.parameter_sums.launch(x.get_device(), grid, *map(address, (partial, first, second)), chunks, dim)
    return dx, dweight, dbias
