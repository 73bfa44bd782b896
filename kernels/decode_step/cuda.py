"""The kernels of one decode step: a token a row through a Gecko block, as a chain of launches that never allocates.

A ``Chain`` holds the launches and runs them again and again, in a CUDA graph for one; every tensor has a fixed place.
Letters: B rows, D width, V values, Z keys, H heads, S and E features of a head, F hidden width of the feed-forward,
G norm groups, N modes, C chunk, R ring slots, T the type of activations and matrices; the rest is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import Kernel, Module
from ..runtime.device import attribute

THREADS, ROWS, GATE_THREADS, EMBEDDED, STAGES = 256, 16, 128, 1024, 5
ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "float"}
LARGEST_HEAD = 4096
_ARGUMENTS = {
    "begin": "PPPPPPPPPPPPPfiiqiii",
    "mix": "PPPPPPPPPPPPPPPffffddf",
    "project_in": "PPPPPPPPPPPPPPPPPPfiiiiiii",
    "project_out": "PPPPPPiii",
    "widen<true>": "PPPPPPPPfiiii",
    "widen<false>": "PPPPPPPPfiiii",
    "narrow": "PPPPPPiii",
    "head": "PPPPiii",
    "attend": "PPPPPPPPPPPPPPPPfiiiiiiii",
    "gate": "PPPPPii",
}
_MIX = Module(__file__, "mix.cu", kernels=("begin", "mix"))
_PROJECT = Module(
    __file__, "project.cu", kernels=("project_in", "project_out", "widen<true>", "widen<false>", "narrow", "head")
)
_ATTEND = Module(__file__, "attend.cu", kernels=("attend", "gate"))


def _mix_module(features: int, modes: int, complex_: bool, decay: bool, dtype: torch.dtype) -> Module:
    return _MIX.specialise(
        ELEMENT=ELEMENTS[dtype], FEATURES=features, MODES=modes, COMPLEX=int(complex_), DECAY=int(decay)
    )


def _project_module(tokens: int, aligned: bool, staged: bool, dtype: torch.dtype, stages: int = STAGES) -> Module:
    return _PROJECT.specialise(
        ELEMENT=ELEMENTS[dtype], TOKENS=tokens, ALIGNED=int(aligned), STAGED=int(staged), STAGES=stages
    )


def _attend_module(keys: bool, values: bool, dtype: torch.dtype) -> Module:
    return _ATTEND.specialise(ELEMENT=ELEMENTS[dtype], ALIGNED_KEYS=int(keys), ALIGNED_VALUES=int(values))


def modules() -> list[Module]:
    """What the 7B shape needs in bf16, for few rows and for many."""
    return [
        _mix_module(64, 16, True, True, torch.bfloat16),
        _project_module(8, True, True, torch.bfloat16),
        _project_module(16, True, False, torch.bfloat16),
        _attend_module(True, True, torch.bfloat16),
    ]


def _kernel(module: Module, name: str) -> Kernel:
    if (made := _kernels.get((module, name))) is None:
        block = GATE_THREADS if name == "gate" else THREADS
        made = _kernels[module, name] = module.kernel(name, args=_ARGUMENTS[name], block=block)
    return made


_kernels: dict[tuple[Module, str], Kernel] = {}


class Chain:
    """Launches in order on one device. Tensors given to ``add`` must live, in place, as long as the chain.

    ``early``: each may begin before the one before it has ended.
    """

    def __init__(self, device_index: int, early: bool) -> None:
        self.device_index, self.early = device_index, early
        self._launches: list[tuple[Kernel, tuple[int, ...], tuple[int | float, ...], int]] = []
        self._tensors: list[Tensor] = []

    def add(self, module: Module, name: str, grid: tuple[int, ...], *values: Tensor | float | None,
            smem: int = 0) -> None:
        """A further launch; a tensor stands for its address, None for no address."""
        kernel = _kernel(module, name)
        kernel.load(self.device_index)
        self._tensors += [value for value in values if isinstance(value, Tensor)]
        numbers = tuple(
            value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value for value in values
        )
        self._launches.append((kernel, grid, numbers, smem))

    def run(self) -> None:
        """Enqueue all of them on torch's current stream."""
        for index, (kernel, grid, values, smem) in enumerate(self._launches):
            kernel.launch(self.device_index, grid, *values, smem=smem, early=self.early and index > 0)


@dataclass(frozen=True)
class Clock:
    """Where the rows of a stream stand, counted on by the step itself.

    now (1,) int64 tokens read; fresh (B,) int32: this token begins a document; segment, length (B,) int64 as in a
    cursor; start (B,) int64 position of the document's first key; counts (norms, B) int64 of the time-step norms;
    ids (B, R) int64 segment of each slot; turns (S/2,) float64 turns a position of the rotary pairs (empty: none);
    cosine, sine (S/2,) of this position.
    """

    now: Tensor
    fresh: Tensor
    segment: Tensor
    length: Tensor
    start: Tensor
    counts: Tensor
    ids: Tensor
    turns: Tensor
    cosine: Tensor
    sine: Tensor


def begin(chain: Chain, clock: Clock, tokens: Tensor, embedding: Tensor, x: Tensor, *, scale: float, bos: int) -> None:
    """Embed tokens (B,) int64 into x (B, D), and move the rows' places on. bos -1: no token begins a document."""
    batch, dim = x.shape
    chain.add(
        _mix_module(64, 0, False, True, x.dtype), "begin", (-(-dim // EMBEDDED), batch),
        *(tokens, embedding, x, clock.now, clock.fresh, clock.segment, clock.length, clock.start, clock.counts),
        *(clock.ids, clock.turns, clock.cosine, clock.sine, scale, dim, embedding.shape[0], bos),
        *(clock.counts.shape[0], clock.turns.shape[0], clock.ids.shape[1]),
    )


@dataclass(frozen=True)
class TimeNorm:
    """scale = 1 + weight and shift (D,); mean, var (B, G), updated; count (B,) int64; betas None: cumulative."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    betas: tuple[float, float] | None
    eps: float


@dataclass(frozen=True)
class Average:
    """A moving average: p (D, N), q and gamma (D, N) complex64 or float32, h (B, D, N) like q, updated; skip (D,)."""

    p: Tensor
    q: Tensor
    gamma: Tensor
    h: Tensor
    skip: Tensor


def mix(chain: Chain, clock: Clock, x: Tensor, a: Tensor, e: Tensor, squares: Tensor, norm: TimeNorm,
        average: Average | None) -> None:
    """a = norm(x), e = average(a), all (B, D); squares (B, G): sums of e^2. Without an average only a is written."""
    batch, groups = norm.mean.shape
    features, modes = x.shape[1] // groups, 0 if average is None else average.p.shape[1]
    module = _mix_module(
        features, modes, average is not None and average.q.is_complex(), norm.betas is not None, x.dtype
    )
    beta1, beta2 = norm.betas or (0.5, 0.5)
    parts = (None,) * 5 if average is None else (average.h, average.p, average.q, average.gamma, average.skip)
    chain.add(
        module, "mix", (groups, batch),
        *(x, a, e, squares, norm.scale, norm.shift, norm.mean, norm.var, norm.count, clock.fresh, *parts),
        *(beta1, beta2, 1 - beta1, 1 - beta2, math.log(beta1), math.log(beta2), norm.eps),
    )


@dataclass(frozen=True)
class Affine:
    """A matrix (rows, columns) in T and its bias (rows,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class RowScale:
    """The affine part of a row norm, scale = 1 + weight and shift (D,), its epsilon, and whether it centres."""

    scale: Tensor
    shift: Tensor
    eps: float
    centred: bool


class _Products:
    """How products of x (B, columns) with matrices are run: the module, grid and shared memory."""

    def __init__(self, chain: Chain, x: Tensor) -> None:
        batch, columns = x.shape
        tokens = next(size for size in (8, 16, 32) if batch <= size or size == 32)
        aligned = columns * x.element_size() % 16 == 0
        index, staged, stages, self.smem, blocks = chain.device_index, False, STAGES, 0, 4
        if aligned and x.dtype == torch.bfloat16:
            blocks, piece = 1, 16 * THREADS
            room = attribute(index, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN") - 4 * tokens * (8 * (2 * ROWS + 1) + 2)
            most = min(batch, tokens) * (columns + 32) * x.element_size()
            staged = most + 4 * 4 * piece <= room
            stages = min(STAGES, (room - most) // (4 * piece) if staged else room // (8 * piece))
            # Half a multiprocessor's memory at least: no two blocks shall share one while another has none.
            alone = min(attribute(index, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR") // 2, room)
            self.smem = max(stages * (4 if staged else 8) * piece + staged * most, alone)
        self.module = _project_module(tokens, aligned, staged, x.dtype, stages)
        self.groups = -(-batch // tokens)
        self.blocks = blocks * attribute(index, "MULTIPROCESSOR_COUNT")

    def grid(self, tiles: int) -> tuple[int, int]:
        return min(tiles, self.blocks), self.groups


def project_in(chain: Chain, clock: Clock, a: Tensor, e: Tensor, squares: Tensor, norm: RowScale, v: Affine, z: Affine,
               r: Affine, h: Affine, ring: Tensor, to_z: Tensor, to_r: Tensor, to_h: Tensor) -> None:
    """silu(v a) into this position's slot of ring (B, R, V); z m, r m, h m of m = rms(e), by squares (B, G) of it."""
    batch, dim = a.shape
    run = _Products(chain, a)
    outs = [m.weight.shape[0] for m in (v, z, r, h)]
    tiles = [-(-out // ROWS) for out in outs]
    blocks = max(min(sum(tiles), run.blocks), 2)
    of_v = min(max(round(blocks * tiles[0] / sum(tiles)), 1), blocks - 1)
    chain.add(
        run.module, "project_in", (blocks, run.groups),
        *(a, e, squares, norm.scale, norm.shift, v.weight, z.weight, r.weight, h.weight),
        *(v.bias, z.bias, r.bias, h.bias, ring, to_z, to_r, to_h, clock.now, norm.eps),
        *(batch, dim, outs[0], outs[1], squares.shape[1], ring.shape[1], of_v), smem=run.smem,
    )


def project_out(chain: Chain, u: Tensor, w: Affine, h: Tensor, x: Tensor, y: Tensor, moments: Tensor) -> None:
    """y = x + h + w u (B, D), and the moments (B, D/ROWS, 2) of y that ``widen`` needs."""
    batch, values = u.shape
    run, dim = _Products(chain, u), w.weight.shape[0]
    chain.add(
        run.module, "project_out", run.grid(-(-dim // ROWS)), u, w.weight, h, x, y, moments, batch, dim, values,
        smem=run.smem,
    )


def widen(chain: Chain, y: Tensor, moments: Tensor, norm: RowScale, one: Affine, three: Tensor | None, f: Tensor,
          ) -> None:
    """f (B, F) = silu(one n) [* three n] of n = norm(y)."""
    batch, dim = y.shape
    run = _Products(chain, y)
    width, step = one.weight.shape[0], ROWS if three is None else ROWS // 2
    chain.add(
        run.module, f"widen<{str(three is not None).lower()}>", run.grid(-(-width // step)),
        *(y, moments, norm.scale, norm.shift, one.weight, three, one.bias, f, norm.eps, int(norm.centred)),
        *(batch, dim, width), smem=run.smem,
    )


def narrow(chain: Chain, f: Tensor, w: Affine, alpha: Tensor | None, base: Tensor, x: Tensor) -> None:
    """x (B, D) = base + alpha (w f)."""
    batch, width = f.shape
    run, dim = _Products(chain, f), w.weight.shape[0]
    chain.add(
        run.module, "narrow", run.grid(-(-dim // ROWS)), f, w.weight, w.bias, alpha, base, x, batch, dim, width,
        smem=run.smem,
    )


def head(chain: Chain, clock: Clock, x: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits (B, vocabulary); ends the step: ``clock.now`` moves on."""
    batch, dim = x.shape
    run, rows = _Products(chain, x), weight.shape[0]
    chain.add(
        run.module, "head", run.grid(-(-rows // ROWS)), x, weight, logits, clock.now, batch, dim, rows, smem=run.smem
    )


@dataclass(frozen=True)
class Window:
    """Attention to this chunk of C keys and the ``chunks`` - 1 before it: rings keys (B, R, H, S), values (B, R, V)."""

    keys: Tensor
    values: Tensor
    chunk: int
    chunks: int
    rope_heads: int


@dataclass(frozen=True)
class Table:
    """The memory: table (B, H, S, E) of document owner (B,) int64; keys (B, C, H, S) collects those of this chunk."""

    table: Tensor
    owner: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Views:
    """The views of z: scale = (1 + gamma) / sqrt(S) and shift, (2 or 4, Z)."""

    scale: Tensor
    shift: Tensor
    eps: float


def splits(batch: int, heads: int, values: int, slots: int, dtype: torch.dtype, device_index: int) -> int:
    """Into how many parts the keys of a head are cut, so that all multiprocessors have work."""
    wanted = 2 * attribute(device_index, "MULTIPROCESSOR_COUNT")
    return max(1, min(-(-wanted // (batch * heads * _tiles(values // heads, dtype))), -(-slots // 16), 64))


def _tiles(columns: int, dtype: torch.dtype) -> int:
    width = 16 // dtype.itemsize if columns * dtype.itemsize % 16 == 0 else 1
    return -(-columns // (THREADS * width))


def attend(chain: Chain, clock: Clock, z: Tensor, views: Views, window: Window, memory: Table | None, near: Tensor,
           shares: Tensor, far: Tensor) -> None:
    """Attention and the memory's read, before the gate. The key joins ``window.keys``, that of the memory its ring.

    near (B, H, splits, E) and shares (B, H, splits, 2) by part of the keys; far (B, H, E), left alone without memory.
    """
    batch, slots, heads, width = window.keys.shape
    columns, parts, dtype = near.shape[3], near.shape[2], z.dtype
    module = _attend_module(width * dtype.itemsize % 16 == 0, columns * dtype.itemsize % 16 == 0, dtype)
    tiles, lanes = _tiles(columns, dtype), 128 if columns * dtype.itemsize % 16 == 0 else 32
    far_tiles = 0 if memory is None else -(-columns // lanes)
    extra = (None,) * 3 if memory is None else (memory.keys, memory.table, memory.owner)
    smem = 4 * (3 * width + max(width, -(-slots // parts)))
    chain.add(
        module, "attend", (parts * tiles + far_tiles, heads, batch),
        *(z, views.scale, views.shift, clock.cosine, clock.sine, window.keys, window.values, *extra),
        *(clock.segment, clock.start, clock.now, near, shares, far, views.eps, width, columns, window.rope_heads),
        *(window.chunk, window.chunks, slots, parts, tiles), smem=smem,
    )


def gate(chain: Chain, near: Tensor, shares: Tensor, far: Tensor | None, r: Tensor, u: Tensor) -> None:
    """u (B, V) = attention * silu(r) [+ far]."""
    batch, heads, parts, columns = near.shape
    aligned = columns * r.element_size() % 16 == 0
    module = _attend_module(aligned, aligned, r.dtype)
    grid = (-(-columns // (32 * (4 if aligned else 1))), heads, batch)
    chain.add(module, "gate", grid, near, shares, far, r, u, columns, parts)
