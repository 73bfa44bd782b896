"""The references in float64 against explicit loops over time, at odd lengths and with documents."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import BETAS, OPERATIONS, D, E, G, H, S, boundaries, draw

from gecko_lab.kernels import ops
from gecko_lab.kernels.types import NormState

BY_NAME = {operation.name: operation for operation in OPERATIONS}
SHAPES = [(1, 1), (2, 63), (2, 65), (1, 131)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("BL", shape))


over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
over_documents = pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@over_shapes
@over_documents
def test_timestep_decay_norm(shape: tuple[int, int], documents: bool) -> None:
    operation = BY_NAME["timestep_decay_norm"]
    x, w = operation.inputs(*shape), operation.weights(torch.float64)
    bos = boundaries(*shape)[0] if documents else None
    start = (torch.arange(shape[0]) * 5, draw(shape[0], G, seed=3), draw(shape[0], G, seed=4).abs())
    want, end = oracle.timestep_decay_norm(x[0], 1 + w[0], w[1], G, **BETAS, bos=bos, state=oracle.NormState(*start))
    got, state = operation.call(x, w, bos, None, NormState(*start))
    same(got, want)
    same(state.mean, end.mean)
    same(state.var, end.var)
    assert torch.equal(state.count, end.count)


@over_shapes
def test_timestep_norm(shape: tuple[int, int]) -> None:
    operation = BY_NAME["timestep_norm"]
    x, w = operation.inputs(*shape), operation.weights(torch.float64)
    start = (torch.arange(shape[0]) * 5, draw(shape[0], G, seed=3), draw(shape[0], G, seed=4).abs())
    want, end = oracle.timestep_norm(100 + x[0], 1 + w[0], w[1], G, state=oracle.NormState(*start))
    got, state = operation.call((100 + x[0],), w, None, None, NormState(*start))
    same(got, want)
    same(state.mean, end.mean)
    same(state.var, end.var)


@over_shapes
@over_documents
@pytest.mark.parametrize("kind", ["complex_ema", "real_ema"])
def test_complex_ema(shape: tuple[int, int], documents: bool, kind: str) -> None:
    operation = BY_NAME[kind]
    x, (p, q, gamma) = operation.inputs(*shape), operation.weights(torch.float64)
    bos = boundaries(*shape)[0] if documents else None
    h0 = draw(shape[0], *q.shape, seed=20).to(q.dtype)
    as_complex = torch.complex128
    want, end = oracle.cema(x[0], p, q.to(as_complex), gamma.to(as_complex), h0.to(as_complex), bos)
    got, h = operation.call(x, (p, q, gamma), bos, None, h0)
    same(got, want + x[0])
    same(h.to(as_complex), end)
    assert h.is_complex() == q.is_complex()


@over_shapes
@over_documents
def test_sliding_chunk_attention(shape: tuple[int, int], documents: bool) -> None:
    if shape[1] > 100:
        shape = (1, 37)
    operation = BY_NAME["sliding_chunk_attention"]
    inputs = operation.inputs(*shape)
    segments = boundaries(*shape)[1] if documents else None
    same(operation.call(inputs, (), None, segments, None)[0], oracle.sliding_chunk_attention(*inputs, 4, seg=segments))


@over_shapes
@over_documents
def test_adaptive_working_memory(shape: tuple[int, int], documents: bool) -> None:
    operation = BY_NAME["memory_lag2"]
    inputs = operation.inputs(*shape)
    segments = boundaries(*shape)[1] if documents else None
    want, _ = oracle.adaptive_working_memory(*inputs, 4, seg=segments)
    same(operation.call(inputs, (), None, segments, None)[0], want)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_memory_holds_the_chunks_up_to_its_lag(lag: int) -> None:
    aq, ak, v = BY_NAME["memory_lag2"].inputs(1, 17)
    base, _ = ops.adaptive_working_memory(aq, ak, v, chunk=4, lag=lag)
    v = v.clone()
    v[:, 4:8] += 1  # chunk 1
    moved = (ops.adaptive_working_memory(aq, ak, v, chunk=4, lag=lag)[0] - base).abs().amax((0, 2, 3)) > 1e-9
    assert moved.tolist() == [t // 4 >= 1 + lag for t in range(17)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_row_norms(groups: int) -> None:
    x, w, b = draw(2, 3, D, seed=0), draw(D, seed=1), draw(D, seed=2)
    same(ops.rms_norm(x, w, groups=groups), oracle.rms_norm(x, groups, 1 + w))
    same(ops.rms_norm(x[0, 0], groups=groups), oracle.rms_norm(x[0, 0], groups))
    same(ops.layer_norm(x, w, b, groups=groups), oracle.layer_norm(x, groups, 1 + w, b))
    same(ops.layer_norm(x, groups=groups), oracle.layer_norm(x, groups))


@pytest.mark.parametrize("rope_heads", [0, 1, 2])
def test_z_views(rope_heads: int) -> None:
    length, width = 5, H * S
    z, gamma, beta = draw(2, length, width, seed=0), draw(4, width, seed=1), draw(4, width, seed=2)
    angles = torch.arange(length)[:, None] * 10.0 ** (-2 * torch.arange(S // 2).double() / S)
    views = ops.z_views(z, gamma, beta, angles.cos(), angles.sin(), heads=H, rope_heads=rope_heads)
    for i, view in enumerate(views):
        want = oracle.rms_norm(z, H) * (1 + gamma[i]) / S**0.5 + beta[i]
        want = want.unflatten(-1, (H, S)).clone()
        for t in range(length if i < 2 else 0):
            want[:, t, :rope_heads] = oracle.rope_rotate(want[:, t, :rope_heads], float(t), 10.0)
        same(view, want)
        if i < 2:
            plain = (oracle.rms_norm(z, H) * (1 + gamma[i]) / S**0.5 + beta[i]).unflatten(-1, (H, S))
            same(ops.rotate(plain, angles.cos(), angles.sin(), rope_heads), want)


def test_gates() -> None:
    a, b, c = (draw(3, E, seed=i) for i in range(3))
    same(ops.silu(a), a / (1 + torch.exp(-a)))
    same(ops.swiglu(a, b), ops.silu(a) * b)
    same(ops.gate(a, b), a * ops.silu(b))
    same(ops.gate(a, b, c), a * ops.silu(b) + c)


def test_dropkey_drops_logits_without_rescaling() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(1, 64, 1, 2), torch.zeros(1, 64, 1, 2)
    v = torch.eye(64)[None, :, None, :]
    y = ops.sliding_chunk_attention(q, k, v, chunk=32, dropout=0.5)[0][0, :, 0]
    kept = (y > 0).sum(-1)
    sums = y.sum(-1)
    assert set(sums.round(decimals=4).tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(y.amax(-1), torch.where(kept > 0, 1 / kept.clamp(min=1), 0.0))
    assert 0.4 < float(kept.sum() / 64 / 32.5) < 0.6
    assert ops.sliding_chunk_attention(q[:, :1], k[:, :1], v[:, :1], chunk=4, dropout=0.999)[0].isfinite().all()
