"""The moving average's kernels against the float64 recurrence: values, gradients, and how they are launched."""

import itertools
import math
import threading

import pytest
import torch
from torch import Tensor

from gecko_lab.kernels.complex_ema import steps
from gecko_lab.kernels.complex_ema.cuda import complex_ema
from gecko_lab.kernels.complex_ema.reference import complex_ema as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("y", "h", "dx", "dp", "dq", "dgamma", "dstate")


def inputs(
    batch: int, length: int, width: int, modes: int, dtype: torch.dtype, *, slow: bool = False
) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(length * 31 + width + modes)
    p = torch.rand(width, modes, generator=random)
    spread = torch.rand(width, modes, generator=random)
    radius = 1 - 1e-4 * (0.5 + spread) if slow else 0.4 + 0.59 * spread
    q = torch.polar(radius, math.tau * torch.rand(width, modes, generator=random))
    gamma = torch.randn(width, modes, generator=random, dtype=torch.complex64) / modes**0.5
    x = torch.randn(batch, length, width, generator=random).to(dtype)
    state = torch.randn(batch, width, modes, generator=random, dtype=torch.complex64)
    return tuple(t.cuda().requires_grad_() for t in (x, p, q, gamma, state))


def boundaries(batch: int, length: int, where: tuple[int, ...]) -> Tensor | None:
    if not where:
        return None
    bos = torch.zeros(batch, length, dtype=torch.bool)
    bos[-1, [t % length for t in where]] = True
    return bos.cuda()


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).requires_grad_()


def poison() -> None:
    """Leave NaN in the memory that the next allocations take."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in [1 << 20] * 24 + [1 << 12] * 64]
    del blocks


def run(function, leaves: tuple[Tensor, ...], seeds: tuple[Tensor, Tensor], bos: Tensor | None, *, final: bool):  # type: ignore[no-untyped-def]
    x, p, q, gamma, *state = leaves
    y, h = function(x, p, q, gamma, bos=bos, state=state[0] if state else None)
    outputs, given = ([y, h], [s.to(t.dtype) for s, t in zip(seeds, (y, h))])
    if not final:
        outputs, given = outputs[:1], given[:1]
    return (y, h, *torch.autograd.grad(outputs, leaves, given))


def error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = exact(ours).detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def check(
    leaves: tuple[Tensor, ...], bos: Tensor | None, *, final: bool, limit: float, output_limit: float | None = None
) -> None:
    x, _, q = leaves[:3]
    seeds = torch.randn_like(x), torch.randn((x.shape[0], *q.shape), dtype=torch.complex64, device="cuda")
    poison()
    ours = run(complex_ema, leaves, seeds, bos, final=final)
    theirs = run(reference, tuple(exact(t) for t in leaves), seeds, bos, final=final)
    worst = {name: error(a, b) for name, a, b in zip(NAMES, ours, theirs)}
    for name, value in worst.items():
        allowed = output_limit if output_limit is not None and name in ("y", "dx") else limit
        assert value <= allowed, f"{name}: relative error {value:.2e} above {allowed:.1e}; all: {worst}"


BF16 = {"limit": 1e-4, "output_limit": 2.5e-3}  # rounding the outputs to bfloat16 alone is 1.7e-3
FP32 = {"limit": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 160, 257, 511, 512, 513, 1000, 1537])
def test_any_length(length: int, dtype: torch.dtype) -> None:
    *leaves, state = inputs(2, length, 64, 16, dtype)
    limits = FP32 if dtype is torch.float32 else BF16
    check(tuple(leaves), None, final=False, **limits)
    check((*leaves, state), boundaries(2, length, (0, length // 2, -1)), final=True, **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [(0,), (-1,), (0, -1), (300, 301, 302), tuple(range(10, 700, 37)), (31, 32, 512)])
@pytest.mark.parametrize("carried", [False, True])
def test_documents(where: tuple[int, ...], carried: bool, dtype: torch.dtype) -> None:
    leaves = inputs(2, 1100, 48, 16, dtype)
    check(
        leaves if carried else leaves[:4],
        boundaries(2, 1100, where),
        final=True,
        **(FP32 if dtype is torch.float32 else BF16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "modes"), [(32, 1), (33, 4), (40, 5), (96, 16), (256, 16), (100, 16), (16, 17), (8, 32)]
)
def test_any_width_and_modes(width: int, modes: int, dtype: torch.dtype) -> None:
    leaves = inputs(3, 600, width, modes, dtype)
    limits = FP32 if dtype is torch.float32 else BF16
    check(leaves, None, final=True, **limits)


WHERE = [
    (), (0,), (-1,), (0, -1), (15, 16, 17), (31, 32), (100, 101, 127), (112, 288), (496, 504), tuple(range(5, 512, 37))
]  # fmt: skip


@pytest.mark.parametrize("width", [40, 4104])
@pytest.mark.parametrize("length", [128, 129, 300, 511, 512])
@pytest.mark.parametrize("where", WHERE)
def test_one_tile(where: tuple[int, ...], length: int, width: int) -> None:
    """The kernel of pieces, whose blocks take one row: widths that do not fill the last block, chunks of 16 steps."""
    for modes, carried in ((16, True), (5, False)) if width == 40 else ((16, True),):
        leaves = inputs(1, length, width, modes, torch.bfloat16)
        bos = boundaries(1, length, tuple(t for t in where if t < length))
        check(leaves if carried else leaves[:4], bos, final=True, **BF16)


@pytest.mark.parametrize("length", [300, 512])
def test_rows_of_one_tile(length: int) -> None:
    """As many rows as the kernel of pieces takes, and one more, which that of whole sequences takes."""
    from gecko_lab.kernels.complex_ema import launches

    for batch in (launches._PIECE_ROWS, launches._PIECE_ROWS + 1):
        bos = torch.rand(batch, length, generator=torch.Generator().manual_seed(batch)) < 1 / 100
        check(inputs(batch, length, 72, 16, torch.bfloat16), bos.cuda(), final=True, **BF16)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("where", [(), (0,), (255,)])
def test_gradients_of_one_tile(where: tuple[int, ...], carried: bool, final: bool) -> None:
    """Parameter gradients are polynomials in q divided by q: |q| down to 0 and up to 1, with and without states."""
    for batch, slow in ((1, False), (1, True), (2, False), (2, True)):  # one row has a kernel of its own
        leaves = inputs(batch, 512, 40, 16, torch.bfloat16, slow=slow)
        if not slow:
            with torch.no_grad():
                leaves[2].mul_(torch.logspace(0, -40, 40, device="cuda")[:, None])
                leaves[2][-1] = 0
        check(leaves if carried else leaves[:4], boundaries(batch, 512, where), final=final, **BF16)


@pytest.mark.parametrize("length", [512, 600])
def test_a_block_filters_many_rows(length: int) -> None:
    """More rows than blocks: what a block makes of the parameters serves several rows, and states must not leak."""
    from gecko_lab.kernels.complex_ema import launches

    leaves = inputs(300, length, 32, 16, torch.bfloat16)
    assert launches._tiled_grid(leaves[0])[1] < 300
    bos = torch.rand(300, length, generator=torch.Generator().manual_seed(3)) < 1 / 400
    check(leaves, bos.cuda(), final=True, **BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_decays(dtype: torch.dtype) -> None:
    """|q| about 0.9999: float32 steps add up 1e-4; the chunked form is closer."""
    leaves = inputs(1, 8192, 32, 16, dtype, slow=True)
    check(leaves, None, final=True, limit=3e-4, output_limit=2.5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [512, 1024, 1100])
@pytest.mark.parametrize("where", [(), (0,), (400,), (512,), (1023,)])
def test_a_slow_state_crosses_tiles(where: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    """With |q| about 0.9999 nearly all of the entering state reaches the end, unless a document begins."""
    leaves = inputs(2, length, 32, 16, dtype, slow=True)
    check(leaves, boundaries(2, length, where), final=True, limit=1e-4, output_limit=2.5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_average(dtype: torch.dtype) -> None:
    x, p, q, gamma, state = inputs(2, 700, 64, 2, dtype)
    real = [t.detach().real.contiguous().requires_grad_() for t in (q, gamma, state)]
    leaves = (x, p, real[0], real[1], real[2])
    y, h = complex_ema(*leaves[:4], state=leaves[4])
    wide = [exact(t) for t in leaves]
    expected, last = reference(*wide[:4], state=wide[4])
    assert not h.is_complex()
    assert error(y, expected) < 2.5e-3
    assert error(h, last) < 1e-4
    ours = torch.autograd.grad(y.float().sum() + h.sum(), leaves)
    for name, a, b in zip(NAMES[2:], ours, torch.autograd.grad(expected.sum() + last.sum(), wide)):
        assert error(a, b) < 3e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (512,), (512, 1024), (100, 700, 1300), (512, 1023, 1323)])
def test_pieces_with_a_carried_state_equal_the_whole(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    x, p, q, gamma, state = (t.detach() for t in inputs(2, 1500, 64, 16, dtype))
    bos = boundaries(2, 1500, (3, 800))
    whole, last = complex_ema(x, p, q, gamma, bos=bos, state=state)
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, 1500)):
        assert bos is not None
        y, state = complex_ema(x[:, start:stop], p, q, gamma, bos=bos[:, start:stop], state=state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole.double()) < (1e-5 if dtype is torch.float32 else 1e-3)
    assert error(state, last.to(torch.complex128)) < 1e-4


def test_strided_and_conjugated_inputs() -> None:
    x, p, q, gamma, _ = (t.detach() for t in inputs(2, 300, 64, 16, torch.float32))
    y, _ = complex_ema(x, p, q.conj(), gamma.conj())
    expected, _ = complex_ema(x, p, q.conj().resolve_conj(), gamma.conj().resolve_conj())
    torch.testing.assert_close(y, expected)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(complex_ema(strided, p, q, gamma)[0], complex_ema(x, p, q, gamma)[0])


def test_deterministic_on_another_stream_and_thread() -> None:
    leaves = inputs(2, 2048, 64, 16, torch.bfloat16)
    seed = torch.randn_like(leaves[0]), torch.randn((2, 64, 16), dtype=torch.complex64, device="cuda")
    first = run(complex_ema, leaves, seed, None, final=True)
    torch.cuda.synchronize()
    results: list[tuple[Tensor, ...]] = []

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(run(complex_ema, leaves, seed, None, final=True))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    for name, a, b in zip(NAMES, first, results[0]):
        assert torch.equal(a, b), name


def test_graph_capture_and_replay() -> None:
    leaves = inputs(1, 1024, 64, 16, torch.bfloat16)
    seed = torch.randn_like(leaves[0]), torch.randn((1, 64, 16), dtype=torch.complex64, device="cuda")
    bos = boundaries(1, 1024, (5,))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(complex_ema, leaves, seed, bos, final=True)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(complex_ema, leaves, seed, bos, final=True)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
        assert bos is not None
        bos.copy_(boundaries(1, 1024, (700, 701)))
    graph.replay()
    for name, a, b in zip(NAMES, captured, run(complex_ema, leaves, seed, bos, final=True)):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("batch", [1, 4])
def test_early_launches_wait_for_what_they_read(batch: int) -> None:
    """Pieces in a graph, whose kernels follow each other at once: q, the state and dy come from the one before."""
    x, p, q, gamma, state = inputs(batch, 2048, 2048, 16, torch.bfloat16)
    dy = torch.randn_like(x)

    def pieces() -> list[Tensor]:
        made, carried = [], state
        for part, slope in zip(x.split(512, 1), dy.split(512, 1)):
            part = part.detach().contiguous().requires_grad_()
            turned = (q * 1.0).detach().requires_grad_()
            y, carried = complex_ema(part, p, turned, gamma, state=carried)
            made += [y, *torch.autograd.grad([y, carried], [part, p, turned, gamma], [slope * 1, carried * 1])]
            carried = carried.detach() * 1
        return [*made, carried]

    expected = []
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = pieces()
        torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pieces()
    for _ in range(20):
        for made in captured:
            made.detach().zero_()
        graph.replay()
        for a, b in zip(captured, expected):
            assert torch.equal(a, b)


def test_compiled_step_matches_eager() -> None:
    leaves = inputs(2, 700, 64, 16, torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        y, h = complex_ema(*leaves[:4], state=leaves[4])
        return y.square().sum() + h.real.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_operators_match_the_plain_steps() -> None:
    """The parts that the gradients are made of, one by one, so that a fault names its kernel."""
    from gecko_lab.kernels.complex_ema import launches

    for dtype, length in itertools.product((torch.float32, torch.bfloat16), (1100, 512, 300)):
        x, p, q, gamma, state = (t.detach() for t in inputs(2, length, 48, 16, dtype))
        wide = [exact(t).detach() for t in (x, p, q, gamma, state)]
        dy, dlast = torch.randn_like(x), torch.randn_like(state)
        for bos in (None, boundaries(2, length, (0, 40, 41, 600))):
            for reverse in (False, True):
                ours = launches.filter_steps(x, p, q, gamma, bos, state, reverse=reverse)
                theirs = steps.filter_steps(*wide[:4], bos, wide[4], reverse=reverse)
                assert error(ours[0], theirs[0]) < (1e-5 if dtype is torch.float32 else 2.5e-3), (dtype, reverse)
                assert error(ours[1], theirs[1]) < 2e-5, (dtype, reverse)
            for ends in ((None, None), (state, None), (None, dlast), (state, dlast)):
                sums = launches.parameter_gradients(x, dy, p, q, gamma, bos, *ends)
                exact_ends = [None if end is None else exact(end).detach() for end in ends]
                expected = steps.parameter_gradients(wide[0], exact(dy).detach(), *wide[1:4], bos, *exact_ends)
                for name, a, b in zip(("dp", "dq", "dgamma"), sums, expected):
                    assert error(a, b) < 2e-5, (dtype, name, [end is not None for end in ends])
