"""What ``trainer.precision`` means, and the one precision that Lightning does not have in this form."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn


def resolve(precision: str, accelerator: str) -> str:
    """``auto`` as what it stands for here: bf16-mixed on a GPU, 32-true on a CPU; other names as they are."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if accelerator != "cpu" and torch.cuda.is_available() else "32-true"


class MatricesInBF16(MixedPrecision):
    """``bf16-true``: the matrices of linear layers and embeddings are stored in bfloat16, and so are the activations.

    What is small and moves by little stays float32, as every state does: norms, coefficients of moving averages, the
    affine views of z. A bfloat16 has 8 significant bits, so a step below 1/256 of a weight is rounded away.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.to(torch.bfloat16)
        return module


def trainer_options(precision: str, accelerator: str) -> tuple[Any, list[Any]]:
    """``precision`` and ``plugins`` of Lightning's Trainer."""
    name = resolve(precision, accelerator)
    if name == "bf16-true":
        return None, [MatricesInBF16("cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda")]
    return name, []
