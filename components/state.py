"""What one can do with a state, whatever the component: it is a tree of tensors and counters.

A component's state is a NamedTuple (or a tuple, dict, None) whose leaves are tensors with the batch first,
and Python integers that all rows share. So the five things a lab needs are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

S = TypeVar("S")


def map_tensors(function: Callable[[Tensor], Tensor], state: S) -> S:
    """The same tree with ``function`` applied to each tensor; counters and None stay."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state)


def detach(state: S) -> S:
    """Cut the graph: truncated back-propagation through time carries the value, not the gradient."""
    return map_tensors(lambda t: t.detach(), state)


def to(state: S, device: torch.device | str) -> S:
    """Move to a device; data types stay (state is float32 or wider by design)."""
    return map_tensors(lambda t: t.to(device), state)


def clone(state: S) -> S:
    return map_tensors(lambda t: t.clone(), state)


def rows(state: S, index: Any) -> S:
    """Keep some rows of the batch; ``index`` is a slice, a list or an int64 tensor."""
    return map_tensors(lambda t: t[index], state)


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def nbytes(state: Any) -> int:
    """Bytes that the stream costs at this point, over all rows."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def flatten(state: Any) -> tuple[list[Any], str]:
    """Leaves and a printable structure: what is written to disk (no pickle), and what is compared on reading."""
    leaves, spec = pytree.tree_flatten(state)
    return leaves, str(spec)


def unflatten(leaves: list[Any], like: S) -> S:
    """Put leaves back into the structure of ``like`` (a state of the same model)."""
    return pytree.tree_unflatten(leaves, pytree.tree_structure(like))
