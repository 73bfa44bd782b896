"""AdamW with parameter groups, and warm-up followed by a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the matrices of linear layers and embeddings decay; norms, biases, the affine views of z and the
    coefficients of moving averages do not (zero is no natural value for them)."""
    decays = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)
    }
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if id(p) in decays]
    others = [p for _, p in named if id(p) not in decays]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Learning rate at this optimiser step as a share of the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: OptimConfig, max_steps: int) -> dict[str, Any]:
    """What ``LightningModule.configure_optimizers`` returns."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: schedule(
            step, warmup_steps=config.warmup_steps, max_steps=max_steps, min_lr_ratio=config.min_lr_ratio
        ),
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
