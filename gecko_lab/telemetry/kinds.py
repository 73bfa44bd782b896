"""Norms of weights and gradients by component kind: which part of the model moves, and which one blows up."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from ..components import KINDS
from ..model import LanguageModel


def kind_of(module: nn.Module) -> str | None:
    """The kind under which this module's class is registered (ema, norm, ...); None if it is no component."""
    for kind, registry in KINDS.items():
        if any(isinstance(module, registry[name]) for name in registry):
            return kind
    return None


def parameters_by_kind(model: LanguageModel) -> dict[str, list[nn.Parameter]]:
    """Each parameter under the innermost component that holds it. ``block``: the matrices between the parts (queries,
    keys, values, gates, output); ``embedding`` and ``head`` beside the kinds (a tied head has none of its own)."""
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    seen: set[nn.Parameter] = set()

    def visit(module: nn.Module, kind: str) -> None:
        kind = kind_of(module) or kind
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found[kind].append(parameter)
        for child in module.children():
            visit(child, kind)

    visit(model.embed, "embedding")
    visit(model.head, "head")
    visit(model.blocks, "block")
    visit(model.final_norm, "norm")
    return dict(found)


def total_norm(tensors: list[Tensor]) -> float:
    """Euclidean norm of all numbers in the tensors, sharded ones too."""
    norm = torch.nn.utils.get_total_norm([t.detach() for t in tensors])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def weight_norms(model: LanguageModel) -> dict[str, float]:
    """weight/KIND."""
    return {f"weight/{kind}": total_norm(list(group)) for kind, group in parameters_by_kind(model).items()}


def gradient_norms(model: LanguageModel) -> dict[str, float]:
    """gradient/KIND, of the gradients as they stand; kinds without any are left out."""
    groups = {kind: [p.grad for p in group if p.grad is not None] for kind, group in parameters_by_kind(model).items()}
    return {f"gradient/{kind}": total_norm(group) for kind, group in groups.items() if group}
