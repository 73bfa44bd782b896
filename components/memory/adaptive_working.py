"""Adaptive working memory (Gecko): a table per head that holds, compressed, what attention no longer sees (spec 5).

Whole chunks are folded into it, ``lag`` chunks late, so that attention and table together cover the past.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.types import MemoryState
from ..documents import Documents
from ..registry import MEMORY, Shape, option


@MEMORY.register("adaptive_working")
class AdaptiveWorkingMemory(nn.Module):
    """Reads softmax(aq)^T M, M (B, H, S, E) the table of the chunks up to c - lag for a token of chunk c."""

    views = 2  # of z: aq, ak

    @dataclass
    class Config:
        name: str = option("adaptive_working", "table of the chunks that attention no longer sees (Gecko)")
        lag: Optional[int] = option(None, "chunks before one enters the table; null: as many as attention sees")  # noqa: UP045
        allow_gap: bool = option(False, "accept a lag that leaves chunks seen by neither attention nor table")

    def __init__(self, config: Config, shape: Shape, *, covered: int | None = None) -> None:
        """covered: chunks that the attention beside it sees, the query's own included; None: all."""
        super().__init__()
        if config.lag is not None and config.lag < 1:
            raise ValueError(f"model.memory.lag={config.lag}: must be at least 1 (only complete chunks are folded)")
        self.chunk = shape.chunk_size
        following = 2 if covered is None else max(covered, 1)
        self.lag = following if config.lag is None else config.lag
        if covered is not None and self.lag > covered:
            message = (
                f"model.memory.lag={self.lag}: the attention beside it covers {covered} whole chunk(s), the own "
                "one included, so part of the past would be seen neither by it nor by the table"
            )
            if not config.allow_gap:
                raise ValueError(f"{message}; widen the attention, lower the lag or set model.memory.allow_gap=true")
            warnings.warn(message, stacklevel=2)

    def probe(self, aq: Tensor, ak: Tensor, v: Tensor, documents: Documents | None, state: MemoryState,
              ) -> dict[str, Tensor]:
        """table_norm (B, H): Frobenius; write_share (., H, S): rho of each whole chunk that joins a table which is not
        empty; read_entropy (B, L, H): nats of softmax(aq)."""
        logs = aq.float().log_softmax(-1)
        return {
            "table_norm": state.table.flatten(2).norm(dim=-1),
            "write_share": self._write_shares(ak, documents),
            "read_entropy": -(logs.exp() * logs).sum(-1),
        }

    def _write_shares(self, ak: Tensor, documents: Documents | None) -> Tensor:
        """rho = exp(lam - logaddexp(lam, ell)) of the chunks of this call (spec 5.2), as if it began the stream."""
        grid = ak.shape[1] // self.chunk, self.chunk
        whole = grid[0] * grid[1]
        keys = ak[:, :whole].float().unflatten(1, grid)
        segments = torch.zeros_like(ak[..., 0, 0], dtype=torch.int64) if documents is None else documents.segments
        segments = segments[:, :whole].unflatten(1, grid)
        ends = segments[..., -1]
        lam = keys.masked_fill((segments != ends[..., None])[..., None, None], float("-inf")).logsumexp(2)
        shares, total = [keys.new_zeros(0, *ak.shape[2:])], lam[:, :1].squeeze(1)
        for c in range(1, lam.shape[1]):
            joins = ends[:, c] == ends[:, c - 1]
            total = torch.logaddexp(lam[:, c], total.masked_fill(~joins[:, None, None], float("-inf")))
            shares.append((lam[:, c] - total).exp()[joins])
        return torch.cat(shares)

    def forward(self, aq: Tensor, ak: Tensor, v: Tensor, documents: Documents | None = None, state: Any = None,
                ) -> tuple[Tensor, Any]:
        """aq, ak (B, L, H, S), v (B, L, H, E) -> y (B, L, H, E) and the state."""
        segments = None if documents is None else documents.segments
        return ops.adaptive_working_memory(aq, ak, v, chunk=self.chunk, segments=segments, state=state, lag=self.lag)
