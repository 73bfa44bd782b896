"""Where components are named: one registry a kind, filled by a decorator in the component's own file.

    @ATTENTION.register("chunk")
    class ChunkAttention(nn.Module):
        @dataclass
        class Config:
            name: str = "chunk"
            rope_base: float = option(10000.0, "base of the rotary frequencies")

        def __init__(self, config: Config, shape: Shape) -> None: ...
        def forward(self, q, k, v, documents=None, state=None): ...   # -> (y, state)

The lab publishes every ``Config`` to Hydra as ``model/KIND=NAME``; tests, docs and sweeps enumerate
the registries, so a new component is configurable, ablatable and tested as soon as it is registered.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


class UnknownComponent(ValueError):
    """A name that no component of this kind has; the message lists the nearest names."""


def option(default: Any, text: str) -> Any:
    """A documented field of a ``Config``: ``--help`` prints ``text`` beside the default."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def nearest(name: str, names: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest names, then all of them."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}Available: {', '.join(names)}."


@dataclass(frozen=True)
class Shape:
    """The sizes that the components of one layer share, and how their weights start.

    Letters used in the names of tensors: B batch, L sequence, D ``dim``, Z ``z_dim``, V ``value_dim``,
    H ``num_heads``, S = Z / H key features of a head, E = V / H value features of a head, F ``ffn_dim``,
    C ``chunk_size``, N ``ema_modes``, G ``norm_groups``. Sizes stand here and not in a component's ``Config`` so that
    a preset's sizes hold whatever component is swapped in.
    """

    dim: int
    z_dim: int
    value_dim: int
    num_heads: int
    ffn_dim: int
    chunk_size: int
    ema_modes: int = 16
    norm_groups: int = 8
    rope_base: float = 500_000.0
    num_rope_heads: int | None = None
    norm_eps: float = 1e-5
    norm_affine: bool = True
    init: str = "he"
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "z_dim", "value_dim", "num_heads", "ffn_dim", "chunk_size", "ema_modes", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("z_dim", "value_dim"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(
                    f"model.{name}={getattr(self, name)}: must be a multiple of model.num_heads={self.num_heads}"
                )
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be in [0, 1)")
        if self.norm_eps <= 0:
            raise ValueError(f"model.norm_eps={self.norm_eps}: must be positive")

    @property
    def head_dim(self) -> int:
        """S, features of one query or key head."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """E, features of one value head."""
        return self.value_dim // self.num_heads


class Registry:
    """The components of one kind, by name, in the order of registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. The class needs a nested dataclass ``Config`` whose ``name`` defaults to ``name``."""

        def add(cls: C) -> C:
            config = cls.__dict__.get("Config")
            if not dataclasses.is_dataclass(config):
                raise TypeError(f"{self.kind} {name!r}: {cls.__name__} needs a nested @dataclass Config")
            if getattr(config, "name", None) != name:
                raise TypeError(f"{self.kind} {name!r}: {cls.__name__}.Config.name must default to {name!r}")
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is already {known.__module__}.{known.__qualname__}")
            self._classes[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            raise UnknownComponent(f"unknown {self.kind} {name!r}. {nearest(str(name), self.names())}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def names(self) -> list[str]:
        return list(self._classes)


EMA = Registry("ema")
NORM = Registry("norm")
ATTENTION = Registry("attention")
MEMORY = Registry("memory")
FEEDFORWARD = Registry("feedforward")
BLOCK = Registry("block")

KINDS: dict[str, Registry] = {r.kind: r for r in (EMA, NORM, ATTENTION, MEMORY, FEEDFORWARD, BLOCK)}


class Parts:
    """What a block builds itself from: the chosen configuration of every kind, for one layer."""

    def __init__(self, configs: dict[str, Any], shape: Shape) -> None:
        self.configs, self.shape = configs, shape

    def name(self, kind: str) -> str:
        return str(self.configs[kind].name)

    def build(self, kind: str, **extra: Any) -> Any:
        """Make the chosen component of this kind; ``extra`` goes to its constructor."""
        config = self.configs[kind]
        return KINDS[kind][config.name](config, self.shape, **extra)
