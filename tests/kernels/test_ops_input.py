"""A mistaken argument is answered with its name, its value and the rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gecko_lab.kernels import ops
from gecko_lab.kernels.types import NormState

X = torch.zeros(2, 5, 8)
W = torch.zeros(8)
Q = torch.zeros(2, 5, 2, 4)
V = torch.zeros(2, 5, 2, 6)
P = torch.zeros(8, 3)
NORM = {"groups": 4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-5}
MEMORY = ops.adaptive_working_memory(Q, Q, V, chunk=4)[1]
ATTENTION = ops.sliding_chunk_attention(Q, Q, V, chunk=4)[1]

MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "groups": (lambda: ops.timestep_decay_norm(X, W, W, **{**NORM, "groups": 3}), "groups is 3; .* divisor of D = 8"),
    "beta": (lambda: ops.timestep_decay_norm(X, W, W, **{**NORM, "beta2": 1.0}), "beta2 is 1.0; .* between 0 and 1"),
    "eps": (lambda: ops.timestep_norm(X, W, W, groups=4, eps=-1), "eps is -1; .* at least 0"),
    "rank": (lambda: ops.timestep_norm(X[0], W, W, groups=4, eps=0), r"x has shape \(5, 8\); .* \(B, L, D\)"),
    "empty": (lambda: ops.timestep_norm(X[:, :0], W, W, groups=4, eps=0), r"x has shape \(2, 0, 8\)"),
    "integer": (lambda: ops.timestep_norm(X.long(), W, W, groups=4, eps=0), "x has dtype torch.int64; .* floating"),
    "weight": (lambda: ops.timestep_norm(X, W[:4], W, groups=4, eps=0), r"weight has shape \(4\); .* \(D,\) = \(8\)"),
    "bos": (lambda: ops.complex_ema(X, P, P, P, bos=torch.zeros(2, 5)), "bos has dtype torch.float32; .* bool"),
    "bos size": (lambda: ops.complex_ema(X, P, P, P, bos=torch.zeros(2, 4).bool()), r"bos has shape \(2, 4\)"),
    "norm state": (
        lambda: ops.timestep_norm(X, W, W, groups=4, eps=0, state=NormState(W[:2].long(), W[:2], W[:2])),
        r"state.mean has shape \(2\); .* \(2, 4\)",
    ),
    "gamma": (lambda: ops.complex_ema(X, P, P, P.cfloat()), "gamma has dtype torch.complex64; .* if and only if q is"),
    "modes": (lambda: ops.complex_ema(X, P, P[:, :2], P), r"q has shape \(8, 2\); .* \(D, N\) = \(8, 3\)"),
    "ema state": (lambda: ops.complex_ema(X, P, P, P, state=P), r"state has shape \(8, 3\); .* \(2, 8, 3\)"),
    "row groups": (lambda: ops.rms_norm(X, groups=0), "groups is 0; .* positive divisor"),
    "row weight": (lambda: ops.layer_norm(X, W[:3]), r"weight has shape \(3\)"),
    "heads": (lambda: ops.z_views(X, P.T, P.T, heads=3), "heads is 3; .* divisor of Z = 8"),
    "cos": (lambda: ops.z_views(X, P.T, P.T, heads=2, rope_heads=1), "cos and sin are needed because rope_heads is 1"),
    "rope heads": (lambda: ops.rotate(Q, W, W, 3), "rope_heads is 3; .* between 0 and the number of heads, 2"),
    "gate": (lambda: ops.gate(X, X, X[:1]), r"far has shape \(1, 5, 8\)"),
    "swiglu": (lambda: ops.swiglu(X, X[:1]), r"b has shape \(1, 5, 8\)"),
    "chunk": (lambda: ops.sliding_chunk_attention(Q, Q, V, chunk=0), "chunk is 0; .* at least 1"),
    "keys": (lambda: ops.sliding_chunk_attention(Q, Q[:, :4], V, chunk=4), r"k has shape \(2, 4, 2, 4\)"),
    "dropout": (lambda: ops.sliding_chunk_attention(Q, Q, V, chunk=4, dropout=1.0), r"dropout is 1.0; .* \[0, 1\)"),
    "segments": (
        lambda: ops.sliding_chunk_attention(Q, Q, V, chunk=4, segments=torch.zeros(2, 5)),
        "segments has dtype torch.float32; .* int64",
    ),
    "attention state": (
        lambda: ops.sliding_chunk_attention(Q, Q, V, chunk=8, state=ATTENTION._replace(position=9)),
        r"state.k has shape \(2, 5, 2, 4\); .* \(2, 9, 2, 4\)",
    ),
    "lag": (lambda: ops.adaptive_working_memory(Q, Q, V, chunk=4, lag=0), "lag is 0; .* at least 1"),
    "lag of state": (
        lambda: ops.adaptive_working_memory(Q, Q, V, chunk=4, lag=1, state=MEMORY),
        "lag is 1; the state was made with lag 2",
    ),
    "table": (
        lambda: ops.adaptive_working_memory(Q, Q, V[..., :5], chunk=4, state=MEMORY),
        r"state.table has shape \(2, 2, 4, 6\); .* \(2, 2, 4, 5\)",
    ),
    "position": (
        lambda: ops.memory_state(MEMORY.table, MEMORY.logz, Q[:, :4], V[:, :4], position=3),
        "position is 3; .* multiple of the chunk, 4",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
