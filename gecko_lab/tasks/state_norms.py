"""How large the numbers in a state are, by layer and part: a state that keeps its scale can be carried for ever."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..model import ModelState
from .figures import Line, lines

RECENT = ("attention.", "memory.lam", "memory.mix", "memory.target")  # of the last tokens only: not drawn
ABSENT = -1e29  # a logarithm that stands for "nothing was written yet"


def of(state: ModelState, context: int) -> list[dict[str, Any]]:
    """One entry a floating tensor of the state: context, layer (-1: the final norm), part such as ``memory.table``, and
    the root mean square of its numbers over all rows."""
    found = []
    layers = [*enumerate(state.blocks), (-1, {"norm": state.final_norm})]
    for layer, block in layers:
        for path, leaf in pytree.tree_flatten_with_path(block)[0]:
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                size = leaf.detach().abs().float()
                if not leaf.is_complex():
                    size = size[leaf > ABSENT]
                name = pytree.keystr(path).replace("['", ".").replace("']", "").strip(".")
                rms = float(size.square().mean().sqrt()) if size.numel() else 0.0
                found.append({"context": context, "layer": layer, "part": name, "rms": rms})
    return found


def figure(rows: list[dict[str, Any]]) -> str:
    """One curve a part that holds the whole past: the mean over the layers."""
    parts = list(dict.fromkeys(r["part"] for r in rows if r["layer"] >= 0 and not r["part"].startswith(RECENT)))
    curves = []
    for part in parts:
        by_context: dict[int, list[float]] = {}
        for r in rows:
            if r["part"] == part and r["layer"] >= 0:
                by_context.setdefault(r["context"], []).append(r["rms"])
        curves.append(Line(part, [(c, sum(v) / len(v)) for c, v in by_context.items()]))
    return lines("The state along the way", curves, "context length, tokens", "root mean square, mean over layers",
                 log_y=True)  # fmt: skip
