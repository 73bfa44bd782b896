"""The state atlas: parameters, FLOPs and bytes of state by component, counted on the meta device, without memory.

A layer's state is made by running the layer itself on tensors that have shapes only, so the bytes are those of the
code and not of a formula. Beyond the window of every attention a state's size repeats with the period C of the
chunk grid, up to what grows by the same amount in every chunk: long contexts are computed from two shorter ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .components import KINDS
from .components import state as states
from .components.attention import Attention
from .errors import LabError
from .model import LanguageModel, ModelConfig
from .telemetry.flops import count

CURSOR = 16  # bytes: the id of the open document and the tokens read of it


@dataclass
class Part:
    """The components of one kind and name over all layers; flops and state (bytes) at each context."""

    kind: str
    name: str
    parameters: int = 0
    flops: list[float] = field(default_factory=list)
    state: list[int] = field(default_factory=list)


@dataclass
class Atlas:
    """``flops`` are forward FLOPs a token, on average over one document of that length; ``state`` is one stream's bytes
    after so many tokens; ``largest_state`` over all lengths, None where it grows for ever by ``growth`` bytes a token;
    ``windows`` says for each attention how many tokens a query sees."""

    family: str
    layers: int
    contexts: list[int]
    parameters: int
    flops: list[float]
    state: list[int]
    largest_state: int | None
    growth: float
    windows: dict[str, str]
    parts: list[Part]


def atlas(config: ModelConfig, contexts: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Atlas:
    """Count a model of this configuration. ``dtype`` is that of matrices and activations (states are float32 but for
    buffered keys and values). LabError: a model that cannot be built, or a context below 1."""
    if min(contexts) < 1:
        raise LabError(f"context {min(contexts)}: must be at least 1 token")
    try:
        with torch.device("meta"):
            model = LanguageModel(config).eval()
    except ValueError as error:
        raise LabError(str(error)) from error
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(dtype)
    known: dict[str, Layer] = {}  # layers of one kind are counted once
    layers = []
    for i, block in enumerate(model.blocks):
        key = str(dataclasses.replace(config.shape(i), layer=0)) + str(config.parts(i).configs)
        layers.append(known.setdefault(key, Layer(block, config, i, dtype)))
    parts: dict[tuple[str, str], Part] = {}

    def add(kind: str, name: str, parameters: int, flops: Sequence[float], state: Sequence[int]) -> None:
        part = parts.setdefault((kind, name), Part(kind, name, 0, [0.0] * len(contexts), [0] * len(contexts)))
        part.parameters += parameters
        part.flops = [a + b for a, b in zip(part.flops, flops)]
        part.state = [a + b for a, b in zip(part.state, state)]

    add("embedding", "", model.embed.weight.numel(), [0.0] * len(contexts), [CURSOR] * len(contexts))
    for layer in layers:
        flops, state = [layer.flops(c) for c in contexts], [layer.state(c) for c in contexts]
        for kind, name in layer.names.items():
            add(kind, name, layer.parameters[kind], [f[kind] for f in flops], [s[kind] for s in state])
    last = layers[-1]
    sizes = [last.state(c)["norm"] for c in contexts]
    weights = sum(p.numel() for p in model.final_norm.parameters())
    add("final norm", last.names["norm"], weights, [0.0] * len(contexts), sizes)
    head = 0 if config.tie_embeddings else model.head.weight.numel()
    add("head", "", head, [count(model.head, config.shape(0), c) for c in contexts], [0] * len(contexts))

    def whole(length: int) -> int:
        return CURSOR + sum(sum(layer.state(length).values()) for layer in layers) + last.state(length)["norm"]

    steady = max(layer.steady for layer in layers)
    growth = whole(steady + config.chunk_size) - whole(steady)
    largest = None
    if not growth:
        largest = max(whole(length) for length in _peaks(steady, config.chunk_size))
    return Atlas(
        family=config.family,
        layers=config.num_layers,
        contexts=list(contexts),
        parameters=model.num_parameters(),
        flops=[sum(p.flops[i] for p in parts.values()) for i in range(len(contexts))],
        state=[sum(p.state[i] for p in parts.values()) for i in range(len(contexts))],
        largest_state=largest,
        growth=growth / config.chunk_size,
        windows={layer.names["attention"]: layer.window for layer in layers},
        parts=[p for p in parts.values() if p.parameters or any(p.flops) or any(p.state) or p.kind in KINDS],
    )


def crossover(own: Atlas, other: Atlas) -> int | None:
    """Tokens from which on a state of ``other`` is larger than the largest of ``own``; None when it never is."""
    if own.largest_state is None or not other.growth:
        return None
    fixed = other.state[0] - other.growth * other.contexts[0]
    return max(1, math.floor((own.largest_state - fixed) / other.growth) + 1)


def _peaks(steady: int, period: int) -> list[int]:
    """Lengths among which a bounded state is at its largest: a buffer is full just before a chunk ends."""
    end = -(-steady // period) * period
    return [1, steady, end + period - 1, end + period, end + 1]


class Layer:
    """One layer on the meta device, and what it costs at a length."""

    def __init__(self, block: nn.Module, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        self.block, self.shape, self.dtype = block, config.shape(index), dtype
        self.names = {kind: config.parts(index).name(kind) for kind in KINDS}
        self.kinds = dict(self._walk(block, "block"))
        self.parameters = dict.fromkeys(KINDS, 0)
        for module, kind in self.kinds.items():
            self.parameters[kind] += sum(p.numel() for p in module.parameters(recurse=False))
        attention = next(module for module in block.modules() if isinstance(module, Attention))
        chunk = attention.chunk
        far = torch.arange(chunk) + 2**40 * chunk  # so far that no window reaches to the start
        seen = far - attention.first_visible(far) + 1
        low, high = int(seen.min()), int(seen.max())
        if attention.constant_state:
            self.window = f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"
        else:
            high, self.window = 0, "all tokens"
        self.steady = (-(-high // chunk) + 1) * chunk  # from here on a state's size repeats, chunk after chunk
        self._states: dict[int, dict[str, int]] = {}

    def _walk(self, module: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str]]:
        """Every module with the kind of the component that it belongs to."""
        chosen = (k for k, name in self.names.items() if type(module) is KINDS[k][name])
        kind = next(chosen, kind) if kind == "block" else kind
        yield module, kind
        for child in module.children():
            yield from self._walk(child, kind)

    def flops(self, length: int) -> dict[str, float]:
        """Forward FLOPs a token by kind, on average over a document of ``length`` tokens."""
        found = dict.fromkeys(KINDS, 0.0)
        for module, kind in self.kinds.items():
            found[kind] += count(module, self.shape, length)
        return found

    def state(self, length: int) -> dict[str, int]:
        """Bytes of one stream's state by kind after ``length`` tokens."""
        chunk = self.shape.chunk_size
        if length >= self.steady + 2 * chunk:
            near = self.steady + (length - self.steady) % chunk
            first, second = self.state(near), self.state(near + chunk)
            return {k: first[k] + (second[k] - first[k]) * ((length - near) // chunk) for k in first}
        if length not in self._states:
            x = torch.empty(1, length, self.shape.dim, dtype=self.dtype, device="meta")
            with torch.no_grad():
                _, state = self.block(x, None, None)
            self._states[length] = {kind: _nbytes(getattr(state, kind, None)) for kind in KINDS}
        return self._states[length]


def _nbytes(state: Any) -> int:
    """With the document ids of buffered keys, which generation has and a call without documents leaves out."""
    ids = 0
    if isinstance(getattr(state, "k", None), Tensor) and getattr(state, "segments", 0) is None:
        ids = 8 * state.k.shape[0] * state.k.shape[1]
    return states.nbytes(state) + ids
