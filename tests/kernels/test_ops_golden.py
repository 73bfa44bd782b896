"""Every operation against outputs and gradients of the official implementation (spec sections 1 to 5)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gecko_lab.kernels import ops
from gecko_lab.kernels.types import AttentionState, NormState

GOLDEN: dict[str, dict[str, Any]] = torch.load(Path(__file__).parents[1] / "golden" / "official.pt", weights_only=True)
FORWARD, GRADIENT, BF16 = 1e-5, 1e-3, 4e-3


def named(prefix: str) -> list[str]:
    return [name for name in GOLDEN if name.startswith(prefix)]


def leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone().requires_grad_()


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    kind = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().to(kind), want.to(kind)
    error = float((got - want).norm() / want.norm())
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("name", named("tdn_") + named("tn_"))
def test_timestep_norms(name: str) -> None:
    case = GOLDEN[name]
    x, w, b, mean, var = (leaf(case[k]) for k in ("x", "w", "b", "prev_mean", "prev_var"))
    state = NormState(case["prev_count"], mean, var)
    decayed = name.startswith("tdn_")
    if decayed:
        betas = {k: case[k] for k in ("beta1", "beta2", "eps")}
        y, new = ops.timestep_decay_norm(x, w - 1, b, groups=case["groups"], **betas, bos=case["bos"], state=state)
    else:
        y, new = ops.timestep_norm(x, w - 1, b, groups=case["groups"], eps=case["eps"], state=state)
    ((y * case["gy"]).sum() + (new.mean * case["gm"]).sum() + (new.var * case["gv"]).sum()).backward()
    half = x.dtype == torch.bfloat16
    # the official sums are made with betas rounded to float32 (spec 1.2.1)
    slow = decayed and case["beta2"] > 0.99
    sums = BF16 if half else 5e-4 if slow else FORWARD
    close("y", y, case["y"], BF16 if half else 1e-4 if slow else FORWARD)
    assert torch.equal(new.count, case["count"])
    close("mean", new.mean, case["mean"], sums)
    close("var", new.var, case["var"], sums)
    for got, key in ((x, "dx"), (w, "dw"), (b, "db"), (mean, "dprev_mean"), (var, "dprev_var")):
        close(key, got.grad, case[key], BF16 if half else GRADIENT)


@pytest.mark.parametrize("name", named("cema_"))
def test_complex_ema(name: str) -> None:
    case = GOLDEN[name]
    params = {k: leaf(v) for k, v in case["params"].items()}
    modes = params["alpha"].shape[1]
    p = torch.sigmoid(params["alpha"])
    phase = torch.sigmoid(params["theta"])[:, None] * (math.tau / modes) * torch.arange(1, modes + 1)
    q = torch.polar(1 - p * torch.sigmoid(params["delta"]), phase)
    x, h0 = leaf(case["x"]), leaf(case["h0"])
    y, h = ops.complex_ema(x.transpose(1, 2), p, q, torch.view_as_complex(params["gamma"]), bos=case["bos"], state=h0)
    y = y.transpose(1, 2)
    ((y * case["gy"]).sum() + (h * case["gh"].conj()).real.sum()).backward()
    half = x.dtype == torch.bfloat16
    close("y", y, case["y"], BF16 if half else FORWARD)
    close("h", h, case["h"], FORWARD)
    close("dx", x.grad, case["dx"], BF16 if half else GRADIENT)
    if h0 is not None:
        close("dh0", h0.grad, case["dh0"], GRADIENT)
    for key, value in params.items():
        close(key, value.grad, case["dparams"][key], GRADIENT)


@pytest.mark.parametrize("name", named("sca_"))
def test_sliding_chunk_attention(name: str) -> None:
    case = GOLDEN[name]
    q, k, v, before_k, before_v = (leaf(case[key]) for key in ("q", "k", "v", "prev_k", "prev_v"))
    state = None if before_k is None else AttentionState(before_k, before_v, case["prev_seg"], case["chunk"])
    y, _ = ops.sliding_chunk_attention(q, k, v, chunk=case["chunk"], segments=case["seg"], state=state)
    (y * case["gy"]).sum().backward()
    close("y", y, case["y"], FORWARD)
    for got, key in ((q, "dq"), (k, "dk"), (v, "dv"), (before_k, "dpk"), (before_v, "dpv")):
        if got is not None:
            close(key, got.grad, case[key], GRADIENT)


@pytest.mark.parametrize("name", named("awm_"))
def test_adaptive_working_memory(name: str) -> None:
    case = GOLDEN[name]
    keys = ("aq", "ak", "v", "memory", "log_norm", "prev_k", "prev_v")
    leaves = {key: leaf(case[key]) for key in keys}
    aq, ak, v, before_k, before_v = (
        None if leaves[key] is None else leaves[key].transpose(1, 2) for key in ("aq", "ak", "v", "prev_k", "prev_v")
    )
    state = None
    if before_k is not None:
        state = ops.memory_state(
            leaves["memory"], leaves["log_norm"], before_k, before_v, segments=case["prev_seg"], owner=case["owner"]
        )
    y, new = ops.adaptive_working_memory(aq, ak, v, chunk=case["chunk"], segments=case["seg"], state=state)
    y = y.transpose(1, 2)
    ((y * case["gy"]).sum() + (new.table * case["gm"]).sum() + (new.logz * case["gl"]).sum()).backward()
    close("y", y, case["y"], FORWARD)
    close("table", new.table, case["memory_out"], FORWARD)
    close("logz", new.logz, case["log_norm_out"], FORWARD)
    for key in keys:
        if leaves[key] is not None:
            close(f"d{key}", leaves[key].grad, case[f"d{key}"], GRADIENT)
