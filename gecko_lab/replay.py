"""Repeats a step whose loss or gradient was NaN or infinite, from the dump that the run wrote, and says where it began.

``python -m gecko_lab.replay RUN/nonfinite-step-12.ckpt``
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import cli
from .components import state as states
from .errors import RunError
from .kernels import backend
from .lit import model_from_checkpoint
from .loss import mean_loss
from .model import LanguageModel
from .pieces import row_losses


@dataclass
class Report:
    """What a repeated step showed; ``forward`` and ``backward`` are in the order in which it happened."""

    step: int
    losses: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)
    norm: float = math.nan
    recorded_norm: float = math.nan
    weights: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether losses and gradient norm are the run's bit for bit (NaN equals NaN)."""
        pairs = [*zip(self.losses, self.recorded, strict=True), (self.norm, self.recorded_norm)]
        return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def replay(path: Path, device: str = "auto") -> Report:
    """Forward and backward of the dumped step, watched module by module. RunError: no dump, or no such device."""
    dump = checkpoints.load(path)
    if "nonfinite" not in dump:
        raise RunError(f"{path}: not a dump of a non-finite step (RUN/nonfinite-step-N.ckpt)")
    facts = dump["nonfinite"]
    place = facts["device"] if device == "auto" else device
    if place == "cuda" and not torch.cuda.is_available():
        raise RunError(f"{path}: the step ran on a GPU and there is none here; --device cpu repeats it approximately")
    model = model_from_checkpoint(dump).to(place).train()
    if facts["precision"] == "bf16-true":
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.to(torch.bfloat16)
    backend.set_mode(facts["kernels"])
    report = Report(facts["step"], recorded_norm=float(facts["gradient_norm"]))
    report.recorded = [float(x) for x in facts["losses"]]
    report.weights = [f"{n}: {_count(p)}" for n, p in model.named_parameters() if not p.isfinite().all()]
    state = _stream_state(model, dump["gecko_lab"]["stream_state"], facts["bos_id"], place)
    _watch(model, report)
    _set_rng(dump["gecko_lab"]["rng"], place)
    bf16 = torch.autocast(place, torch.bfloat16) if facts["precision"].startswith("bf16") else contextlib.nullcontext()
    for batch in facts["batches"]:
        scored = batch["scored"].to(place) if "scored" in batch else None
        with bf16:
            losses, after = row_losses(
                model, batch["tokens"].to(place), batch["targets"].to(place), state, facts["bos_id"],
                piece_len=facts["piece_len"], loss_chunk=facts["loss_chunk"], scored=scored,
            )
        state = states.detach(after) if facts["stream"] else None
        loss = mean_loss(losses, scored)
        report.losses.append(float(loss.detach()))
        (loss / len(facts["batches"])).backward()
    report.norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    return report


def _set_rng(saved: dict[str, Any], place: str) -> None:
    torch.set_rng_state(saved["torch"])
    if place == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])


def _stream_state(model: LanguageModel, leaves: list[Any] | None, bos_id: int | None, place: str) -> Any:
    if leaves is None:
        return None
    rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
    with torch.no_grad():
        _, like = model.features(torch.zeros(rows, 1, dtype=torch.int64, device=place), None, bos_id)
    return states.to(states.unflatten(leaves, like), place)


def _watch(model: nn.Module, report: Report) -> None:
    """Note every module whose output, or whose output's gradient, has a number that is not finite."""

    def forward(name: str, kind: str) -> Any:
        def note(found: list[str], x: Tensor) -> None:
            if not x.isfinite().all():
                found.append(f"{name} ({kind}): {_count(x)}")

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if isinstance(y, Tensor):
                note(report.forward, y)
                if y.requires_grad:
                    y.register_hook(lambda gradient: note(report.backward, gradient))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(forward(name or "model", type(module).__name__))


def _count(x: Tensor) -> str:
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {x.numel()} numbers, shape {tuple(x.shape)}"


def main() -> int:
    """Entry point of ``python -m gecko_lab.replay``."""
    parser = argparse.ArgumentParser(prog="python -m gecko_lab.replay", description=__doc__)
    parser.add_argument("dump", type=Path, help="RUN/nonfinite-step-N.ckpt")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: where the step ran")
    options = parser.parse_args()

    def command() -> int:
        report = replay(options.dump, options.device)
        print(f"step {report.step}: losses {report.losses}, gradient norm {report.norm:g}")
        print("the same as in the run, bit for bit" if report.same else
              f"in the run: losses {report.recorded}, gradient norm {report.recorded_norm:g}")
        for title, found in (("weights before the step", report.weights), ("outputs", report.forward),
                             ("gradients of outputs", report.backward)):
            print(f"{title} that are not finite, first to last: " + ("none" if not found else f"{len(found)}"))
            for line in found[:5]:
                print(f"    {line}")
        return 0

    return cli.guarded(command)


if __name__ == "__main__":
    sys.exit(main())
