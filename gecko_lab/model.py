"""The language model: embedding -> blocks -> final norm -> head, over streams of any length (spec 6.3).

``LanguageModel`` knows no component by name: it asks the registries for what its configuration names. The same
forward serves training, prefill and generation, because every block carries a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .components import KINDS, Cursor, Documents, Shape
from .components.init import MODES, init_matrix
from .components.registry import Parts, nearest, option


@dataclass
class PerLayer:
    """Another component in some layers, as a list of names spread over the depth: ``[none,adaptive_working]`` is
    none in the lower half and adaptive_working in the upper one; a list as long as the model names each layer."""

    ema: list[str] = option([], "ema by depth, e.g. [none,complex]; empty: the same in every layer")
    norm: list[str] = option([], "norm by depth")
    attention: list[str] = option([], "attention by depth")
    memory: list[str] = option([], "memory by depth, e.g. [none,adaptive_working]: only the upper half has one")
    feedforward: list[str] = option([], "feedforward by depth")
    block: list[str] = option([], "block by depth")


@dataclass
class ModelConfig:
    """Sizes and choices of a model. ``model=PRESET`` fills them, ``model.FIELD=VALUE`` changes one."""

    family: str = option("gecko", "label of the architecture: gecko, megalodon, mega, llama")
    vocab_size: int = option(257, "tokens in the vocabulary; 257 = bytes and BOS")
    num_layers: int = option(4, "blocks")
    dim: int = option(128, "D, width of the model")
    z_dim: int = option(64, "Z, width of the queries and keys over all heads")
    value_dim: int = option(256, "V, width of the values over all heads")
    num_heads: int = option(2, "H, attention heads; divides z_dim and value_dim")
    ffn_dim: int = option(256, "F, hidden width of the feed-forward")
    chunk_size: int = option(64, "C, tokens in a chunk of attention and memory")
    ema_modes: int = option(8, "N, modes of the moving average of each feature")
    norm_groups: int = option(16, "G, groups of features that a timestep norm normalises together; divides dim")
    rope_base: float = option(500_000.0, "base of the rotary frequencies")
    num_rope_heads: Optional[int] = option(None, "heads with rotary positions; null: all, 0: none")  # noqa: UP045 (OmegaConf)
    norm_eps: float = option(1e-5, "epsilon inside every normaliser's root")
    norm_affine: bool = option(True, "learnable scale in the row norms of a block")
    init: str = option("he", "initialiser of the matrices: " + ", ".join(MODES))
    tie_embeddings: bool = option(False, "the head shares the embedding's weight")
    scale_embeddings: bool = option(False, "multiply embeddings by sqrt(dim)")
    dropout: float = option(0.0, "dropout of the embedding and of each sub-layer's output")
    hidden_dropout: float = option(0.0, "dropout inside the block and the feed-forward")
    attention_dropout: float = option(0.0, "share of keys hidden from each query in training (DropKey)")
    checkpoint_blocks: bool = option(False, "recompute each block in the backward pass: less memory, a third more time")
    ema: Any = None
    norm: Any = None
    attention: Any = None
    memory: Any = None
    feedforward: Any = None
    block: Any = None
    per_layer: PerLayer = field(default_factory=PerLayer)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """The inverse of ``dataclasses.asdict``: plain values, as checkpoints hold them, back to typed ones."""
        values = dict(values)
        for kind, registry in KINDS.items():
            chosen = values.get(kind)
            if isinstance(chosen, dict):
                values[kind] = registry[chosen["name"]].Config(**chosen)
        if isinstance(values.get("per_layer"), dict):
            values["per_layer"] = PerLayer(**values["per_layer"])
        return ModelConfig(**values)

    def check(self) -> None:
        """Raise ValueError naming field, value and rule for sizes that cannot be built."""
        for name in ("vocab_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.init not in MODES:
            raise ValueError(f"model.init={self.init!r}: unknown initialiser. {nearest(self.init, list(MODES))}")
        for kind in KINDS:
            names = getattr(self.per_layer, kind)
            if names and self.num_layers % len(names):
                raise ValueError(
                    f"model.per_layer.{kind}={names}: {len(names)} entries do not spread evenly over "
                    f"model.num_layers={self.num_layers}; give a list whose length divides it"
                )

    def shape(self, layer: int) -> Shape:
        """The sizes that the components of this layer share."""
        return Shape(
            dim=self.dim,
            z_dim=self.z_dim,
            value_dim=self.value_dim,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            chunk_size=self.chunk_size,
            ema_modes=self.ema_modes,
            norm_groups=self.norm_groups,
            rope_base=self.rope_base,
            num_rope_heads=self.num_rope_heads,
            norm_eps=self.norm_eps,
            norm_affine=self.norm_affine,
            init=self.init,
            dropout=self.dropout,
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            layer=layer,
        )

    def parts(self, layer: int) -> Parts:
        """The configuration of every kind in this layer; another name than the model's own has its defaults."""
        configs = {}
        for kind, registry in KINDS.items():
            config, names = getattr(self, kind), getattr(self.per_layer, kind)
            if names:
                name = names[layer * len(names) // self.num_layers]
                if config is None or config.name != name:
                    config = registry[name].Config()
            if config is None:
                raise ValueError(f"model/{kind}: nothing chosen. {nearest('', registry.names())}")
            configs[kind] = config
        return Parts(configs, self.shape(layer))


class ModelState(NamedTuple):
    """What a stream carries from one call to the next: where its documents stand, each block's state, the final
    norm's. ``cursor`` is None while documents are not told apart (``bos_id=None``)."""

    cursor: Cursor | None
    blocks: tuple[Any, ...]
    final_norm: Any


class LanguageModel(nn.Module):
    """Tokens to logits, with a state.

    ``logits, state = model(tokens, state=None, bos_id=None)``: tokens (B, L) int64, logits (B, L, V) float32 of the
    next token. ``bos_id`` starts a new document wherever it occurs (spec 7.1); None means one document. Passing the
    returned state continues the stream: any cut into calls gives the same logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for layer in range(config.num_layers):
            parts = config.parts(layer)
            self.blocks.append(KINDS["block"][parts.name("block")](parts.configs["block"], parts.shape, parts))
        self.final_norm = config.parts(config.num_layers - 1).build("norm")
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        init_matrix(self.embed.weight, "gaussian", config.dim)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        else:
            init_matrix(self.head.weight, "gaussian", config.dim)

    def features(self, tokens: Tensor, state: ModelState | None = None, bos_id: int | None = None,
                 ) -> tuple[Tensor, ModelState]:
        """Everything before the head: (B, L, D) in the activations' dtype, and the state."""
        self._check(tokens)
        documents = self._documents(tokens, state, bos_id)
        x = self.embed(tokens)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.dim)
        x = F.dropout(x, self.config.dropout, self.training)
        states = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[i]
            if self.config.checkpoint_blocks and torch.is_grad_enabled():
                x, after = torch.utils.checkpoint.checkpoint(block, x, documents, before, use_reentrant=False)
            else:
                x, after = block(x, documents, before)
            states.append(after)
        x, norm_state = self.final_norm(x, documents, None if state is None else state.final_norm)
        cursor = documents.cursor if documents is not None else None
        return x, ModelState(cursor, tuple(states), norm_state)

    def forward(self, tokens: Tensor, state: ModelState | None = None, bos_id: int | None = None,
                ) -> tuple[Tensor, ModelState]:
        x, state = self.features(tokens, state, bos_id)
        return self.head(x).float() if x.dtype != torch.float64 else self.head(x), state

    def num_parameters(self) -> int:
        """Trainable numbers, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def _documents(self, tokens: Tensor, state: ModelState | None, bos_id: int | None) -> Documents | None:
        cursor = None if state is None else state.cursor
        if bos_id is not None:
            return Documents.from_tokens(tokens, bos_id, cursor)
        if cursor is not None:  # the open document goes on, whatever the tokens are
            return Documents.from_bos(torch.zeros_like(tokens, dtype=torch.bool), cursor)
        return None

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 1 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64 (B, L) with L >= 1, got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would abort or need a sync
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens: id {high if high >= self.config.vocab_size else low} is outside the vocabulary "
                    f"0..{self.config.vocab_size - 1}; model.vocab_size must cover the tokenizer's"
                )
