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
WALKER = 1  # in the place of CLUSTER: one block that walks
WALK_TILES = 8  # at most
WALK_BYTES = 48 * 1024  # of tiles on their way or in use: four blocks fill a multiprocessor of compute capability 9.0
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
    cluster: int = 0  # blocks that hold a whole chain of tiles; 1 walks through it; 0: any number, which look back

    def suited(self, rows: int, length: int, device: torch.device) -> Plan:
        """The plan for so many rows of `length` steps: where few tiles hold a row, one that has nothing to prepare.

        Blocks that walk where a row and group each fill the machine, but all live at once; clusters where they would
        not, and all blocks of the clusters live at once. Many rows hide preparations and look back.
        """
        if not self.tile < length <= CLUSTER * self.tile:
            return self
        multiprocessors, clusters, memory = limits(device)
        walker, blocks = self.of(WALKER), rows * self.groups
        most = multiprocessors * min(512 // walker.threads, memory // (walker.backward_bytes + 8192))
        if walker.walks_well and length <= WALK_TILES * walker.tile and 1.5 * multiprocessors <= blocks <= most:
            return walker
        places = 768 // self.threads * multiprocessors if clusters else 0
        return self.of(CLUSTER) if rows * self.strips * CLUSTER <= places else self

    def of(self, cluster: int) -> Plan:
        return plan(self.features, self.dtype, self.parameters, self.decayed, self.groups, cluster)

    @cached_property
    def walks_well(self) -> bool:
        """Whether a step of a group is wide enough to be read alone, and one access a lane."""
        return self.features * self.dtype.itemsize >= 128 and self.defines["VECTORS"] == 1

    @cached_property
    def defines(self) -> dict[str, int | str]:
        vector = access(self.features, self.dtype)
        count = self.features // vector
        lanes = min(32, power_of_two(count))
        vectors = -(-count // lanes)
        wide = lanes >= 16 and self.cluster != WALKER
        # Neighbouring groups until a step's part is 256 (512) contiguous bytes; at most two rows a lane pair scans.
        groups = max(1, (512 if wide else 256) // (self.features * self.dtype.itemsize))
        groups = 1 if self.cluster == WALKER else min(power_of_two(groups), power_of_two(self.groups), 32)
        threads = min(256 if wide and vectors <= 8 else 128, max(32, 64 * lanes * groups))
        groups = min(groups, threads // lanes)
        across = threads // (lanes * groups)
        rows = max(1, min(8 // vectors, 64 // across))

        def stages(tensors: int) -> int:
            tile = tensors * threads * rows * vectors * vector * self.dtype.itemsize
            return min(WALK_TILES, max(2, WALK_BYTES // tile)) if self.cluster == WALKER else 1

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
            "WALK_TILES": WALK_TILES if self.cluster == WALKER else 1,
            "FORWARD_STAGES": stages(1),
            "BACKWARD_STAGES": stages(2),
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
        tiles, exchange = 2 * int(d["BACKWARD_STAGES"]) * self.tile_bytes, 2 * self.threads * int(d["VECTOR"]) * 4
        return max(tiles, exchange) if d["VECTORS"] == 1 else tiles + exchange

    @cached_property
    def forward(self) -> Kernel:
        smem = self.tile_bytes * int(self.defines["FORWARD_STAGES"])
        return self.module.kernel("forward", args="P" * 14 + "iiii" + "f" * 7, block=self.threads, smem=smem)

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
def limits(device: torch.device) -> tuple[int, bool, int]:
    """Multiprocessors, whether they take clusters of blocks, and the shared memory of each."""
    properties = torch.cuda.get_device_properties(device)
    shared = int(properties.shared_memory_per_multiprocessor)
    return properties.multi_processor_count, properties.major >= 9, shared


@lru_cache(maxsize=64)
def rates(beta1: float | None, beta2: float | None) -> Rates:
    return Rates(beta1, beta2)
