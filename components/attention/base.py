"""What every attention here shares: rotary positions, a scale that the block has put into q, and DropKey.

Keys are rotated by their absolute position in the stream before they are buffered, so a state never turns them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import backend, ops
from ..documents import Documents
from ..registry import Shape
from ..rotary import tables
from . import packed
from .buffer import KeyValues


class Attention(nn.Module):
    """Causal softmax attention with weights softmax(q . k); a subclass says which keys a query sees.

    A subclass's state has an int field ``position``: tokens read so far, the same in all rows.
    """

    constant_state = True  # the state's size is bounded however long the stream is

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads = shape.num_heads if shape.num_rope_heads is None else shape.num_rope_heads
        if not 0 <= heads <= shape.num_heads:
            raise ValueError(
                f"model.num_rope_heads={heads}: must be null or from 0 to model.num_heads={shape.num_heads}"
            )
        if heads and shape.head_dim % 2:
            raise ValueError(
                f"model.z_dim={shape.z_dim}: rotary positions turn pairs, so z_dim / num_heads={shape.head_dim} must "
                "be even (or model.num_rope_heads=0)"
            )
        if heads and shape.rope_base <= 0:
            raise ValueError(f"model.rope_base={shape.rope_base}: must be positive")
        self.rope_heads, self.rope_base, self.head_dim = heads, shape.rope_base, shape.head_dim
        self.chunk, self.drop = shape.chunk_size, shape.attention_dropout

    def tables(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """cos, sin (L, S / 2) float32 for positions start .. start + length - 1; None, None without rotary heads."""
        if not self.rope_heads:
            return None, None
        return tables(start, length, self.head_dim, self.rope_base, device)

    def position(self, state: Any) -> int:
        """Tokens of the stream read before this call."""
        return 0 if state is None else int(state.position)

    def covered_chunks(self, chunk: int) -> int | None:
        """How many chunks back, the query's own included, every query sees without a gap; None: all of them."""
        raise NotImplementedError

    def first_visible(self, position: Tensor) -> Tensor:
        """The absolute position of the first key that the query at each ``position`` sees, documents aside."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: Any) -> tuple[Tensor, Any]:
        """q, k (B, L, H, S) already rotated and scaled, v (B, L, H, E) -> y (B, L, H, E) and the state."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, state: Any = None,
                *, scale: float = 1.0) -> tuple[Tensor, Any]:
        """Rotate q, times scale, and k, then attend."""
        if self.rope_heads:
            cos, sin = tables(self.position(state), q.shape[1], self.head_dim, self.rope_base, q.device)
            q, k = (ops.rotate(x, cos, sin, self.rope_heads, s) for x, s in ((q, scale), (k, 1.0)))
        elif scale != 1.0:
            q = q * scale
        return self.attend(q, k, v, documents, state)

    def flash(self, q: Tensor, keys: KeyValues) -> bool:
        """Whether `packed.attend` should serve this call; where it cannot on a GPU, say why."""
        if not q.is_cuda or backend.get_mode() == "reference" or q.shape[1] == 1:  # one query: one row of a mask
            return False
        reason = packed.unsupported(q, keys.v)
        if self.training and self.drop:
            reason = f"attention_dropout={self.drop:g} needs a mask"
        if reason is not None:
            backend.note(f"{type(self).__name__} under a mask", reason)
        return reason is None

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, causal: bool = False) -> Tensor:
        """softmax(q k^T) v for q (A, Q, H, S), k (A, K, H, S), v (A, K, H, E) -> (A, Q, H, E).

        visible (A or 1, 1, Q, K) bool; every query must see a key. None: all keys, or with ``causal`` (Q = K) the
        lower triangle. In training each query loses each key with probability ``attention_dropout``, the rest
        renormalise and a query without any yields 0 (DropKey, spec 4.3).
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        empty = None
        if self.training and self.drop:
            kept = torch.rand(q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device) >= self.drop
            if causal:
                kept = kept.tril()
            visible, causal = kept if visible is None else kept & visible, False
            empty = ~visible.any(-1, keepdim=True)
            visible = visible | empty  # a softmax over nothing would be NaN in the backward pass
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=1.0)
        if empty is not None:
            y = y.masked_fill(empty, 0.0)
        return y.transpose(1, 2)

    def probe(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: Any) -> dict[str, Tensor]:
        """entropy (H, Q): nats of the weights of the last Q <= 64 queries of the first row, for rotated q and k."""
        length = q.shape[1]
        time = torch.arange(length, device=q.device)
        queries = time[-64:]
        visible = (time <= queries[:, None]) & (time >= self.first_visible(queries)[:, None])
        if documents is not None:
            visible = visible & (documents.segments[0, queries, None] == documents.segments[0])
        scores = torch.einsum("qhs,khs->hqk", q[0, queries].float(), k[0].float())
        logs = scores.masked_fill(~visible, float("-inf")).log_softmax(-1)
        return {"entropy": -(logs.exp() * logs.masked_fill(~visible, 0.0)).sum(-1)}
