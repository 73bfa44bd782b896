"""The adaptive working memory's kernels against the float64 reference."""

import pytest
import torch
from torch import Tensor
from twins import compare, documents, poison, relative, run

from gecko_lab.kernels.adaptive_working_memory import chain
from gecko_lab.kernels.adaptive_working_memory.cuda import adaptive_working_memory
from gecko_lab.kernels.adaptive_working_memory.reference import adaptive_working_memory as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(batch: int, length: int, heads: int, features: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    random = torch.Generator(device="cuda").manual_seed(length + features)
    return tuple(
        torch.randn(batch, length, heads, size, generator=random, device="cuda").to(dtype)
        for size in (features, features, width)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((2, 6 * 64 + 3, 2, 16, 32), 64),
        ((2, 5 * 16, 2, 16, 32), 16),
        ((1, 77, 3, 5, 7), 6),
        ((3, 1, 2, 16, 32), 16),
        ((2, 6 * 64 + 3, 2, 64, 192), 64),
        ((1, 1400, 2, 256, 2048), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_values_and_gradients(shape: tuple[int, ...], chunk: int, packed: bool, lag: int, dtype: torch.dtype) -> None:
    batch, length = shape[:2]
    cuts = [0, 1, chunk - 1, chunk, 3 * chunk, 3 * chunk + 1]
    segments = documents(batch, length, cuts) if packed else None
    compare(adaptive_working_memory, reference, inputs(*shape, dtype), [length], segments, chunk=chunk, lag=lag)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cuts", [[66, 3, 59, 64, 1, 128, 2], [64, 128, 64], [63, 1, 1, 1], [200, 137]], ids=str)
def test_pieces_are_the_whole(cuts: list[int], packed: bool, dtype: torch.dtype) -> None:
    x = inputs(2, sum(cuts), 2, 16, 32, dtype)
    segments = documents(2, sum(cuts), [5, 63, 64, 130, 192]) if packed else None
    compare(adaptive_working_memory, reference, x, cuts, segments, chunk=64)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cuts", [[768, 256, 300], [256, 1100], [100, 924, 300]], ids=str)
def test_pieces_in_tiles(cuts: list[int], packed: bool) -> None:
    """Heads that the tile kernels of sm_90a take, from a whole chunk, from inside one, and where they do not."""
    x = inputs(2, sum(cuts), 2, 256, 128, torch.bfloat16)
    segments = documents(2, sum(cuts), [5, 255, 256, 511, 800]) if packed else None
    compare(adaptive_working_memory, reference, x, cuts, segments, chunk=512)


@pytest.mark.parametrize("features", [32, 64, 128, 256])
@pytest.mark.parametrize(("heads", "width"), [(2, 96), (8, 1024)])
def test_the_chain(features: int, heads: int, width: int) -> None:
    """The tensor-core chain agrees with float64 to tf32, forward and backward, and clears where keep is 0."""
    torch.manual_seed(features)
    mix = torch.randn(2, heads, 6, features, features, device="cuda").mul(2).softmax(-1)
    rho = torch.rand(2, heads, 5, features, device="cuda")
    keep = torch.tensor([[1.0, 1, 0, 1, 1], [1, 1, 1, 1, 0]], device="cuda")
    tables = torch.randn(2, heads, 6, features, width, device="cuda")
    target = torch.randn_like(tables)
    grad = torch.randn_like(tables)
    forward, backward = [], []
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        m, t, g, r, k = (x.to(wide).clone() for x in (mix[:, :, :5], tables, grad, rho, keep))
        narrow = chain.forward(t, m, target[:, :, :5].to(wide), r, k, dtype)
        assert relative(narrow, t.to(narrow.dtype)) == 0
        forward.append(t)
        narrow, turn = chain.backward(g, t, m, r, k, dtype)
        assert relative(narrow, g[:, :, 1:].to(narrow.dtype)) == 0
        backward.append((g, turn))
    assert relative(*forward) < 1e-3
    for a, b in zip(*backward):
        assert relative(a, b) < 1e-3


def test_long_streams_stay_exact() -> None:
    compare(adaptive_working_memory, reference, inputs(1, 64 * 40, 1, 32, 64, torch.float32), [64 * 40], None, chunk=64)


def test_a_graph_replays_training() -> None:
    x = tuple(t.requires_grad_() for t in inputs(2, 130, 2, 16, 32, torch.bfloat16))

    def step() -> tuple[Tensor, ...]:
        y, _ = adaptive_working_memory(*x, chunk=32)
        return (y, *torch.autograd.grad(y.float().square().sum(), x))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            wanted = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    for a, b in zip(out, wanted):
        assert torch.equal(a, b)


def test_no_synchronisation() -> None:
    x = inputs(2, 130, 2, 16, 32, torch.bfloat16)
    segments = documents(2, 130, [3, 64, 100])
    _, state = adaptive_working_memory(*x, chunk=32, segments=segments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adaptive_working_memory(*(t[:, :1] for t in x), chunk=32, segments=segments[:, -1:], state=state)
        adaptive_working_memory(*x, chunk=32, segments=segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_poisoned_memory_does_not_matter() -> None:
    x = inputs(2, 200, 2, 16, 32, torch.bfloat16)
    torch.cuda.empty_cache()
    clean = run(adaptive_working_memory, x, [150, 50], None, chunk=32)
    poison()
    dirty = run(adaptive_working_memory, x, [150, 50], None, chunk=32)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
