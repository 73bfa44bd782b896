"""What the components say of themselves on one fixed batch: decay half-lives, carried statistics, entropies.

A component takes part by defining

    probe(*inputs, documents, state) -> dict[str, Tensor]

which is asked right after its call, with what it was called with and the state that it returned; an attention's inputs
are q, k (rotated), v. Each tensor is a population (of modes, groups, heads, ...) that is shown as a histogram and its
median. A component without ``probe`` is passed over, and so is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..model import LanguageModel
from .kinds import kind_of

ROWS = 2  # of the batch; enough for a population, and cheap
QUANTILES = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}


@torch.no_grad()
def gather(model: LanguageModel, tokens: Tensor, bos_id: int | None) -> dict[str, Tensor]:
    """KIND_NAME/layer_00 -> the population, float32 (.,), of every probe on tokens (B, L), without dropout."""
    found: dict[str, Tensor] = {}
    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in model.named_modules():
            kind = kind_of(module)
            if kind is not None and hasattr(module, "probe"):
                stack.enter_context(_listening(module, _keeper(module, kind, path, found)))
        model.features(tokens[:ROWS], None, bos_id)
    model.train(training)
    if isinstance(model, FSDPModule):
        model.reshard()  # no backward pass follows that would do it
    return found


def names(model: LanguageModel, device: torch.device, bos_id: int | None) -> list[str]:
    """KIND_NAME of every probe of the model, found by reading one token."""
    found = gather(model, torch.zeros(1, 1, dtype=torch.int64, device=device), bos_id)
    return sorted({name.split("/")[0] for name in found})


def summary(population: Tensor) -> dict[str, float]:
    """Quantiles of a population (.,): min, q10, median, q90, max."""
    ordered = population.double().sort().values
    last = len(ordered) - 1
    return {name: float(ordered[round(share * last)]) for name, share in QUANTILES.items()}


def _keeper(module: Any, kind: str, path: str, found: dict[str, Tensor]) -> Callable[..., None]:
    parts = path.split(".")
    layer = f"layer_{int(parts[1]):02}" if parts[0] == "blocks" else parts[0]

    def keep(*arguments: Any, after: Any) -> None:
        *inputs, documents, _ = arguments
        for name, value in module.probe(*inputs, documents, after).items():
            key = f"{kind}_{name}/{layer}"
            if key in found:  # a second component of this kind in the layer
                key += f".{parts[-1]}"
            found[key] = value.detach().float().flatten().cpu()

    return keep


@contextmanager
def _listening(module: nn.Module, keep: Callable[..., None]) -> Iterator[None]:
    """Calls ``keep`` with the arguments and the state after each call; a block may enter an attention by ``attend``,
    which passes no forward hook."""
    name = "attend" if hasattr(module, "attend") else "forward"
    call = getattr(module, name)

    def heard(*arguments: Any) -> Any:
        y, after = call(*arguments)
        keep(*arguments, after=after)
        return y, after

    module.__dict__[name] = heard
    try:
        yield
    finally:
        del module.__dict__[name]
