"""The operations of the lab, checked and documented; ``backend`` decides what runs.

Letters: B batch, L time, D model width, G norm groups, N modes, H heads, S key and E value features of a head,
Z = H S, C chunk. All take any L >= 1 and are differentiable in every floating-point argument, states included.
Activations are float64, float32 or bfloat16; statistics and states are float32, or float64 for float64 activations.
Cutting a sequence into pieces and carrying the state gives the result of the whole.
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .adaptive_working_memory import reference as _adaptive_working_memory
from .adaptive_working_memory.reference import state_from_chunk as memory_state
from .backend import dispatch
from .complex_ema import reference as _complex_ema
from .cross_entropy import reference as _cross_entropy
from .gates import reference as _gates
from .row_norm import reference as _row_norm
from .sliding_chunk_attention import reference as _sliding_chunk_attention
from .timestep_decay_norm import reference as _timestep_decay_norm
from .timestep_norm import reference as _timestep_norm
from .types import AttentionState, MemoryState, NormState
from .z_views import reference as _z_views

__all__ = [
    "adaptive_working_memory",
    "complex_ema",
    "cross_entropy",
    "cross_entropy_gradient",
    "gate",
    "layer_norm",
    "memory_state",
    "rms_norm",
    "rotate",
    "silu",
    "sliding_chunk_attention",
    "swiglu",
    "timestep_decay_norm",
    "timestep_norm",
    "z_views",
]


def timestep_decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    beta1: float,
    beta2: float,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    """Normalise x (B, L, D) by bias-corrected moving averages over time of its group means and variances (spec 1.2).

    weight, bias (D,), weight used as 1 + weight; bos (B, L) bool, True where a document begins and the statistics
    restart. Returns y like x and the state; its mean and var are the decayed sums before bias correction.
    Raises ValueError for sizes that do not fit, groups that do not divide D, betas outside (0, 1).
    """
    checks.norm(x, weight, bias, groups, eps, bos, state)
    checks.fraction("beta1", beta1)
    checks.fraction("beta2", beta2)
    return dispatch(
        "timestep_decay_norm",
        _timestep_decay_norm.timestep_decay_norm,
        x,
        weight,
        bias,
        groups=groups,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        bos=bos,
        state=state,
    )


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    bos: Tensor | None = None,
    state: NormState | None = None,
) -> tuple[Tensor, NormState]:
    """Normalise x (B, L, D) by the mean and variance of all group features so far, each step equal (spec 1.1).

    weight, bias (D,), weight used as 1 + weight. bos (B, L) bool restarts the statistics where a document begins;
    None, as in Megalodon, never does. Returns y like x and the state, whose mean and var are moments.
    Raises ValueError for sizes that do not fit or groups that do not divide D.
    """
    checks.norm(x, weight, bias, groups, eps, bos, state)
    return dispatch(
        "timestep_norm", _timestep_norm.timestep_norm, x, weight, bias, groups=groups, eps=eps, bos=bos, state=state
    )


def complex_ema(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, *, bos: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = q h_(t-1) + p x_t for N modes of each feature, y_t = x_t + Re sum_n gamma h_t (spec 3.2).

    x (B, L, D); p (D, N) real; q, gamma (D, N), both complex or both real (the real EMA); bos (B, L) bool: h restarts
    from zero there; state h (B, D, N). Returns y like x, the skip added before rounding, and h: complex64
    (complex128 for float64 x), or real when q is. Raises ValueError for sizes or types that do not fit.
    """
    checks.shape("x", x, (None, None, None), "(B, L, D)")
    checks.real("x", x)
    batch, length, dim = x.shape
    checks.shape("p", p, (dim, None), "(D, N)")
    checks.real("p", p)
    modes = p.shape[1]
    checks.shape("q", q, (dim, modes), "(D, N)")
    checks.shape("gamma", gamma, (dim, modes), "(D, N)")
    if q.is_complex() != gamma.is_complex():
        raise ValueError(f"gamma has dtype {gamma.dtype}; it must be complex if and only if q is ({q.dtype})")
    checks.mask("bos", bos, batch, length)
    if state is not None:
        checks.shape("state", state, (batch, dim, modes), "(B, D, N)")
        if state.is_complex() and not q.is_complex():
            raise ValueError(f"state has dtype {state.dtype}; it must be real because q is ({q.dtype})")
    return dispatch("complex_ema", _complex_ema.complex_ema, x, p, q, gamma, bos=bos, state=state)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """x (..., D) over the root of the mean square of each of ``groups`` slices of its features (spec 2.1).

    weight (D,) used as 1 + weight. Returns y like x. Raises ValueError for sizes that do not fit.
    """
    checks.row_norm(x, weight, None, groups, eps)
    return dispatch("row_norm", _row_norm.rms_norm, x, weight, groups=groups, eps=eps)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int = 1, eps: float = 1e-5
) -> Tensor:
    """x (..., D) less the mean, over the standard deviation, of each of ``groups`` slices of its features (spec 2.2).

    weight, bias (D,), weight used as 1 + weight. Returns y like x. Raises ValueError for sizes that do not fit.
    """
    checks.row_norm(x, weight, bias, groups, eps)
    return dispatch("row_norm", _row_norm.layer_norm, x, weight, bias, groups=groups, eps=eps)


def z_views(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    rope_heads: int = 0,
    eps: float = 1e-5,
    rotated: int = 2,
) -> tuple[Tensor, ...]:
    """R views (B, L, H, S) of z (B, L, Z), RMS-normalised by head: z (1 + gamma_i) / sqrt(S) + beta_i (spec 6.1).

    gamma, beta (R, Z). The first ``rotated`` views are turned on their first ``rope_heads`` heads by the angles whose
    cos, sin (L, S/2) are given, in interleaved pairs (spec 4.1). Returns a tuple of R tensors of z's dtype.
    Raises ValueError for sizes that do not fit, and for rope_heads > 0 without cos and sin.
    """
    checks.shape("z", z, (None, None, None), "(B, L, Z)")
    checks.real("z", z)
    _, length, width = z.shape
    checks.divides("heads", heads, "Z", width)
    checks.shape("gamma", gamma, (None, width), "(R, Z)")
    checks.shape("beta", beta, (gamma.shape[0], width), "(R, Z)")
    if rope_heads and rotated:
        checks.rope(cos, sin, length, width // heads, heads, rope_heads)
    return dispatch(
        "z_views",
        _z_views.z_views,
        z,
        gamma,
        beta,
        cos,
        sin,
        heads=heads,
        rope_heads=rope_heads,
        eps=eps,
        rotated=rotated,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope_heads: int, scale: float = 1.0) -> Tensor:
    """Turn the pairs (2j, 2j+1) of x (B, L, H, S) counter-clockwise on the first ``rope_heads`` heads (spec 4.1).

    cos, sin (L, S/2) float32 of the angles; all heads are multiplied by scale. Returns y like x. Raises ValueError for
    sizes that do not fit.
    """
    checks.shape("x", x, (None, None, None, None), "(B, L, H, S)")
    checks.rope(cos, sin, x.shape[1], x.shape[3], x.shape[2], rope_heads)
    return dispatch("z_views", _z_views.rotate, x, cos, sin, rope_heads, scale)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), elementwise."""
    return dispatch("gates", _gates.silu, x)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b, elementwise on equal shapes (spec 6.2). Returns a's dtype. Raises ValueError for unequal shapes."""
    checks.shape("b", b, tuple(a.shape), "the shape of a")
    return dispatch("gates", _gates.swiglu, a, b)


def gate(near: Tensor, r: Tensor, far: Tensor | None = None) -> Tensor:
    """near silu(r) + far, elementwise on equal shapes: the gate of the attention and the ungated memory (spec 6.1).

    Returns near's dtype. Raises ValueError for unequal shapes.
    """
    checks.shape("r", r, tuple(near.shape), "the shape of near")
    if far is not None:
        checks.shape("far", far, tuple(near.shape), "the shape of near")
    return dispatch("gates", _gates.gate, near, r, far)


def sliding_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: AttentionState | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, AttentionState]:
    """Softmax attention of each query over the keys before it in its own and the previous chunk (spec 4.2).

    q, k (B, L, H, S) rotated and scaled, v (B, L, H, E); chunks of ``chunk`` tokens lie on the grid of absolute
    positions. segments (B, L) int64: only keys of the query's document are seen; None continues the open document.
    dropout drops single (query, key) logits (DropKey, spec 4.3). Returns y (B, L, H, E) in v's dtype and the state,
    at most 2C keys and values in their dtype. Raises ValueError for sizes that do not fit, dropout outside [0, 1).
    """
    checks.heads("q k", q, k, v, chunk, segments)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if state is not None:
        held = state.position - chunk * max(state.position // chunk - 1, 0)
        batch, _, heads, features = q.shape
        checks.shape("state.k", state.k, (batch, held, heads, features), "(B, M, H, S)")
        checks.shape("state.v", state.v, (batch, held, heads, v.shape[3]), "(B, M, H, E)")
        checks.ids("state.segments", state.segments, batch, held)
    return dispatch(
        "sliding_chunk_attention",
        _sliding_chunk_attention.sliding_chunk_attention,
        q,
        k,
        v,
        chunk=chunk,
        segments=segments,
        state=state,
        dropout=dropout,
    )


def adaptive_working_memory(
    aq: Tensor,
    ak: Tensor,
    v: Tensor,
    *,
    chunk: int,
    segments: Tensor | None = None,
    state: MemoryState | None = None,
    lag: int = 2,
) -> tuple[Tensor, MemoryState]:
    """Read a table of S rows that chunks are folded into, ``lag`` chunks after they began (spec 5.3).

    aq, ak (B, L, H, S), v (B, L, H, E). A token of chunk c reads softmax(aq)^T M, M holding the chunks up to c - lag of
    the document that chunk c - lag ends in; 0 for tokens of other documents. lag 2 tiles the past beside attention over
    two chunks, lag 1 beside attention over the own chunk. segments (B, L) int64 never decreasing; None continues the
    open document. Returns y (B, L, H, E) in v's dtype and the state, float32 or wider, of constant size;
    ``memory_state`` makes one from a table. Raises ValueError for sizes, or a lag, that do not fit.
    """
    checks.heads("aq ak", aq, ak, v, chunk, segments)
    checks.at_least("lag", lag, 1)
    if state is not None:
        batch, _, heads, features = aq.shape
        if state.lam.shape[1] != lag:
            raise ValueError(f"lag is {lag}; the state was made with lag {state.lam.shape[1]}, and they must be equal")
        checks.shape("state.table", state.table, (batch, heads, features, v.shape[3]), "(B, H, S, E)")
    return dispatch(
        "adaptive_working_memory",
        _adaptive_working_memory.adaptive_working_memory,
        aq,
        ak,
        v,
        chunk=chunk,
        segments=segments,
        state=state,
        lag=lag,
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """losses (R,) = lse - logits[target] and lse (R,), the log-sum-exp, of each row of logits (R, V); in nats.

    targets (R,) int64. Both results are float32 (float64 for float64 logits); no gradient flows through them, see
    ``cross_entropy_gradient``. Raises ValueError for sizes that do not fit.
    """
    checks.shape("logits", logits, (None, None), "(R, V)")
    checks.shape("targets", targets, (len(logits),), "(R,)")
    return dispatch("cross_entropy", _cross_entropy.cross_entropy, logits, targets)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor) -> Tensor:
    """logits (R, V) overwritten by their gradient, (exp(logits - lse) - [column is the target]) dlosses, and returned.

    targets, lse and dlosses (R,), lse from ``cross_entropy``. Raises ValueError for sizes that do not fit.
    """
    checks.shape("logits", logits, (None, None), "(R, V)")
    for name, x in (("targets", targets), ("lse", lse), ("dlosses", dlosses)):
        checks.shape(name, x, (len(logits),), "(R,)")
    return dispatch("cross_entropy", _cross_entropy.cross_entropy_gradient, logits, targets, lse, dlosses)
