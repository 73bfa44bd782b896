"""The CUDA norms without a GPU: operators that obey the rules of torch, plans that fit, compilation without spills."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gecko_lab.kernels.row_norm import cuda as row_norm
from gecko_lab.kernels.row_norm import launch as row_launch
from gecko_lab.kernels.row_norm import reference as row_reference
from gecko_lab.kernels.timestep_decay_norm import cuda as decay_norm
from gecko_lab.kernels.timestep_decay_norm import plan as time_plan
from gecko_lab.kernels.timestep_decay_norm import reference as decay_reference
from gecko_lab.kernels.timestep_norm import cuda as plain_norm
from gecko_lab.kernels.timestep_norm import reference as plain_reference
from gecko_lab.kernels.types import NormState

OPS = torch.ops.gecko_lab
BATCH, LENGTH, GROUPS, DIM = 2, 9, 3, 12
BETAS = {"decay": (0.9, 0.99), "plain": (None, None)}
TWINS: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "decay": (
        decay_norm.timestep_decay_norm,
        decay_reference.timestep_decay_norm,
        {"groups": GROUPS, "beta1": 0.9, "beta2": 0.99, "eps": 1e-5},
    ),
    "plain": (plain_norm.timestep_norm, plain_reference.timestep_norm, {"groups": GROUPS, "eps": 1e-5}),
}


def time_inputs() -> tuple[list[Tensor], Tensor, NormState]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, DIM, generator=random)
    parameters = [torch.randn(DIM, generator=random) for _ in range(2)]
    bos = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    bos[0, [3, 4]] = True
    mean, var = torch.randn(BATCH, GROUPS, generator=random), torch.rand(BATCH, GROUPS, generator=random)
    return [x, *parameters], bos, NormState(torch.tensor([3, 5]), mean, var)


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("carried", [False, True])
def test_time_norms_obey_the_rules_of_operators(kind: str, carried: bool) -> None:
    tensors, bos, state = time_inputs()
    past = (bos, *state) if carried else (None, None, None, None)
    options = (GROUPS, *BETAS[kind], 1e-5)
    torch.library.opcheck(OPS.time_norm.default, (*tensors, *past, *options, True))
    outputs = OPS.time_norm(*tensors, *past, *options, True)
    seeds = torch.ones_like(outputs[0]), torch.ones_like(outputs[2]), torch.ones_like(outputs[3])
    kept = (*tensors[:2], *outputs[4:], past[1])
    for after in (seeds[1:], (None, None)):
        torch.library.opcheck(OPS.time_norm_backward.default, (seeds[0], *after, *kept, carried, GROUPS, *BETAS[kind]))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_row_norms_obey_the_rules_of_operators(centered: bool, parameters: int) -> None:
    x, *others = time_inputs()[0]
    weight, bias = (*others[: min(parameters, 1 + centered)], None, None)[:2]
    torch.library.opcheck(OPS.row_norm.default, (x, weight, bias, GROUPS, 1e-5, centered, True))
    y, saved = OPS.row_norm(x, weight, bias, GROUPS, 1e-5, centered, True)
    torch.library.opcheck(
        OPS.row_norm_backward.default, (torch.ones_like(y), x, weight, bias, saved, GROUPS, 1e-5, centered)
    )


def time_twins(kind: str) -> Iterator[tuple[list[Tensor], Tensor, NormState]]:
    """Of the operator, then of the reference: x, weight, bias, mean, var that take gradients, and the outputs."""
    norm, reference, options = TWINS[kind]
    tensors, bos, state = time_inputs()
    for call in (norm, reference):
        leaves = [t.clone().requires_grad_() for t in (*tensors, *state[1:])]
        yield leaves, *call(*leaves[:3], bos=bos, state=NormState(state.count, *leaves[3:]), **options)


@pytest.mark.parametrize("kind", TWINS)
def test_time_norms_have_the_gradients_of_the_reference(kind: str) -> None:
    found = []
    for leaves, y, after in time_twins(kind):
        assert torch.equal(after.count, torch.tensor([5, 14]))
        total = y.square().sum() + after.mean.sum() + after.var.square().sum()
        found.append([y, after.mean, after.var, *torch.autograd.grad(total, leaves)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("used", ["y", "mean", "var"])
def test_time_norms_of_which_one_output_is_used(kind: str, used: str) -> None:
    found = []
    for leaves, y, after in time_twins(kind):
        output = {"y": y, "mean": after.mean, "var": after.var}[used]
        gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
        found.append([torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("clusters", [True, False])
def test_plans_suit_the_number_of_rows(monkeypatch: pytest.MonkeyPatch, clusters: bool) -> None:
    """At the 7B shape: a cluster a group for up to eight rows of a piece, more rows and longer ones look back."""
    monkeypatch.setattr(time_plan, "limits", lambda _: (132, clusters, 227 * 1024))
    device = torch.device("cuda")

    def taken(features: int, dtype: torch.dtype, rows: int, length: int) -> bool:
        made = time_plan.plan(features, dtype, torch.float32, True, 64)
        return made.piece(rows, length, device) is not None

    few = [clusters] * 3
    assert [taken(64, torch.bfloat16, rows, 512) for rows in (1, 4, 8, 9, 32)] == [*few, False, False]
    assert [taken(64, torch.bfloat16, 4, length) for length in (65, 300, 512, 1, 64, 513)] == [*few, *[False] * 3]
    for features, dtype in ((64, torch.float32), (8, torch.float32), (128, torch.bfloat16)):
        assert taken(features, dtype, 3, 512) == clusters
    for features, dtype in ((7, torch.float32), (100, torch.bfloat16), (512, torch.bfloat16), (2, torch.float32)):
        assert not taken(features, dtype, 3, 512)
    monkeypatch.setattr(time_plan, "limits", lambda _: (132, clusters, 99 * 1024))
    assert taken(64, torch.bfloat16, 1, 512) == clusters
    assert not taken(64, torch.float32, 1, 512)


@pytest.mark.parametrize("kind", TWINS)
def test_time_norms_compile_and_recompute(kind: str) -> None:
    norm, _, options = TWINS[kind]
    tensors, bos, state = time_inputs()
    leaves = [t.requires_grad_() for t in tensors]

    def call(*leaves: Tensor) -> Tensor:
        return norm(*leaves, bos=bos, state=state, **options)[0].square().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *leaves: checkpoint(call, *leaves, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(other(*leaves), leaves), want)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_row_norms_compile_and_match_the_reference(kind: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in time_inputs()[0])
    leaves = [x, weight] + [bias] * (kind == "layer_norm")

    def call(module: Any) -> Tensor:
        return getattr(module, kind)(*leaves, groups=GROUPS, eps=1e-5).square().sum()

    want = torch.autograd.grad(call(row_reference), leaves)
    torch.testing.assert_close(torch.autograd.grad(call(row_norm), leaves), want)
    compiled = torch.compile(lambda: call(row_norm), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(), leaves), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3, 64])
def test_plans_hold_every_feature_once(dtype: torch.dtype, groups: int) -> None:
    for features in (1, 2, 7, 8, 20, 32, 64, 96, 100, 256, 512, 1000, 2048, 4096):
        size = {"D/groups": features, "dtype": dtype}
        x = torch.empty(1, 1, groups * features, dtype=dtype)
        parameters = torch.empty(groups * features)
        if decay_norm.unsupported(x, parameters, parameters, groups=groups, beta1=0.9, beta2=0.9, eps=0) is None:
            plan = time_plan.plan(features, dtype, torch.float32, True, groups)
            d = {key: int(value) for key, value in plan.defines.items() if key not in ("INPUT", "PARAMETER")}
            assert d["LANES"] * d["VECTORS"] * d["VECTOR"] >= features, size
            assert d["VECTORS"] <= time_plan.VECTORS_A_LANE, size
            assert features % d["VECTOR"] == 0, size
            assert d["THREADS"] % (d["LANES"] * d["GROUPS"]) == 0, size
            assert 1 <= plan.tile <= 64, size
            assert plan.strips * d["GROUPS"] >= groups, size
        if row_norm.unsupported(x, parameters, groups=groups) is None:
            made = row_launch.plan(features, dtype, torch.float32, False, groups)
            d = {key: int(value) for key, value in made.defines.items() if key not in ("INPUT", "PARAMETER")}
            assert d["LANES"] * d["VECTORS"] * d["VECTOR"] >= features, size
            assert d["LANES"] <= 32 or d["LANES"] == d["THREADS"], size
            assert d["THREADS"] <= row_launch.MOST_THREADS, size
            assert d["THREADS"] % (d["LANES"] * d["GROUPS"]) == 0, size


def test_unsupported_calls_say_why() -> None:
    x, weight, bias = time_inputs()[0]
    options = {"groups": GROUPS, "eps": 1e-5}
    assert plain_norm.unsupported(x, weight, bias, **options) is None
    assert "float16" in str(plain_norm.unsupported(x.half(), weight, bias, **options))
    assert "bias" in str(plain_norm.unsupported(x, weight, bias.bfloat16(), **options))
    wide = torch.empty(1, 1, 50_000)
    assert "50000" in str(plain_norm.unsupported(wide, wide[0, 0], wide[0, 0], groups=1, eps=1e-5))
    assert row_norm.unsupported(x, weight, bias, groups=GROUPS) is None
    assert "float64" in str(row_norm.unsupported(x, weight.double()))
    assert "50000" in str(row_norm.unsupported(wide))
    assert "at least one" in str(row_norm.unsupported(x[:0]))


@pytest.mark.parametrize("features", [32, 64, 512])
def test_time_norms_compile_without_spills(features: int) -> None:
    for decayed in (True, False):
        module = time_plan.plan(features, torch.bfloat16, torch.float32, decayed, 64).module
        for kernel, used in module.compile("sm_90a").resources.items():
            assert used.spill_stores == 0, (module.label, kernel)
            assert used.registers <= 128, (module.label, kernel)


@pytest.mark.parametrize("features", [256, 2048, 4096])
def test_row_norms_compile_without_spills(features: int) -> None:
    for centered in (True, False):
        module = row_launch.plan(features, torch.bfloat16, torch.float32, centered, 1).module
        for kernel, used in module.compile("sm_90a").resources.items():
            assert used.spill_stores == 0, (module.label, kernel)
            assert used.registers <= 128, (module.label, kernel)
