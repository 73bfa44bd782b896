"""What the blocks share: the state of a layer, and the refusal of parts that a block has no place for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..registry import Parts


class BlockState(NamedTuple):
    """The state of each part, by kind; None where a part has none."""

    norm: Any = None
    ema: Any = None
    attention: Any = None
    memory: Any = None
    feedforward: Any = None


def heads(x: Tensor, count: int) -> Tensor:
    """(B, L, H S) -> (B, L, H, S)."""
    return x.unflatten(-1, (count, -1))


def refuse(parts: Parts, block: str, *kinds: str) -> None:
    """Raise ValueError if one of these kinds is other than ``none``: a choice must never be silently ignored."""
    for kind in kinds:
        if parts.name(kind) != "none":
            raise ValueError(f"model/{kind}={parts.name(kind)}: must be none, block {block!r} has no place for it")
