"""How the time-step norms are cut into blocks, and their launches: decayed (spec 1.2) and cumulative (spec 1.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..runtime import Kernel, Module

TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
VECTORS_A_LANE = 16  # accesses of 16 bytes, in a step of a group
MODULE = Module(__file__, "norm.cu", kernels=("prepare", "forward", "backward", "parameters"))


@dataclass(frozen=True)
class Rates:
    """Decays of the mean and the variance; None for both: every step weighs the same."""

    beta1: float | None
    beta2: float | None

    @property
    def decayed(self) -> bool:
        return self.beta1 is not None

    @cached_property
    def values(self) -> tuple[float, ...]:
        """beta1, beta2, 1 - beta1, 1 - beta2, ln beta1, ln beta2: formed in double precision, then rounded once."""
        if self.beta1 is None or self.beta2 is None:
            return (0.0,) * 6
        betas = (self.beta1, self.beta2)
        logs = tuple(math.log(beta) if beta > 0 else -1e30 for beta in betas)
        return (*betas, *(1 - beta for beta in betas), *logs)


def access(features: int, dtype: torch.dtype) -> int:
    """Elements of one aligned access: at most 16 bytes, and whole accesses a group."""
    width = 16 // dtype.itemsize
    while features % width:
        width //= 2
    return width


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Plan:
    """One specialisation: a block holds `tile` steps of `block_groups` groups of `features` features."""

    features: int
    dtype: torch.dtype
    parameters: torch.dtype
    decayed: bool
    groups: int

    @cached_property
    def defines(self) -> dict[str, int | str]:
        vector = access(self.features, self.dtype)
        count = self.features // vector
        lanes = min(32, power_of_two(count))
        vectors = -(-count // lanes)
        wide = lanes >= 16
        # Neighbouring groups until a step's part is 256 (512) contiguous bytes; at most two rows a lane pair scans.
        groups = max(1, (512 if wide else 256) // (self.features * self.dtype.itemsize))
        groups = min(power_of_two(groups), power_of_two(self.groups), 32)
        threads = min(256 if wide and vectors <= 8 else 128, max(32, 64 * lanes * groups))
        groups = min(groups, threads // lanes)
        across = threads // (lanes * groups)
        rows = max(1, min(8 // vectors, 64 // across))
        return {
            "DECAYED": int(self.decayed),
            "INPUT": TYPES[self.dtype],
            "PARAMETER": TYPES[self.parameters],
            "FEATURES": self.features,
            "VECTOR": vector,
            "LANES": lanes,
            "VECTORS": vectors,
            "GROUPS": groups,
            "ROWS": rows,
            "THREADS": threads,
        }

    @cached_property
    def tile(self) -> int:
        """Steps a block."""
        d = self.defines
        return int(d["THREADS"]) // (int(d["LANES"]) * int(d["GROUPS"])) * int(d["ROWS"])

    @cached_property
    def strips(self) -> int:
        """Blocks side by side that hold all groups."""
        return -(-self.groups // int(self.defines["GROUPS"]))

    @cached_property
    def module(self) -> Module:
        return MODULE.specialise(**self.defines)

    @cached_property
    def prepare(self) -> Kernel:
        return self.module.kernel("prepare", args="PPPqii", block=1024)

    @cached_property
    def _sizes(self) -> tuple[int, int, int]:
        """Threads of a block, and bytes of its tile and of the backward's exchange of parameter gradients."""
        d = self.defines
        threads, vectors, vector = int(d["THREADS"]), int(d["VECTORS"]), int(d["VECTOR"])
        return threads, threads * int(d["ROWS"]) * vectors * vector * self.dtype.itemsize, 2 * threads * vector * 4

    @cached_property
    def forward(self) -> Kernel:
        threads, tile, _ = self._sizes
        return self.module.kernel("forward", args="P" * 13 + "iiii" + "f" * 7, block=threads, smem=tile)

    @cached_property
    def backward(self) -> Kernel:
        threads, tile, exchange = self._sizes
        smem = max(2 * tile, exchange) if self.defines["VECTORS"] == 1 else 2 * tile + exchange
        return self.module.kernel("backward", args="P" * 13 + "iiii" + "f" * 6, block=threads, smem=smem)

    @cached_property
    def parameter_sums(self) -> Kernel:
        return self.module.kernel("parameters", args="PPPii", block=(32, 32))


@lru_cache(maxsize=64)
def plan(features: int, dtype: torch.dtype, parameters: torch.dtype, decayed: bool, groups: int) -> Plan:
    """The plan of a shape; equal shapes share one, and plans of equal defines share their module."""
    return Plan(features, dtype, parameters, decayed, groups)


@lru_cache(maxsize=64)
def rates(beta1: float | None, beta2: float | None) -> Rates:
    return Rates(beta1, beta2)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where its strides or its address rule out accesses of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _slots(p: Plan, rows: int, tiles: int, like: Tensor) -> Tensor | None:
    """What the blocks publish: 8 bytes a tile and a span of 32 tiles, in every row and group."""
    if tiles == 1:
        return None
    return torch.empty(rows * p.groups * (tiles + (tiles - 1) // 32), dtype=torch.int64, device=like.device)


def _prepare(p: Plan, bos: Tensor | None, begin: Tensor | None, slots: Tensor | None, rows: int, length: int) -> None:
    if begin is None and slots is None:
        return
    scanned = 0 if begin is None else rows
    count = 0 if slots is None else slots.numel()
    grid = scanned + min(132, -(-count // 4096))
    device = (begin if slots is None else slots).get_device()  # type: ignore[union-attr]
    p.prepare.launch(device, grid, address(bos), address(begin), address(slots), count, scanned, length)


def run_forward(
    p: Plan,
    rate: Rates,
    eps: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bos: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, final count, mean and var; then, for the backward, saved (2, B, G, L) centre and scale, and begin (B, L)."""
    x, weight, bias = aligned(x), aligned(weight), aligned(bias)
    rows, length, _ = x.shape
    tiles = -(-length // p.tile)
    y = torch.empty_like(x)
    count_out = torch.empty(rows, dtype=torch.int64, device=x.device)
    mean_out, var_out = (torch.empty(rows, p.groups, dtype=torch.float32, device=x.device) for _ in range(2))
    saved = torch.empty((2, rows, p.groups, length) if save else (0,), dtype=torch.float32, device=x.device)
    begin = torch.empty((0,) if bos is None else (rows, length), dtype=torch.int32, device=x.device)
    slots = _slots(p, rows, tiles, x)
    bos = None if bos is None else bos.contiguous()
    _prepare(p, bos, None if bos is None else begin, slots, rows, length)
    count, mean, var = (None if t is None else t.contiguous() for t in (count, mean, var))
    tensors = (x, weight, bias, y, begin, count, mean, var, count_out, mean_out, var_out, saved, slots)
    p.forward.launch(
        x.get_device(),
        rows * tiles * p.strips,
        *map(address, tensors),
        rows,
        length,
        p.groups,
        tiles,
        *rate.values,
        eps,
    )
    return y, count_out, mean_out, var_out, saved, begin


def run_backward(
    p: Plan,
    rate: Rates,
    dy: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    begin: Tensor,
    count: Tensor | None,
    stateful: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and, if `stateful`, of the mean and the var before the first step."""
    x, dy, weight = aligned(x), aligned(dy), aligned(weight)
    rows, length, dim = x.shape
    tiles = -(-length // p.tile)
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    shape = (rows, p.groups) if stateful else (0,)
    dmean0, dvar0 = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    partial = torch.empty(rows * tiles, 2, dim, dtype=torch.float32, device=x.device)
    slots = _slots(p, rows, tiles, x)
    _prepare(p, None, None, slots, rows, length)
    dmean, dvar = dmean.contiguous(), dvar.contiguous()
    count = None if count is None else count.contiguous()
    tensors = (x, dy, weight, saved, begin, count, dmean, dvar, dx, partial, dmean0, dvar0, slots)
    p.backward.launch(
        x.get_device(),
        rows * tiles * p.strips,
        *map(address, tensors),
        rows,
        length,
        p.groups,
        tiles,
        *rate.values,
    )
    p.parameter_sums.launch(
        x.get_device(), -(-2 * dim // 32), address(partial), address(dweight), address(dbias), rows * tiles, dim
    )
    return dx, dweight, dbias, dmean0, dvar0
