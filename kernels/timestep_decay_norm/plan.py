"""How the time-step norms are cut into blocks: decayed (spec 1.2) and cumulative (spec 1.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..runtime import Kernel, Module

TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
VECTORS_A_LANE = 16  # accesses of 16 bytes, in a step of a group
PIECE_LENGTH, PIECE_THREADS, PIECE_BLOCKS = 512, 256, 2  # of piece.cuh: steps; threads a block, blocks a cluster
PIECE_ROUNDS = 8  # blocks a multiprocessor: more rows hide the kernel that clears slots, and look back (16 rows at 7B)
MODULE = Module(__file__, "norm.cu", kernels=("prepare", "forward", "backward", "parameters"))
PIECE = Module(__file__, "piece.cu", kernels=("forward", "backward", "parameters"))


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
class Piece:
    """One specialisation for short sequences of few rows: a cluster of blocks holds a row's group, a lane a step."""

    features: int
    dtype: torch.dtype
    parameters: torch.dtype
    decayed: bool

    @cached_property
    def module(self) -> Module:
        return PIECE.specialise(
            DECAYED=self.decayed,
            INPUT=TYPES[self.dtype],
            PARAMETER=TYPES[self.parameters],
            FEATURES=self.features,
            LANES=self.lanes,
            CLUSTER=PIECE_BLOCKS,
        )

    @property
    def lanes(self) -> int:
        """Lanes that hold a step of a group, and steps that a lane holds a part of."""
        return self.features * self.dtype.itemsize // 16

    @cached_property
    def forward(self) -> Kernel:
        return self._kernel("forward", "P" * 13 + "iii" + "f" * 7, 0)

    @cached_property
    def backward(self) -> Kernel:
        return self._kernel("backward", "P" * 14 + "iii" + "f" * 6, self._rows)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the backward takes: x and dy, and less than 20 KB for the rest."""
        return self._rows + 20 * 1024

    @property
    def _rows(self) -> int:
        return 2 * PIECE_THREADS * 16 * self.lanes

    @cached_property
    def parameter_sums(self) -> Kernel:
        return self.module.kernel("parameters", args="PPPii", block=(32, 32), most_shared=True)

    def _kernel(self, name: str, args: str, smem: int) -> Kernel:
        return self.module.kernel(name, args=args, block=PIECE_THREADS, smem=smem, most_shared=True)


@dataclass(frozen=True)
class Plan:
    """One specialisation: a block holds `tile` steps of `block_groups` groups of `features` features."""

    features: int
    dtype: torch.dtype
    parameters: torch.dtype
    decayed: bool
    groups: int

    def piece(self, rows: int, length: int, device: torch.device) -> Piece | None:
        """What takes `rows` short sequences better than blocks that look back, or None."""
        made, (multiprocessors, clusters, shared) = self._piece, limits(device)
        if made is None or not clusters or not self.tile < length <= PIECE_LENGTH:
            return None
        if rows * self.groups * PIECE_BLOCKS > PIECE_ROUNDS * multiprocessors or made.shared > shared:
            return None
        return made

    @cached_property
    def _piece(self) -> Piece | None:
        if self.features * self.dtype.itemsize not in (16, 32, 64, 128, 256):
            return None
        return piece(self.features, self.dtype, self.parameters, self.decayed)

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
        return self.module.kernel("forward", args="P" * 13 + "iiii" + "f" * 7, block=self.threads, smem=self.tile_bytes)

    @cached_property
    def backward(self) -> Kernel:
        return self.module.kernel(
            "backward", args="P" * 13 + "iiii" + "f" * 6, block=self.threads, smem=self.backward_bytes
        )

    @cached_property
    def parameter_sums(self) -> Kernel:
        return self.module.kernel("parameters", args="PPPii", block=(32, 32))


@lru_cache(maxsize=64)
def plan(features: int, dtype: torch.dtype, parameters: torch.dtype, decayed: bool, groups: int) -> Plan:
    """The plan of a shape; equal shapes share one, and plans of equal defines share their module."""
    return Plan(features, dtype, parameters, decayed, groups)


piece = lru_cache(maxsize=64)(Piece)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> tuple[int, bool, int]:
    """Multiprocessors, whether they take clusters of blocks, and the most bytes of shared memory a block."""
    properties = torch.cuda.get_device_properties(device)
    shared: int = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009 (missing from torch's stubs)
    return properties.multi_processor_count, properties.major >= 9, shared


@lru_cache(maxsize=64)
def rates(beta1: float | None, beta2: float | None) -> Rates:
    return Rates(beta1, beta2)
