"""The GPU path of the attention and the memory, run on the CPU: all of it but the text of the .cu files."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gecko_lab.kernels import products
from gecko_lab.kernels.adaptive_working_memory import cuda as memory
from gecko_lab.kernels.adaptive_working_memory.reference import adaptive_working_memory
from gecko_lab.kernels.sliding_chunk_attention import cuda as attention
from gecko_lab.kernels.sliding_chunk_attention import fused, plan
from gecko_lab.kernels.sliding_chunk_attention.reference import sliding_chunk_attention

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, int]]] = {
    "attention": (attention.sliding_chunk_attention, sliding_chunk_attention, {}),
    "memory": (memory.adaptive_working_memory, adaptive_working_memory, {"lag": 2}),
    "memory, lag 1": (memory.adaptive_working_memory, adaptive_working_memory, {"lag": 1}),
    "memory, lag 3": (memory.adaptive_working_memory, adaptive_working_memory, {"lag": 3}),
}
CUTS = {
    "whole": lambda c: [5 * c + 3],
    "pieces": lambda c: [c + 2, 3, c - 5, c, 1, 2 * c, 2],
    "chunks": lambda c: [c, 2 * c, c],
    "tokens": lambda c: [1, 1, 1],
    "to a boundary": lambda c: [c - 1, 1],
}


def inputs(
    length: int, chunk: int, documents: bool, sizes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    batch, heads, features, width = sizes
    random = torch.Generator().manual_seed(length + chunk + features)
    x = [torch.randn(batch, length, heads, size, generator=random) for size in (features, features, width)]
    bos = torch.rand(batch, length, generator=random) < 0.04
    bos[:, chunk - 1 : chunk + 1] = True
    return tuple(x), bos.to(torch.int64).cumsum(1) if documents else None


def run(
    function: Callable[..., Any], x: tuple[Tensor, ...], cuts: list[int], segments: Tensor | None, **options: int
) -> list[Tensor]:
    """Output, final state and the gradients of a loss over both, the state carried from piece to piece."""
    leaves = [t.detach().requires_grad_() for t in x]
    state, outputs = None, []
    for at, size in zip(torch.tensor([0, *cuts]).cumsum(0).tolist(), cuts):
        ids = None if segments is None else segments[:, at : at + size]
        y, state = function(*(t[:, at : at + size] for t in leaves), segments=ids, state=state, **options)
        outputs.append(y)
    found = [torch.cat(outputs, 1), *(t for t in state if isinstance(t, Tensor))]  # type: ignore[union-attr]
    loss = sum((t * (1 + torch.arange(t.numel()) % 3).reshape(t.shape)).sum() for t in found if t.requires_grad)
    return [*found, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(2, 2, 8, 12), (1, 3, 33, 5)], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", PAIRS)
def test_any_cut_agrees_with_the_reference(op: str, cut: str, documents: bool, sizes: tuple[int, ...]) -> None:
    ours, theirs, options = PAIRS[op]
    chunk = 16 if sizes[0] == 2 else 7
    cuts = CUTS[cut](chunk)
    x, segments = inputs(sum(cuts), chunk, documents, sizes)
    wanted = run(theirs, tuple(t.double() for t in x), [sum(cuts)], segments, chunk=chunk, **options)
    got = run(ours, x, cuts, segments, chunk=chunk, **options)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def test_groups_and_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, segments = inputs(700, 128, True, (2, 2, 4, 6))
    options = {"chunk": 128}
    wanted = run(attention.sliding_chunk_attention, x, [300, 400], segments, **options)
    assert len(list(fused.groups(x[0], x[1], 128, 2))) == 1
    monkeypatch.setattr(fused, "BUDGET", 900_000)
    assert len(list(fused.groups(x[0], x[1], 128, 2))) > 4
    monkeypatch.setattr(products, "_WORTH_A_LAUNCH", 0)
    for a, b in zip(run(attention.sliding_chunk_attention, x, [300, 400], segments, **options), wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "end", "chunk"), [(0, 512, 128), (37, 400, 128), (250, 251, 128), (5, 41, 8)])
def test_the_plan_covers_every_visible_pair_once(first: int, end: int, chunk: int) -> None:
    t, j = torch.arange(first, end)[:, None], torch.arange(end)
    visible = (j <= t) & (j >= (t // chunk - 1).clamp(min=0) * chunk)
    band = plan.Band(first, end, chunk)
    places = set()
    for cut, step in itertools.product((plan.row_strips, plan.key_strips), (0, chunk)):
        rectangles = cut(first, end, chunk, step)
        count = torch.zeros(end - first, end)
        for r in rectangles:
            for n in range(r.count):
                row, key = r.row + n * chunk, r.key + n * chunk
                count[row - first : row - first + r.rows, key : key + r.keys] += 1
        assert bool((count[visible] == 1).all())
        assert int(count.max()) == 1
        places |= {(r.row - first) * 2 * chunk + r.key - band.base == band.offset(r) for r in rectangles}
    assert places == {True}


def test_dropped_keys_are_random_and_the_same_in_backward() -> None:
    torch.manual_seed(1)
    q, k = torch.zeros(2, 256, 2, 4), torch.zeros(2, 256, 2, 4)
    v = torch.eye(256).expand(2, 256, 256)[:, :, None].expand(-1, -1, 2, -1).clone().requires_grad_()
    y, _ = attention.sliding_chunk_attention(q, k, v, chunk=128, dropout=0.25)
    kept = y.detach() > 0
    t, j = torch.arange(256)[:, None], torch.arange(256)
    seen = ((j <= t) & (j >= (t // 128 - 1).clamp(min=0) * 128)).expand(2, 2, -1, -1).transpose(1, 2)
    assert not bool((kept & ~seen).any())
    rate = float(kept[seen].double().mean())
    assert abs(rate - 0.75) < 5 * (0.25 * 0.75 / int(seen.sum())) ** 0.5
    rows = y.detach().sum(-1)
    torch.testing.assert_close(rows, (rows > 0.5).to(rows.dtype))
    (grad,) = torch.autograd.grad(y, v, torch.ones_like(y))
    torch.testing.assert_close(grad[..., 0], y.detach().sum(1).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert float((kept[0] ^ kept[1]).double().mean()) > 0.05
    again, _ = attention.sliding_chunk_attention(q, k, v, chunk=128, dropout=0.25)
    assert not torch.equal(again, y)


def test_a_row_without_keys_gives_zero() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1, 4, requires_grad=True) for _ in range(3))
    y, _ = attention.sliding_chunk_attention(q, k, v, chunk=8, dropout=0.9)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert bool((y == 0).all(-1).any())
    assert all(bool(torch.isfinite(t).all()) for t in (y, *grads))


@pytest.mark.parametrize("op", PAIRS)
def test_compile_and_checkpoint(op: str) -> None:
    function, _, options = PAIRS[op]
    x, segments = inputs(40, 16, True, (1, 2, 4, 6))
    leaves = [t.requires_grad_() for t in x]

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, chunk=16, segments=segments, **options)[0]  # type: ignore[no-any-return]

    wanted = torch.autograd.grad(output(*leaves).square().sum(), leaves)
    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")
    for y in (compiled(*leaves), checkpoint(output, *leaves, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), wanted):
            torch.testing.assert_close(a, b)


def test_operators_pass_opcheck() -> None:
    x, segments = inputs(40, 16, True, (2, 2, 4, 6))
    starts = attention.document_starts(segments)
    q, k, v = x
    ops = torch.ops.gecko_lab
    _, lse = ops.sliding_chunk_attention(q, k, v, starts, None, 16, 0.0)
    torch.library.opcheck(ops.sliding_chunk_attention.default, (q, k, v, starts, None, 16, 0.0))
    dy = torch.randn_like(v)
    torch.library.opcheck(ops.sliding_chunk_attention_backward.default, (dy, q, k, v, None, lse, starts, None, 16, 0.0))
    lam, mix, target = ops.memory_sums(k[:, :32], v[:, :32], None, 2)
    torch.library.opcheck(ops.memory_sums.default, (k[:, :32], v[:, :32], None, 2))
    sums = (k[:, :32], v[:, :32], lam, mix, target, None)
    torch.library.opcheck(ops.memory_sums_backward.default, (lam, mix, target, *sums))
    keep, live = torch.ones(2, 2), torch.ones(2, 40, dtype=torch.bool)
    given = (q, lam, mix, target, keep, None, None, live, 16, 0, 1)
    *_, rho, tables = ops.memory_table(*given)
    torch.library.opcheck(ops.memory_table.default, given)
    torch.library.opcheck(
        ops.memory_table_backward.default,
        (dy, None, None, q, mix, keep, rho, tables, live, 16, 0, 1),
    )


def test_unsupported_names_the_reason() -> None:
    x = torch.zeros(1, 4, 1, 4)
    assert attention.unsupported(x, x, x, chunk=4) is None
    assert memory.unsupported(x, x, x, chunk=4) is None
    assert "float64" in str(attention.unsupported(x.double(), x, x, chunk=4))
    assert "chunk=99999" in str(attention.unsupported(x, x, x, chunk=99999))
    wide = torch.zeros(1, 4, 1, 2000)
    assert "S=2000" in str(memory.unsupported(wide, wide, x, chunk=4))
