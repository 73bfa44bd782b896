"""How the time-step norms are cut into blocks: decayed (spec 1.2) and cumulative (spec 1.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..runtime import Kernel, Module

TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
VECTORS_A_LANE = 16  # accesses of 16 bytes, in a step of a group
CLUSTER = 8  # blocks: what every device with clusters takes
CLUSTER_ROUNDS = 2  # of blocks that live at once: two rounds of clusters still beat a second kernel (four rows at 7B)
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
    cluster: int = 0  # blocks that hold a whole chain of tiles; 0: any number of them, which look back

    def suited(self, rows: int, length: int, device: torch.device) -> Plan:
        """The plan for so many rows of `length` steps: clusters where few tiles hold a row and few blocks all rows.

        Clusters need no kernel before theirs and begin early: measured, that is worth more than what a second round
        of blocks waits for eight free places at once. Many rows hide the kernel that clears slots: they look back.
        """
        if not self.tile < length <= CLUSTER * self.tile:
            return self
        multiprocessors, clusters = limits(device)
        places = 768 // self.threads * multiprocessors if clusters else 0  # of blocks of the backward
        if rows * self.strips * CLUSTER > CLUSTER_ROUNDS * places:
            return self
        return plan(self.features, self.dtype, self.parameters, self.decayed, self.groups, CLUSTER)

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
            "CLUSTER": self.cluster,
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
    def threads(self) -> int:
        """Threads a block."""
        return int(self.defines["THREADS"])

    @cached_property
    def tile_bytes(self) -> int:
        d = self.defines
        return self.threads * int(d["ROWS"]) * int(d["VECTORS"]) * int(d["VECTOR"]) * self.dtype.itemsize

    @cached_property
    def backward_bytes(self) -> int:
        """Tiles of x and dy, and the exchange of parameter gradients."""
        d = self.defines
        tiles, exchange = 2 * self.tile_bytes, 2 * self.threads * int(d["VECTOR"]) * 4
        return max(tiles, exchange) if d["VECTORS"] == 1 else tiles + exchange

    @cached_property
    def forward(self) -> Kernel:
        return self.module.kernel("forward", args="P" * 14 + "iiii" + "f" * 7, block=self.threads, smem=self.tile_bytes)

    @cached_property
    def backward(self) -> Kernel:
        return self.module.kernel(
            "backward", args="P" * 13 + "iiii" + "f" * 6, block=self.threads, smem=self.backward_bytes
        )

    @cached_property
    def parameter_sums(self) -> Kernel:
        return self.module.kernel("parameters", args="PPPii", block=(32, 32))


@lru_cache(maxsize=64)
def plan(
    features: int, dtype: torch.dtype, parameters: torch.dtype, decayed: bool, groups: int, cluster: int = 0
) -> Plan:
    """The plan of a shape; equal shapes share one, and plans of equal defines share their module."""
    return Plan(features, dtype, parameters, decayed, groups, cluster)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether they take clusters of blocks."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 9


@lru_cache(maxsize=64)
def rates(beta1: float | None, beta2: float | None) -> Rates:
    return Rates(beta1, beta2)
