"""Cross entropy of a large vocabulary without ever holding all logits.

The head's product and the softmax go over ``chunk`` positions at a time, forward and backward; what is saved is the
features and a number a position. One extra head product in the backward pass buys B * L * V * 2 bytes (4 in float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import ops
from .kernels.linear import accumulate


class _LinearCrossEntropy(torch.autograd.Function):
    """One chunk keeps its logits, in the dtype of x, for the backward pass; of several each is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        w, found = weight.to(x.dtype), []
        logits = x.new_empty(min(chunk, len(x)), len(w))
        for part, goal in zip(x.split(chunk), targets.split(chunk)):
            torch.mm(part, w.T, out=logits[: len(part)])
            found.append(ops.cross_entropy(logits[: len(part)], goal))
        losses, lse = (torch.cat(parts) for parts in zip(*found))
        ctx.chunk, ctx.kept = chunk, chunk >= len(x)
        ctx.save_for_backward(x, weight, targets, lse, logits if ctx.kept else None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, targets, lse, kept = ctx.saved_tensors
        w, dx = weight.to(x.dtype), torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        logits = kept if ctx.kept else x.new_empty(ctx.chunk, len(w))
        for start in range(0, len(x), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            part = logits[: len(x[span])]
            if not ctx.kept:
                torch.mm(x[span], w.T, out=part)
            ops.cross_entropy_gradient(part, targets[span], lse[span], grads[0][span])
            torch.mm(part, w, out=dx[span])
            accumulate(dw, part.T, x[span])
        ctx.kept = False  # the kept logits are the gradient now: another backward pass makes them again
        return dx, dw.to(weight.dtype), None, None


def token_losses(
    features: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096, scored: Tensor | None = None
) -> Tensor:
    """Cross entropy of each token in nats: features (B, L, D), weight (V, D), targets (B, L) -> (B, L) float32.

    ``chunk`` positions have their logits in memory at once; 0 means all of them, kept for the backward pass. Where
    ``scored`` (B, L) bool is false no logits are made and the loss is 0.
    """
    batch, length, dim = features.shape
    if scored is not None:
        index = scored.flatten().nonzero().squeeze(1)
        kept = features.reshape(-1, dim).index_select(0, index)[None]
        found = token_losses(kept, weight, targets.flatten()[index][None], chunk)[0]
        return found.new_zeros(batch * length).index_copy(0, index, found).view(batch, length)
    device = features.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has no autocast
        features = features.to(torch.get_autocast_dtype(device))
    flat, goal = features.reshape(-1, dim), targets.reshape(-1)
    if not len(flat):
        return features.float().sum(-1)
    losses: Tensor = _LinearCrossEntropy.apply(flat, weight, goal, chunk or len(flat))
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
