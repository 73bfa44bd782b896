"""A decode step of the Gecko and Megalodon families as one CUDA graph, the state in place.

Keys and values lie in rings, so nothing is moved from step to step. The memory's table changes only where a chunk ends:
until then its keys and values wait in the rings, and the operation itself folds them, between two replays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .components import Cursor
from .components import state as states
from .components.attention import ChunkAttention, SlidingChunkAttention
from .components.attention.buffer import KeyValues
from .components.block.base import BlockState
from .components.block.gecko import GeckoBlock
from .components.ema import ComplexEMA, NoEMA, RealEMA
from .components.feedforward import MLP, SwiGLU
from .components.memory import AdaptiveWorkingMemory, NoMemory
from .components.norm import LayerNorm, TimestepDecayNorm, TimestepNorm
from .kernels import ops
from .kernels.decode_step import cuda as kernels
from .kernels.types import AttentionState, MemoryState, NormState
from .model import LanguageModel, ModelState

EARLY_ROWS = 4  # beyond, kernels are long, and blocks that wait early only take room (docs/log.md)
PLACES: dict[str, tuple[type, ...]] = {
    "timenorm": (TimestepDecayNorm, TimestepNorm),
    "cema": (ComplexEMA, RealEMA, NoEMA),
    "attention": (SlidingChunkAttention, ChunkAttention),
    "memory": (AdaptiveWorkingMemory, NoMemory),
    "nffn": (SwiGLU, MLP),
}


def unsupported(model: LanguageModel) -> str | None:
    """Why a model cannot be decoded by the kernels, or None when it can."""
    weight = model.embed.weight
    if weight.dtype not in kernels.ELEMENTS:
        return f"weights of {weight.dtype}: the kernels take bfloat16 and float32"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on: decode outside it, with the model in the type it shall run in"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    rates = (model.config.dropout, model.config.hidden_dropout, model.config.attention_dropout)
    if model.training and any(rates):
        return "the model is in training mode and has dropout: call its eval()"
    kinds = {type(getattr(block, "attention", None)).__name__ for block in model.blocks}
    if len(kinds) > 1:
        return f"{' and '.join(sorted(kinds))} in one model: the kernels serve one kind of attention at a time"
    for block in model.blocks:
        if type(block) is not GeckoBlock:
            return f"{type(block).__name__}: the kernels serve the gecko block"
        for place, known in PLACES.items():
            if type(part := getattr(block, place)) not in known:
                return f"{type(part).__name__}: the kernels serve {', '.join(k.__name__ for k in known)} in its place"
        if isinstance(block.cema, RealEMA) and block.cema.omega is not None:
            return "RealEMA with mega: the kernels serve the one without"
        if block.attention.head_dim > kernels.LARGEST_HEAD:
            return f"S={block.attention.head_dim}: the kernels take at most {kernels.LARGEST_HEAD} key features a head"
    if type(model.final_norm) not in PLACES["timenorm"]:
        return f"{type(model.final_norm).__name__} as the final norm: the kernels serve the time-step norms"
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and (type(part) is not nn.Linear or part.weight.dtype != weight.dtype):
            return f"{name}: the kernels take plain linear maps of one type, {weight.dtype}"
    return None


def _wide(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _affine(x: nn.Linear) -> kernels.Affine:
    return kernels.Affine(x.weight.detach().contiguous(), None if x.bias is None else _wide(x.bias))


def _row_scale(norm: Any, dim: int, device: torch.device) -> kernels.RowScale:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.ones(dim, device=device) if weight is None else 1 + _wide(weight)
    shift = torch.zeros(dim, device=device) if bias is None else _wide(bias)
    return kernels.RowScale(scale, shift, norm.eps, isinstance(norm, LayerNorm))


class Scratch(NamedTuple):
    """What every layer of a step writes anew: activations (B, .) and the parts of attention."""

    a: Tensor
    e: Tensor
    squares: Tensor
    z: Tensor
    r: Tensor
    h: Tensor
    near: Tensor
    shares: Tensor
    far: Tensor
    u: Tensor
    y: Tensor
    moments: Tensor
    f: Tensor


def _time_norm(part: Any, state: NormState | None, count: Tensor, batch: int) -> kernels.TimeNorm:
    device, shape = part.weight.device, (batch, part.groups)
    mean, var = (torch.zeros(shape, device=device) for _ in range(2))
    if state is not None:
        count.copy_(state.count)
        mean.copy_(state.mean)
        var.copy_(state.var)
    betas = (part.beta1, part.beta2) if isinstance(part, TimestepDecayNorm) else None
    return kernels.TimeNorm(1 + _wide(part.weight), _wide(part.bias), mean, var, count, betas, part.eps)


def _norm_state(norm: kernels.TimeNorm) -> NormState:
    return NormState(norm.count.clone(), norm.mean.clone(), norm.var.clone())


def _average(part: Any, state: Tensor | None, batch: int) -> kernels.Average | None:
    if isinstance(part, NoEMA):
        return None
    p, q, gamma = (x.detach().resolve_conj().contiguous() for x in part.coefficients())
    h = q.new_zeros(batch, *q.shape)
    if state is not None:
        h.copy_(state)
    skip = torch.ones_like(p[:, 0]) if getattr(part, "omega", None) is None else _wide(part.omega)
    return kernels.Average(p, q, gamma, h, skip.contiguous())


class Memory:
    """The memory of one layer: its state at the last fold, and the tokens that have come since, in the rings."""

    def __init__(self, part: AdaptiveWorkingMemory, state: MemoryState | None, values: Tensor, sizes: tuple[int, ...],
                 position: int) -> None:
        batch, heads, features, _ = sizes
        self.part, self.values, self.since = part, values.unflatten(2, (heads, -1)), position
        table = torch.zeros(sizes, device=values.device)
        owner = torch.full((batch,), -1, dtype=torch.int64, device=values.device)
        keys = values.new_zeros(batch, part.chunk, heads, features)
        self.place = kernels.Table(table, owner, keys)
        self.held: MemoryState | None = None
        if state is not None:
            self._hold(state)

    def _hold(self, state: MemoryState) -> None:
        self.place.table.copy_(state.table)
        self.place.owner.copy_(state.owner)
        self.held = state._replace(table=self.place.table, owner=self.place.owner)

    def fold(self, position: int, ids: Tensor | None) -> None:
        """Take in the chunk that ends before ``position``."""
        self._hold(self.state(position, ids))
        self.since = position

    def state(self, position: int, ids: Tensor | None) -> MemoryState:
        """With all tokens before ``position``; ids (B, slots), or None where documents are not told apart."""
        count = position - self.since
        if count == 0 and self.held is not None:
            return states.clone(self.held)
        key, value = self.since % self.part.chunk, self.since % self.values.shape[1]
        keys = self.place.keys[:, key : key + count]
        segments = None if ids is None else ids[:, value : value + count].contiguous()
        _, state = ops.adaptive_working_memory(
            keys, keys, self.values[:, value : value + count], chunk=self.part.chunk, segments=segments,
            state=self.held, lag=self.part.lag,
        )
        return states.clone(state)


class Layer:
    """The buffers of one block, and its launches."""

    def __init__(self, block: GeckoBlock, before: BlockState, count: Tensor, batch: int, position: int) -> None:
        shape, weight = block.shape, block.wv.weight
        self.block, self.position = block, position
        self.norm = _time_norm(block.timenorm, before.norm, count, batch)
        self.average = _average(block.cema, before.ema, batch)
        self.chunks = block.attention.covered_chunks(shape.chunk_size)
        slots = self.chunks * shape.chunk_size
        keys = weight.new_zeros(batch, slots, shape.num_heads, shape.head_dim)
        values = weight.new_zeros(batch, slots, shape.value_dim)
        held = before.attention
        if held is not None:
            place = self.places(held.k.shape[1], position)
            keys[:, place] = held.k.to(keys.dtype)
            values[:, place] = held.v.flatten(2).to(values.dtype)
        self.window = kernels.Window(keys, values, shape.chunk_size, self.chunks, block.attention.rope_heads)
        self.memory: Memory | None = None
        if isinstance(block.memory, AdaptiveWorkingMemory):
            sizes = (batch, shape.num_heads, shape.head_dim, shape.value_dim // shape.num_heads)
            self.memory = Memory(block.memory, before.memory, values, sizes, position)

    def places(self, count: int, position: int) -> Tensor:
        """The slots of the ``count`` tokens before ``position``."""
        steps = torch.arange(position - count, position, device=self.block.wv.weight.device)
        return steps % (self.chunks * self.block.shape.chunk_size)

    def add(self, chain: kernels.Chain, clock: kernels.Clock, s: Scratch, x: Tensor, out: Tensor) -> None:
        """The launches from x to out, (B, D) each."""
        block, shape, device = self.block, self.block.shape, x.device
        gamma, beta = block.gamma.detach(), _wide(block.beta)
        views = kernels.Views((1 + gamma.float()) / math.sqrt(shape.head_dim), beta, shape.norm_eps)
        e = s.a if self.average is None else s.e
        kernels.mix(chain, clock, x, s.a, e, s.squares, self.norm, self.average)
        kernels.project_in(
            chain, clock, s.a, e, s.squares, _row_scale(block.rmsnorm, shape.dim, device),
            _affine(block.wv), _affine(block.wz), _affine(block.wr), _affine(block.wh1),
            self.window.values, s.z, s.r, s.h,
        )
        memory = None if self.memory is None else self.memory.place
        kernels.attend(chain, clock, s.z, views, self.window, memory, s.near, s.shares, s.far)
        kernels.gate(chain, s.near, s.shares, None if memory is None else s.far, s.r, s.u)
        kernels.project_out(chain, s.u, _affine(block.wh2), s.h, x, s.y, s.moments)
        wide = block.nffn
        three = wide.fc3.weight.detach().contiguous() if isinstance(wide, SwiGLU) else None
        kernels.widen(chain, s.y, s.moments, _row_scale(wide.norm, shape.dim, device), _affine(wide.fc1), three, s.f)
        alpha = None if wide.alpha is None else _wide(wide.alpha)
        kernels.narrow(chain, s.f, _affine(wide.fc2), alpha, x if block.two_hop else s.y, out)

    def state(self, position: int, ids: Tensor | None) -> BlockState:
        """After ``position`` tokens, in tensors of its own."""
        size = self.window.chunk
        count = position - max(position // size - self.chunks + 1, 0) * size
        place = self.places(count, position)
        k, v = self.window.keys[:, place], self.window.values[:, place].unflatten(2, (self.block.shape.num_heads, -1))
        segments = None if ids is None else ids[:, place]
        kind = AttentionState if isinstance(self.block.attention, SlidingChunkAttention) else KeyValues
        return BlockState(
            norm=_norm_state(self.norm),
            ema=None if self.average is None else self.average.h.clone(),
            attention=kind(k, v, segments, position),
            memory=None if self.memory is None else self.memory.state(position, ids),
        )


class GraphStep:
    """The step of a model that ``unsupported`` has nothing against; the arguments are those of ``Decoder``."""

    def __init__(self, model: LanguageModel, state: ModelState | None, batch: int, bos_id: int | None) -> None:
        config, weight = model.config, model.embed.weight.detach()
        self.device, self.batch = weight.device, batch
        before = [BlockState()] * len(model.blocks) if state is None else state.blocks
        held = before[0].attention
        self.position = 0 if held is None else int(held.position)
        cursor = None if state is None else state.cursor
        self.documents = bos_id is not None or cursor is not None
        self.read = state is not None

        def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=self.device)

        counts = new(len(model.blocks) + 1, batch, dtype=torch.int64)
        self.layers = [
            Layer(block, old, count, batch, self.position)  # type: ignore[arg-type]
            for block, old, count in zip(model.blocks, before, counts, strict=False)
        ]
        self.final = _time_norm(model.final_norm, None if state is None else state.final_norm, counts[-1], batch)
        first = self.layers[0]
        self.clock = self._clock(first, counts, cursor, held)

        dim, heads, columns = config.dim, config.num_heads, config.value_dim // config.num_heads
        slots = first.window.keys.shape[1]
        self.tokens, self.logits = new(batch, dtype=torch.int64), new(batch, config.vocab_size)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        parts = kernels.splits(batch, heads, config.value_dim, slots, weight.dtype, index)

        def activation(width: int) -> Tensor:
            return new(batch, width, dtype=weight.dtype)

        scratch = Scratch(
            a=activation(dim), e=activation(dim), squares=new(batch, config.norm_groups),
            z=activation(config.z_dim), r=activation(config.value_dim), h=activation(dim),
            near=new(batch, heads, parts, columns), shares=new(batch, heads, parts, 2), far=new(batch, heads, columns),
            u=activation(config.value_dim), y=activation(dim), moments=new(batch, -(-dim // kernels.ROWS), 2),
            f=activation(config.ffn_dim),
        )
        x, other = activation(dim), activation(dim)
        scale = math.sqrt(dim) if config.scale_embeddings else 1.0
        self.chain = kernels.Chain(index, early=batch <= EARLY_ROWS)
        bos = -1 if bos_id is None else bos_id
        kernels.begin(self.chain, self.clock, self.tokens, weight.contiguous(), x, scale=scale, bos=bos)
        for layer in self.layers:
            layer.add(self.chain, self.clock, scratch, x, other)
            x, other = other, x
        kernels.mix(self.chain, self.clock, x, scratch.a, scratch.a, scratch.squares, self.final, None)
        kernels.head(self.chain, self.clock, scratch.a, model.head.weight.detach().contiguous(), self.logits)
        with torch.cuda.device(index):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.chain.run()

    def _clock(self, first: Layer, counts: Tensor, cursor: Cursor | None, held: Any) -> kernels.Clock:
        attention, slots = first.block.attention, first.window.keys.shape[1]

        def new(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=self.device)

        pair = torch.arange(0, attention.head_dim if attention.rope_heads else 0, 2, dtype=torch.float64)
        turns = (attention.rope_base ** (-pair / attention.head_dim) / (2 * math.pi)).to(self.device)
        clock = kernels.Clock(
            now=new(1), fresh=new(self.batch, dtype=torch.int32), segment=new(self.batch), length=new(self.batch),
            start=new(self.batch), counts=counts, ids=new(self.batch, slots), turns=turns,
            cosine=new(len(turns), dtype=torch.float32), sine=new(len(turns), dtype=torch.float32),
        )
        clock.now.fill_(self.position)
        if cursor is not None:
            clock.segment.copy_(cursor.segment)
            clock.length.copy_(cursor.length)
        if held is not None and held.segments is not None:
            place = first.places(held.segments.shape[1], self.position)
            clock.ids[:, place] = held.segments
            clock.start.copy_(self.position - (held.segments == clock.segment[:, None]).sum(1))
        return clock

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) -> logits (B, vocabulary)."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.position += 1
        self.read = True
        for layer in self.layers:
            if layer.memory is not None and self.position % layer.memory.part.chunk == 0:
                layer.memory.fold(self.position, self.ids)
        return self.logits.clone()

    @property
    def ids(self) -> Tensor | None:
        """The segments of the rings' slots (B, R); None while documents are not told apart."""
        return self.clock.ids if self.documents else None

    def state(self) -> ModelState:
        """After the last step, in tensors of its own."""
        clock = self.clock
        cursor = Cursor(clock.segment.clone(), clock.length.clone()) if self.documents else None
        blocks = tuple(layer.state(self.position, self.ids) for layer in self.layers)
        return ModelState(cursor, blocks, _norm_state(self.final))
