"""Every attention against a softmax under the mask that its definition names; rotary angles; DropKey."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from gecko_lab import laws
from gecko_lab.components.rotary import tables

C = laws.TINY.chunk_size
VISIBLE = {
    ("sliding_chunk", None): lambda t, j: j // C >= t // C - 1,
    ("chunk", None): lambda t, j: j // C == t // C,
    ("sliding_window", None): lambda t, j: t - j < 2 * C,
    ("sliding_window", 3): lambda t, j: t - j < 3,
    ("sliding_window", 100): lambda t, j: t - j < 100,
    ("full", None): lambda t, j: True,
}


def subject(name: str, window: int | None = None, **shape: object) -> laws.Subject:
    options = {} if window is None else {"window": window}
    return laws.Subject("attention", name, dataclasses.replace(laws.TINY, **shape), options)


@pytest.mark.parametrize("documents", [None, laws.random_documents(2, 29)], ids=["one", "packed"])
@pytest.mark.parametrize(("name", "window"), VISIBLE, ids=str)
def test_visible_keys(name, window, documents):
    s = subject(name, window)
    q, k, v = s.inputs(2, 29)
    y, _ = s.module.attend(q, k, v, documents, None)
    see = VISIBLE[name, window]
    mask = torch.tensor([[j <= t and see(t, j) for j in range(29)] for t in range(29)])[None, None]
    if documents is not None:
        mask = mask & (documents.segments[:, None, :, None] == documents.segments[:, None, None, :])
    logits = torch.einsum("bthe,bjhe->bhtj", q, k).masked_fill(~mask, -math.inf)
    expected = torch.einsum("bhtj,bjhe->bthe", logits.softmax(-1), v)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "window"), VISIBLE, ids=str)
def test_covered_chunks_leave_no_gap(name, window):
    """The chunks that an attention says it covers are seen whole from everywhere, one more is not."""
    covered = subject(name, window).module.covered_chunks(C)
    see, n = VISIBLE[name, window], 160

    def whole(chunks: int) -> bool:
        return all(see(t, j) for t in range(n) for j in range(max(0, (t // C - chunks + 1) * C), t + 1))

    if covered is None:
        assert whole(n)
    else:
        assert whole(covered)
        assert not whole(covered + 1)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_rotation_depends_on_distance_and_spares_other_heads(heads):
    s = subject("full", num_rope_heads=heads)
    q, k, v = s.inputs(1, 9)
    plain, _ = s.module.attend(q, k, v, None, None)
    turned, _ = s.module(q, k, v)
    assert torch.equal(turned[:, :, heads:], plain[:, :, heads:])
    if heads:
        assert not torch.allclose(turned[:, 1:, :heads], plain[:, 1:, :heads], atol=1e-3)


@pytest.mark.parametrize("position", [0, 1, 32_768, 4_000_000, 100_000_000])
def test_angles_stay_exact(position):
    """Against rational arithmetic: the angle of each pair reduced by a 60-digit 2 pi."""
    two_pi = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
    size, base = 8, 10_000.0
    cos, sin = tables(position, 1, size, base, torch.device("cpu"))
    for pair in range(size // 2):
        frequency = Fraction(1, 10**pair)  # 10000^(-2 pair / 8), exactly
        angle = float(position * frequency % two_pi)
        assert abs(float(cos[0, pair]) - math.cos(angle)) < 2e-7
        assert abs(float(sin[0, pair]) - math.sin(angle)) < 2e-7


def test_a_table_made_while_generating_serves_training():
    tables.cache_clear()
    device = torch.device("cpu")
    with torch.inference_mode():
        cos, _ = tables(5, 3, 4, 100.0, device)
    assert not cos.is_inference()
    assert tables(5, 3, 4, 100.0, device)[0] is cos


@pytest.mark.parametrize("documents", [None, laws.random_documents(2, 29)], ids=["one", "packed"])
@pytest.mark.parametrize("name", ["sliding_chunk", "chunk", "sliding_window", "full"])
def test_dropkey(name, documents):
    """Weights renormalise over the surviving keys, so constant values stay; a query that lost all keys yields 0."""
    s = subject(name, attention_dropout=0.5)
    q, k, v = s.inputs(2, 29)
    q = q.requires_grad_()
    torch.manual_seed(0)
    y, _ = s.run((q, k, torch.ones_like(v)), documents)
    kept = (y - 1).abs() < 1e-9
    lost = y == 0
    assert (kept | lost).all()
    assert lost.any()
    assert kept.any()
    y.sum().backward()
    assert torch.isfinite(q.grad).all()
    s.module.eval()
    assert torch.equal(s.run((q, k, v), documents)[0], s.run((q, k, v), documents)[0])


def test_documents_must_stay_once_given():
    s = subject("chunk")
    inputs = s.inputs(1, 3)
    _, state = s.run(inputs, laws.random_documents(1, 3))
    with pytest.raises(ValueError, match="documents=None"):
        s.run(inputs, None, state)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_rope_heads": 3}, "model.num_rope_heads=3"),
        ({"num_rope_heads": -1}, "model.num_rope_heads=-1"),
        ({"z_dim": 6}, "model.z_dim=6"),
        ({"rope_base": 0.0}, "model.rope_base=0.0"),
    ],
)
def test_impossible_sizes(shape, message):
    with pytest.raises(ValueError, match=message):
        subject("chunk", **shape)


def test_impossible_window():
    with pytest.raises(ValueError, match=r"model.attention.window=0"):
        subject("sliding_window", 0)
