"""Sliding-chunk attention's kernels against the float64 reference."""

import pytest
import torch
from torch import Tensor
from twins import compare, documents, poison, relative, run

from gecko_lab.kernels.sliding_chunk_attention import tiles
from gecko_lab.kernels.sliding_chunk_attention.cuda import sliding_chunk_attention
from gecko_lab.kernels.sliding_chunk_attention.reference import sliding_chunk_attention as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(batch: int, length: int, heads: int, features: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    random = torch.Generator(device="cuda").manual_seed(length + features)
    scale = (1.0, 1.5 / features**0.5, 1.0)
    return tuple(
        (s * torch.randn(batch, length, heads, size, generator=random, device="cuda")).to(dtype)
        for s, size in zip(scale, (features, features, width))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((2, 5 * 64 + 3, 2, 16, 32), 64),
        ((2, 5 * 16, 2, 16, 32), 16),
        ((1, 77, 3, 5, 7), 6),
        ((2, 700, 1, 64, 128), 256),
        ((3, 1, 2, 16, 32), 16),
        ((1, 1100, 2, 256, 2048), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_values_and_gradients(shape: tuple[int, ...], chunk: int, packed: bool, dtype: torch.dtype) -> None:
    batch, length = shape[:2]
    cuts = [0, 1, chunk - 1, chunk, 2 * chunk + 5, 3 * chunk, 3 * chunk + 1]
    segments = documents(batch, length, cuts) if packed else None
    compare(sliding_chunk_attention, reference, inputs(*shape, dtype), [length], segments, chunk=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cuts", [[66, 3, 59, 64, 1, 128, 2], [64, 128, 64], [63, 1, 1, 1], [200, 37]], ids=str)
def test_pieces_are_the_whole(cuts: list[int], packed: bool, dtype: torch.dtype) -> None:
    x = inputs(2, sum(cuts), 2, 16, 32, dtype)
    segments = documents(2, sum(cuts), [5, 63, 64, 130, 192]) if packed else None
    compare(sliding_chunk_attention, reference, x, cuts, segments, chunk=64)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_pieces_in_tiles(packed: bool) -> None:
    """Rows that begin anywhere in a tile, in heads that the tile kernel of sm_90a takes."""
    x = inputs(2, 900, 2, 64, 128, torch.bfloat16)
    segments = documents(2, 900, [5, 255, 256, 301, 600]) if packed else None
    compare(sliding_chunk_attention, reference, x, [300, 200, 1, 99, 300], segments, chunk=256)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_tiles_agree_with_rows(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of the backward pass give the same gradients, with the same keys dropped."""
    x = tuple(t.requires_grad_() for t in inputs(2, 1500, 2, 128, 192, torch.bfloat16))
    dy = torch.randn_like(x[2])
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        y, _ = sliding_chunk_attention(*x, chunk=512, dropout=dropout)
        found.append(torch.autograd.grad(y, x, dy))
        monkeypatch.setattr(tiles, "serves", lambda *_: False)
    for a, b in zip(*found):
        assert relative(a, b) < 3e-3


def test_large_chunks() -> None:
    compare(sliding_chunk_attention, reference, inputs(1, 4500, 1, 32, 64, torch.float32), [4500], None, chunk=2048)
    compare(sliding_chunk_attention, reference, inputs(1, 9000, 1, 16, 16, torch.float32), [9000], None, chunk=8192)


def test_views_of_one_buffer() -> None:
    """Queries, keys and values that are slices of a wider projection, and a gradient that is no plain tensor."""
    buffer = torch.randn(2, 160, 2 * (16 + 16 + 32), device="cuda")
    whole = buffer.requires_grad_()
    q, k, v = (t.unflatten(2, (2, -1)) for t in whole.split((32, 32, 64), 2))
    y, _ = sliding_chunk_attention(q, k * 0.3, v, chunk=32)
    z, _ = reference(q.double(), (k * 0.3).double(), v.double(), chunk=32)
    assert relative(y, z) < 2e-5
    for summed in (lambda t: t.sum(), lambda t: (t[:, ::2] * 2).sum()):
        (a,) = torch.autograd.grad(summed(y), whole, retain_graph=True)
        (b,) = torch.autograd.grad(summed(z), whole, retain_graph=True)
        assert relative(a, b) < 2e-5


def test_dropped_keys() -> None:
    """Survivors are a fair coin, weights renormalise over them, the backward pass draws the same ones."""
    torch.manual_seed(3)
    chunk, length = 128, 256
    q = torch.zeros(2, length, 2, 4, device="cuda")
    v = torch.eye(length, device="cuda").expand(2, -1, -1)[:, :, None].repeat(1, 1, 2, 1).requires_grad_()
    y, _ = sliding_chunk_attention(q, q, v, chunk=chunk, dropout=0.25)
    kept = y.detach() > 0
    t, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")
    seen = ((j <= t) & (j >= (t // chunk - 1).clamp(min=0) * chunk)).expand(2, 2, -1, -1).transpose(1, 2)
    assert not bool((kept & ~seen).any())
    number = int(seen.sum())
    assert abs(float(kept[seen].double().mean()) - 0.75) < 5 * (0.25 * 0.75 / number) ** 0.5
    both = (kept[:, :, :, :-1] & kept[:, :, :, 1:])[seen[:, :, :, 1:]].double().mean()
    assert abs(float(both) - 0.5625) < 0.02  # neighbours are independent
    (grad,) = torch.autograd.grad(y, v, torch.ones_like(y))
    torch.testing.assert_close(grad[..., 0], y.detach().sum(1).transpose(1, 2), rtol=1e-4, atol=1e-4)
    first, second = (_draw(q, v.detach(), chunk, seed) for seed in (5, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, _draw(q, v.detach(), chunk, 6))


def _draw(q: Tensor, v: Tensor, chunk: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return sliding_chunk_attention(q, q, v, chunk=chunk, dropout=0.5)[0]


def test_a_graph_replays_training_with_fresh_dropout() -> None:
    x = tuple(t.requires_grad_() for t in inputs(2, 130, 2, 16, 32, torch.bfloat16))

    def step() -> tuple[Tensor, ...]:
        y, _ = sliding_chunk_attention(*x, chunk=32, dropout=0.1)
        return (y, *torch.autograd.grad(y.float().square().sum(), x))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(out[0].clone())
    assert all(bool(torch.isfinite(t).all()) for t in out)
    assert not torch.equal(*seen)


def test_no_synchronisation() -> None:
    x = inputs(2, 130, 2, 16, 32, torch.bfloat16)
    segments = documents(2, 130, [3, 64, 100])
    _, state = sliding_chunk_attention(*x, chunk=32, segments=segments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sliding_chunk_attention(*(t[:, :1] for t in x), chunk=32, segments=segments[:, -1:], state=state)
        sliding_chunk_attention(*x, chunk=32, segments=segments, dropout=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_and_memory_kept() -> None:
    x = inputs(1, 4096, 2, 64, 256, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, _ = sliding_chunk_attention(*x, chunk=1024)
    assert y.dtype == torch.bfloat16
    leaves = [t.bfloat16().requires_grad_() for t in x]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, state = sliding_chunk_attention(*leaves, chunk=1024)
    del state
    kept = torch.cuda.memory_allocated() - before
    assert kept < y.numel() * 2 + 2 * 4096 * 4 + 4e6, kept  # the output and a log-sum-exp a row


def test_poisoned_memory_does_not_matter() -> None:
    x = inputs(2, 100, 2, 16, 32, torch.bfloat16)
    torch.cuda.empty_cache()
    clean = run(sliding_chunk_attention, x, [100], None, chunk=32)
    poison()
    dirty = run(sliding_chunk_attention, x, [100], None, chunk=32)
    for name in ("y", "dquery", "dkey", "dvalue"):
        assert torch.equal(clean[name], dirty[name]), name
