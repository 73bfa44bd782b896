"""Cross entropy of a large vocabulary without ever holding all logits.

The head's product and the softmax go over ``chunk`` positions at a time, forward and backward; what is saved is the
features. One extra head product in the backward pass buys B * L * V * 4 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.chunk = chunk
        w = weight.to(x.dtype)
        losses = [
            F.cross_entropy(_wide(part @ w.T), goal, reduction="none")
            for part, goal in zip(x.split(chunk), targets.split(chunk))
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, targets = ctx.saved_tensors
        w = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, len(x), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            p = torch.softmax(_wide(x[span] @ w.T), dim=-1)
            p[torch.arange(len(p), device=p.device), targets[span]] -= 1
            p = (p * grads[0][span, None]).to(x.dtype)
            dx[span] = p @ w
            dw += p.T @ x[span]
        return dx, dw.to(weight.dtype), None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(
    features: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096, scored: Tensor | None = None
) -> Tensor:
    """Cross entropy of each token in nats: features (B, L, D), weight (V, D), targets (B, L) -> (B, L) float32.

    ``chunk`` positions have their logits in memory at once; 0 means all of them. Where ``scored`` (B, L) bool is false
    no logits are made and the loss is 0.
    """
    batch, length, dim = features.shape
    if scored is not None:
        index = scored.flatten().nonzero().squeeze(1)
        kept = features.reshape(-1, dim).index_select(0, index)[None]
        losses = token_losses(kept, weight, targets.flatten()[index][None], chunk)[0]
        return losses.new_zeros(batch * length).index_copy(0, index, losses).view(batch, length)
    device = features.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has no autocast
        features = features.to(torch.get_autocast_dtype(device))
    flat, goal = features.reshape(-1, dim), targets.reshape(-1)
    if chunk == 0 or chunk >= len(flat):
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            losses = F.cross_entropy(_wide(flat @ weight.to(flat.dtype).T), goal, reduction="none")
    else:
        losses = _LinearCrossEntropy.apply(flat, weight, goal, chunk)
    return losses.view(batch, length)


def losses_and_hits(
    features: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096, scored: Tensor | None = None
) -> Tensor:
    """(B, L, 2): the losses of ``token_losses``, and 1 where the likeliest token is the target, else 0."""
    losses = token_losses(features, weight, targets, chunk, scored)
    hits = torch.zeros_like(losses).flatten()
    index = torch.arange(len(hits), device=hits.device) if scored is None else scored.flatten().nonzero().squeeze(1)
    flat, goal = features.reshape(-1, features.shape[-1]), targets.flatten()
    for part in index.split(chunk or max(1, len(index))):
        hits[part] = ((flat[part] @ weight.to(flat.dtype).T).argmax(-1) == goal[part]).to(hits.dtype)
    return torch.stack([losses, hits.view_as(losses)], -1)


def mean_loss(losses: Tensor, scored: Tensor | None = None) -> Tensor:
    """Mean over the targets (B, L), or over those that are scored."""
    return losses.mean() if scored is None else losses.sum() / scored.sum()
