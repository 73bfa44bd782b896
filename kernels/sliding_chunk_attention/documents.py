"""Documents as row ranges: since segments never decrease along a row, one index a token says it all."""

import torch
from torch import Tensor


def document_starts(segments: Tensor) -> Tensor:
    """From segments (B, T), never decreasing: the index of the first token of each token's document, int32."""
    steps = torch.arange(segments.shape[1], device=segments.device)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(new, steps, 0).cummax(1).values.to(torch.int32).contiguous()
