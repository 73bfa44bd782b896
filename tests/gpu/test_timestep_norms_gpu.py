"""Both time-step norms on the GPU against the references in float64: outputs, states, gradients, and how they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gecko_lab.kernels import ops
from gecko_lab.kernels.backend import use
from gecko_lab.kernels.timestep_decay_norm.plan import plan
from gecko_lab.kernels.timestep_decay_norm.reference import timestep_decay_norm as decay_reference
from gecko_lab.kernels.timestep_norm.reference import timestep_norm as plain_reference
from gecko_lab.kernels.types import NormState

Norm = Callable[..., tuple[Tensor, NormState]]
DECAY = {"beta1": 0.999, "beta2": 0.9999}
EPS = 1e-5
KINDS = ("decay", "plain")
# Of the l2 norm. The sums over a long past of the float32 kernels differ from float64 by more than single outputs do.
FLOAT32, BFLOAT16 = 1e-5, 5e-3


@pytest.fixture(autouse=True)
def kernels_only() -> Any:
    with use("strict"):
        yield


def norm_of(kind: str) -> tuple[Norm, Norm, dict[str, Any]]:
    if kind == "decay":
        return ops.timestep_decay_norm, decay_reference, {**DECAY, "eps": EPS}
    return ops.timestep_norm, plain_reference, {"eps": EPS}


def poison(device: torch.device) -> None:
    """Fill memory that the allocator will hand out again with NaN."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22)]
    del blocks


def inputs(
    device: torch.device, batch: int, length: int, groups: int, features: int, dtype: torch.dtype, kind: str, past: int
) -> tuple[list[Tensor], NormState | None]:
    """x, weight, bias and, after `past` steps, a state; all leaves."""
    random = torch.Generator().manual_seed(length * 31 + features)
    dim = groups * features
    x = torch.randn(batch, length, dim, generator=random) + torch.randn(dim, generator=random)
    weight, bias = 0.3 * torch.randn(dim, generator=random), torch.randn(dim, generator=random)
    leaves = [x.to(device, dtype), weight.to(device), bias.to(device)]
    state = None
    if past:
        count = torch.arange(past, past + batch)
        mean = torch.randn(batch, groups, generator=random)
        var = torch.rand(batch, groups, generator=random) + 0.5
        if kind == "decay":
            mean, var = (
                m * -torch.expm1(count.double()[:, None] * torch.tensor(beta).double().log()).float()
                for m, beta in ((mean, DECAY["beta1"]), (var, DECAY["beta2"]))
            )
        state = NormState(count.to(device), mean.to(device).requires_grad_(), var.to(device).requires_grad_())
    return [leaf.requires_grad_() for leaf in leaves], state


def double(leaves: list[Tensor], state: NormState | None) -> tuple[list[Tensor], NormState | None]:
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    if state is None:
        return wide, None
    mean, var = (t.detach().cpu().double().requires_grad_() for t in state[1:])
    return wide, NormState(state.count.cpu(), mean, var)


def run(norm: Norm, leaves: list[Tensor], state: NormState | None, seed: int = 5, **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed weighting of y and of the final state."""
    y, after = norm(*leaves, state=state, **options)
    random = torch.Generator().manual_seed(seed)
    outputs = [y, after.mean, after.var]
    # Multiples of 1/8 are the same numbers in every dtype.
    weights = [(torch.randint(-16, 17, t.shape, generator=random) / 8).to(t) for t in outputs]
    wanted = leaves + ([] if state is None else [state.mean, state.var])
    gradients = torch.autograd.grad(outputs, wanted, weights)
    names = ["dx", "dweight", "dbias", "dmean", "dvar"]
    found = {"y": y.detach(), "count": after.count, "mean": after.mean.detach(), "var": after.var.detach()}
    return {**found, **dict(zip(names, gradients))}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert torch.equal(actual["count"].cpu(), expected["count"].cpu())
    errors = {}
    for name, want in expected.items():
        if name == "count":
            continue
        got = actual[name].cpu().double()
        limit = BFLOAT16 if dtype is torch.bfloat16 and name in ("y", "dx") else FLOAT32
        error = float((got - want.double().cpu()).norm() / want.double().cpu().norm().clamp_min(1e-6))
        if not error <= limit:
            errors[name] = error
    assert not errors


def boundaries(pattern: str, batch: int, length: int, device: torch.device) -> Tensor | None:
    if pattern == "none":
        return None
    bos = torch.zeros(batch, length, dtype=torch.bool)
    if pattern == "edges":
        bos[:, 0] = True
        bos[0, length - 1] = True
    else:
        bos[-1, length // 2 : length // 2 + 3] = True
        bos[0, :: max(length // 3, 1)] = True
    return bos.to(device)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257, 1000])
@pytest.mark.parametrize("pattern", ["none", "edges", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_documents(cuda: torch.device, kind: str, pattern: str, length: int) -> None:
    norm, reference, options = norm_of(kind)
    bos = boundaries(pattern, 2, length, cuda)
    for dtype, past in ((torch.float32, 0), (torch.float32, 7), (torch.bfloat16, 100_000)):
        leaves, state = inputs(cuda, 2, length, 8, 8, dtype, kind, past)
        expected = run(reference, *double(leaves, state), groups=8, bos=None if bos is None else bos.cpu(), **options)
        poison(cuda)
        compare(run(norm, leaves, state, groups=8, bos=bos, **options), expected, dtype)


PIECES = [(64, torch.bfloat16), (128, torch.bfloat16), (8, torch.bfloat16), (64, torch.float32), (4, torch.float32)]


@pytest.mark.parametrize(("features", "dtype"), PIECES)
@pytest.mark.parametrize("length", [65, 256, 257, 511, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_clusters(cuda: torch.device, kind: str, length: int, features: int, dtype: torch.dtype) -> None:
    """All widths that clusters take, one row and three, with and without documents and a past; outliers too."""
    norm, reference, options = norm_of(kind)
    for batch, pattern, past in ((1, "none", 0), (1, "edges", 5), (3, "rows", 100_000), (3, "none", 1)):
        leaves, state = inputs(cuda, batch, length, 4, features, dtype, kind, past)
        with torch.no_grad():
            leaves[0][:, :, 0] += 300  # moments are formed about the first member of a group
        bos = boundaries(pattern, batch, length, cuda)
        made = plan(features, dtype, torch.float32, kind == "decay", 4)
        if torch.cuda.get_device_capability() == (9, 0) and length > made.tile:
            assert made.piece(batch, length, cuda) is not None
        expected = run(reference, *double(leaves, state), groups=4, bos=None if bos is None else bos.cpu(), **options)
        poison(cuda)
        compare(run(norm, leaves, state, groups=4, bos=bos, **options), expected, dtype)


SIZES = [(1, 64), (8, 8), (64, 64), (5, 7), (2, 1), (8, 512), (1, 2048), (12, 20)]
NARROW = [(64, 64), (64, 32), (3, 100), (8, 512)]


@pytest.mark.parametrize(
    ("dtype", "groups", "features"),
    [(torch.float32, *size) for size in SIZES] + [(torch.bfloat16, *size) for size in NARROW],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(cuda: torch.device, kind: str, dtype: torch.dtype, groups: int, features: int) -> None:
    norm, reference, options = norm_of(kind)
    leaves, state = inputs(cuda, 3, 150, groups, features, dtype, kind, 40)
    bos = boundaries("rows", 3, 150, cuda)
    assert bos is not None
    expected = run(reference, *double(leaves, state), groups=groups, bos=bos.cpu(), **options)
    poison(cuda)
    compare(run(norm, leaves, state, groups=groups, bos=bos, **options), expected, dtype)


@pytest.mark.parametrize("past", [0, 1_000_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_look_far_back(cuda: torch.device, kind: str, past: int) -> None:
    norm, reference, options = norm_of(kind)
    leaves, state = inputs(cuda, 2, 9001, 4, 64, torch.float32, kind, past)
    expected = run(reference, *double(leaves, state), groups=4, **options)
    for _ in range(5):
        poison(cuda)
        compare(run(norm, leaves, state, groups=4, **options), expected, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_short_rows_in_clusters_or_not(cuda: torch.device, kind: str) -> None:
    """A few short rows go to clusters of blocks, many rows look back through global memory."""
    norm, reference, options = norm_of(kind)
    for batch in (3, 400):
        leaves, state = inputs(cuda, batch, 300, 8, 8, torch.float32, kind, 5)
        bos = boundaries("rows", batch, 300, cuda)
        assert bos is not None
        piece = plan(8, torch.float32, torch.float32, kind == "decay", 8).piece(batch, 300, cuda)
        assert (piece is None) == (batch == 400 or torch.cuda.get_device_capability() < (9, 0))
        for marks in (None, bos):
            wide, start = double(leaves, state)
            expected = run(reference, wide, start, groups=8, bos=None if marks is None else marks.cpu(), **options)
            poison(cuda)
            compare(run(norm, leaves, state, groups=8, bos=marks, **options), expected, torch.float32)


@pytest.mark.parametrize("batch", [1, 8, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_rows_that_fill_the_machine(cuda: torch.device, kind: str, batch: int) -> None:
    """The 7B shape: pieces of 512 and of odd lengths, eight rows in clusters, ten that look back, equal the whole."""
    norm, _, options = norm_of(kind)
    if torch.cuda.get_device_capability() == (9, 0):
        made = plan(64, torch.bfloat16, torch.float32, kind == "decay", 64)
        for length, short in ((512, True), (64, False), (513, False)):
            assert (made.piece(batch, length, cuda) is not None) == (short and batch <= 8)
    for pattern in ("none", "rows"):
        leaves, state = inputs(cuda, batch, 1300, 64, 64, torch.bfloat16, kind, 11)
        bos = boundaries(pattern, batch, 1300, cuda)
        whole = run(norm, leaves, state, groups=64, bos=bos, **options)

        def in_pieces(x: Tensor, *parameters: Tensor, bos: Tensor | None, state: NormState | None, **rest: Any) -> Any:
            outputs, sizes = [], [512, 77, 512, 199]
            marks = [None] * len(sizes) if bos is None else bos.split(sizes, 1)
            for part, mark in zip(x.split(sizes, 1), marks, strict=True):
                y, state = norm(part, *parameters, bos=mark, state=state, **rest)
                outputs.append(y)
            return torch.cat(outputs, 1), state

        for _ in range(3):
            poison(cuda)
            compare(run(in_pieces, leaves, state, groups=64, bos=bos, **options), whole, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_runs_give_equal_bits_at_full_size(cuda: torch.device, kind: str) -> None:
    norm, _, options = norm_of(kind)
    leaves, state = inputs(cuda, 2, 16384, 64, 64, torch.bfloat16, kind, 3)
    runs = []
    for _ in range(3):
        poison(cuda)
        runs.append(run(norm, leaves, state, groups=64, **options))
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name
            assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(cuda: torch.device, kind: str) -> None:
    norm, _, options = norm_of(kind)
    leaves, _ = inputs(cuda, 2, 700, 8, 64, torch.float32, kind, 0)
    bos = boundaries("rows", 2, 700, cuda)
    whole = run(norm, leaves, None, groups=8, bos=bos, **options)

    def in_pieces(x: Tensor, weight: Tensor, bias: Tensor, bos: Tensor, state: NormState | None, **rest: Any) -> Any:
        outputs = []
        for part, marks in zip(x.split([1, 64, 300, 2, 333], 1), bos.split([1, 64, 300, 2, 333], 1)):
            y, state = norm(part, weight, bias, bos=marks, state=state, **rest)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    pieces = run(in_pieces, leaves, None, groups=8, bos=bos, **options)
    compare(pieces, whole, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_parameters_strides_and_streams(cuda: torch.device, kind: str) -> None:
    norm, reference, options = norm_of(kind)
    leaves, _ = inputs(cuda, 2, 130, 4, 64, torch.float32, kind, 0)
    x, weight, bias = leaves
    narrow = [t.detach().bfloat16().requires_grad_() for t in (weight, bias)]
    expected = run(reference, *double([x, *narrow], None), groups=4, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        poison(cuda)
        transposed = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        actual = run(norm, [transposed, *narrow], None, groups=4, **options)
    stream.synchronize()
    for name in ("y", "dx"):
        torch.testing.assert_close(actual[name].cpu().double(), expected[name], rtol=1e-4, atol=1e-4)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(actual[name].cpu().double(), expected[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay(cuda: torch.device, kind: str) -> None:
    norm, _, options = norm_of(kind)
    leaves, state = inputs(cuda, 2, 500, 8, 64, torch.bfloat16, kind, 9)
    assert state is not None
    x = leaves[0].detach().clone().requires_grad_()
    bos = boundaries("rows", 2, 500, cuda)

    def step() -> list[Tensor]:
        y, after = norm(x, *leaves[1:], groups=8, bos=bos, state=state, **options)
        grads = torch.autograd.grad(
            [y, after.var], [x, *leaves[1:], state.mean], [torch.ones_like(y), after.var.detach()]
        )
        return [y.detach(), after.mean.detach(), *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("batch", [1, 8, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_begin_early_wait_for_what_they_read(cuda: torch.device, kind: str, batch: int) -> None:
    """Pieces whose x, state and parameters were just written, by a kernel of torch's or by a norm, in one graph."""
    norm, _, options = norm_of(kind)
    leaves, _ = inputs(cuda, batch, 512, 64, 64, torch.bfloat16, kind, 0)
    x, weight, bias = leaves
    slope = torch.randn_like(x)

    def read(settle: Callable[[], None]) -> list[Tensor]:
        found: list[Tensor] = []
        first = second = None
        for step in range(12):
            fresh = (x.detach() * (step + 1)).requires_grad_()
            scale = weight.detach() + step
            settle()
            y, first = norm(fresh, scale, bias, groups=64, state=first, **options)
            settle()
            z, second = norm(y, weight, bias, groups=64, state=second, **options)
            settle()
            (dx,) = torch.autograd.grad(z, fresh, slope)
            settle()
            first, second = (NormState(*(t.detach() for t in state)) for state in (first, second))
            found += [z.detach(), dx, *first, *second]
        return found

    expected = read(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = read(lambda: None)
    for _ in range(20):
        for t in captured:
            t.zero_()
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_checkpoint_and_autocast(cuda: torch.device, kind: str) -> None:
    norm, _, options = norm_of(kind)
    leaves, _ = inputs(cuda, 2, 130, 4, 64, torch.bfloat16, kind, 0)

    def call(*tensors: Tensor) -> Tensor:
        return norm(*tensors, groups=4, **options)[0].float().square().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16):
        found = [
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False), leaves),
        ]
    for got in found:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("batch", "length", "needed"), [(1, 1, 1), (1, 512, 1), (8, 512, 1), (10, 512, 2)])
def test_kernels_of_a_token_and_of_a_piece(cuda: torch.device, batch: int, length: int, needed: int) -> None:
    """One, but where so many rows look back that a kernel has to clear their slots before."""
    if needed == 1 < length and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of blocks")
    leaves, state = inputs(cuda, batch, length, 64, 64, torch.bfloat16, "decay", 10)
    call = lambda: ops.timestep_decay_norm(*leaves, groups=64, eps=EPS, state=state, **DECAY)
    with torch.no_grad():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == needed, [event.name for event in kernels]


def test_plans_cover_whole_tiles() -> None:
    for features in (1, 7, 8, 32, 64, 100, 256, 512, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            made = plan(features, dtype, torch.float32, True, 8)
            assert 1 <= made.tile <= 64
