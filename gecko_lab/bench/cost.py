"""What each case must move and multiply at least: bytes of device memory, and operations of its matrix products.

Every function returns (forward, backward) of the whole input. Tensors that fit in registers (weights of norms, modes,
states) are left out; so are vector operations, which have no ceiling here. ``e`` is the bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .sizes import Size, packed

Pair = tuple[int, int]
Cost = Callable[[Size, int], Pair]


def norm_bytes(s: Size, e: int) -> Pair:
    """x -> y; x, dy -> dx. Also the moving average: one read and one write of (B, L, D)."""
    return 2 * s.tokens * s.dim * e, 3 * s.tokens * s.dim * e


def two_norm_bytes(s: Size, e: int) -> Pair:
    """The two row norms of a block."""
    forward, backward = norm_bytes(s, e)
    return 2 * forward, 2 * backward


def gates_bytes(s: Size, e: int) -> Pair:
    """silu of v, the gate of the attention, and the feed-forward's, which backward also writes its value again."""
    (near, dnear), (wide, dwide) = gate_bytes(s, e), swiglu_bytes(s, e)
    silu = s.tokens * s.value_dim * e
    return near + wide + 2 * silu, dnear + dwide + s.tokens * s.ffn_dim * e + 3 * silu


def view_bytes(s: Size, e: int) -> Pair:
    """z, angles -> four views; four gradients, z, angles -> dz."""
    angles = s.length * s.head_dim * 4
    return 5 * s.tokens * s.z_dim * e + angles, 6 * s.tokens * s.z_dim * e + angles


def gate_bytes(s: Size, e: int) -> Pair:
    """near, r, far -> y; dy, near, r -> dnear, dr (dfar is dy)."""
    return 4 * s.tokens * s.value_dim * e, 5 * s.tokens * s.value_dim * e


def swiglu_bytes(s: Size, e: int) -> Pair:
    """a, b -> y; dy, a, b -> da, db."""
    return 3 * s.tokens * s.ffn_dim * e, 5 * s.tokens * s.ffn_dim * e


def attention_bytes(s: Size, e: int) -> Pair:
    """q, k, v -> y; q, k, v, dy -> dq, dk, dv. The same for attention and memory."""
    return 2 * s.tokens * (s.z_dim + s.value_dim) * e, s.tokens * (4 * s.z_dim + 3 * s.value_dim) * e


def visible_pairs(length: int, chunk: int) -> int:
    """(query, key) pairs of sliding chunk attention over one sequence: own chunk causally, all of the previous one."""
    whole, rest = divmod(length, chunk)
    own = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    return own + chunk * (max(whole - 1, 0) * chunk + (rest if whole else 0))


def attention_flops(s: Size, e: int) -> Pair:
    """qk, pv; backward recomputes qk and has dp, dv, dq, dk."""
    pairs = s.batch * s.heads * visible_pairs(s.length, s.chunk)
    return 2 * pairs * (s.head_dim + s.value_head_dim), 2 * pairs * (3 * s.head_dim + 2 * s.value_head_dim)


def memory_flops(s: Size, e: int) -> Pair:
    """Sums over a chunk of k k and k v, a chain of (S, S) (S, E) products over chunks, the read of every query."""
    read = 2 * s.tokens * s.heads * s.head_dim * s.value_head_dim
    mix = 2 * s.tokens * s.heads * s.head_dim**2
    chain = 2 * s.batch * s.heads * (s.length // s.chunk) * s.head_dim**2 * s.value_head_dim
    return 2 * read + mix + chain, 4 * read + 2 * mix + 2 * chain


def baseline_bytes(s: Size, e: int) -> Pair:
    """q, k, v -> y; q, k, v, y, dy -> dq, dk, dv, all as wide as the model."""
    return 4 * s.tokens * s.dim * e, 8 * s.tokens * s.dim * e


def _baseline_flops(s: Size, pairs: int) -> Pair:
    return 4 * s.batch * pairs * s.dim, 10 * s.batch * pairs * s.dim


def _runs(length: int, run: int) -> list[int]:
    return [min(run, length - at) for at in range(0, length, run)]


def full_flops(s: Size, e: int) -> Pair:
    """(query, key) pairs of each document."""
    return _baseline_flops(s, sum(n * (n + 1) // 2 for n in _runs(s.length, packed(s))))


def window_flops(s: Size, e: int) -> Pair:
    """The window is two chunks, more than a document."""
    return full_flops(s, e)


def chunk_flops(s: Size, e: int) -> Pair:
    """Pairs within both the document and the chunk."""
    cuts = sorted({*range(0, s.length, s.chunk), *range(0, s.length, packed(s)), s.length})
    return _baseline_flops(s, sum(n * (n + 1) // 2 for n in (b - a for a, b in pairwise(cuts))))


def gecko_weights(s: Size) -> int:
    """Numbers in the matrices of a block: v, r, output of E; z; the residual path of D; the feed-forward."""
    return s.dim * (3 * s.value_dim + s.z_dim + s.dim + 3 * s.ffn_dim)


def llama_weights(s: Size) -> int:
    """Numbers in the matrices of a Llama block: q, k, v, o and the feed-forward."""
    return s.dim * (4 * s.dim + 3 * s.llama_ffn_dim)


def gecko_block_flops(s: Size, e: int) -> Pair:
    """Matrix products (backward has two of each), attention and memory."""
    linear = 2 * s.tokens * gecko_weights(s)
    (near, dnear), (far, dfar) = attention_flops(s, e), memory_flops(s, e)
    return linear + near + far, 2 * linear + dnear + dfar


def llama_block_flops(s: Size, e: int) -> Pair:
    """Matrix products and causal attention over the whole sequence."""
    linear, pairs = 2 * s.tokens * llama_weights(s), s.batch * s.length * (s.length + 1) // 2
    return linear + 4 * pairs * s.dim, 2 * linear + 10 * pairs * s.dim


def gecko_block_bytes(s: Size, e: int) -> Pair:
    """x -> y and the weights; backward x, dy -> dx, the weights and their gradients."""
    ends, weights = s.tokens * s.dim * e, gecko_weights(s) * e
    return 2 * ends + weights, 3 * ends + 2 * weights


def llama_block_bytes(s: Size, e: int) -> Pair:
    """As for the Gecko block."""
    ends, weights = s.tokens * s.dim * e, llama_weights(s) * e
    return 2 * ends + weights, 3 * ends + 2 * weights


def with_head(s: Size, block: Pair, head: int) -> Pair:
    """A model of ``s.layers`` blocks and a head."""
    return s.layers * block[0] + head, s.layers * block[1] + 2 * head


def gecko_model_flops(s: Size, e: int) -> Pair:
    return with_head(s, gecko_block_flops(s, e), 2 * s.tokens * s.dim * s.vocab_size)


def gecko_model_bytes(s: Size, e: int) -> Pair:
    return with_head(s, gecko_block_bytes(s, e), s.dim * s.vocab_size * e)


def llama_model_flops(s: Size, e: int) -> Pair:
    return with_head(s, llama_block_flops(s, e), 2 * s.tokens * s.dim * s.vocab_size)


def llama_model_bytes(s: Size, e: int) -> Pair:
    return with_head(s, llama_block_bytes(s, e), s.dim * s.vocab_size * e)


def decode_bytes(s: Size, e: int) -> Pair:
    """One token a row after ``length``: every weight once; a row's visible keys and values, its table and averages."""
    visible = s.length - max(s.length // s.chunk - 1, 0) * s.chunk + 1
    state = visible * (s.z_dim + s.value_dim) * e + s.z_dim * s.value_head_dim * 4 + 2 * s.dim * s.modes * 8
    return s.layers * (gecko_weights(s) * e + s.batch * state) + s.dim * s.vocab_size * e, 0


def decode_flops(s: Size, e: int) -> Pair:
    """The products with the weights."""
    return 2 * s.batch * (s.layers * gecko_weights(s) + s.dim * s.vocab_size), 0


def prefill_bytes(s: Size, e: int) -> Pair:
    """The blocks, and the head once."""
    return s.layers * gecko_block_bytes(s, e)[0] + s.dim * s.vocab_size * e, 0


def prefill_flops(s: Size, e: int) -> Pair:
    """The blocks, and the head for the last token of each row."""
    return s.layers * gecko_block_flops(s, e)[0] + 2 * s.batch * s.dim * s.vocab_size, 0


def no_flops(s: Size, e: int) -> Pair:
    """No matrix products."""
    return 0, 0
