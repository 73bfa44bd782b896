"""Which implementation runs, on a stand-in for a CUDA tensor."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gecko_lab.kernels import backend, ops

DEVICE = torch.device("cpu")
TENSOR: Any = SimpleNamespace(is_cuda=True, device=DEVICE)


def double(x: Any, *, times: int = 2) -> str:
    """Stands for a reference."""
    return f"reference {times}"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An operation with a kernel for times = 2 only."""
    kernel = SimpleNamespace(
        double=lambda x, *, times=2: f"kernel {times}",
        unsupported=lambda x, *, times=2: None if times == 2 else f"times is {times}",
    )
    monkeypatch.setitem(backend._modules, "toy", kernel)
    monkeypatch.setattr(backend, "_noted", set())
    return kernel


@pytest.mark.usefixtures("module")
def test_auto_prefers_the_kernel_and_says_once_why_not(caplog: pytest.LogCaptureFixture) -> None:
    with backend.use("auto"), caplog.at_level(logging.WARNING):
        assert backend.dispatch("toy", double, TENSOR) == "kernel 2"
        assert backend.dispatch("toy", double, SimpleNamespace(is_cuda=False, device=DEVICE)) == "reference 2"
        assert not caplog.records
        for _ in range(2):
            assert backend.dispatch("toy", double, TENSOR, times=3) == "reference 3"
    assert [record.getMessage() for record in caplog.records] == [
        "double runs its reference, not its CUDA kernel: times is 3"
    ]


@pytest.mark.usefixtures("module")
def test_strict_and_reference() -> None:
    with backend.use("reference"):
        assert backend.dispatch("toy", double, TENSOR) == "reference 2"
    with backend.use("strict"):
        assert backend.dispatch("toy", double, TENSOR) == "kernel 2"
        with pytest.raises(RuntimeError, match="double has no CUDA kernel for this call: times is 3"):
            backend.dispatch("toy", double, TENSOR, times=3)


def test_a_function_may_answer_for_itself(module: Any) -> None:
    module.unsupported_double = lambda x, *, times=2: "never"
    with backend.use("auto"):
        assert backend.dispatch("toy", double, TENSOR) == "reference 2"


def test_a_missing_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_modules", {})
    with backend.use("strict"), pytest.raises(RuntimeError, match="no kernel is written for it"):
        backend.dispatch("runtime", double, TENSOR)


def test_modes() -> None:
    before = backend.get_mode()
    with pytest.raises(KeyError), backend.use("strict"):
        raise KeyError
    assert backend.get_mode() == before
    with pytest.raises(ValueError, match="kernel mode is 'fast'; it must be one of auto, reference, strict"):
        backend.set_mode("fast")


def test_a_wrong_environment_is_refused() -> None:
    environment = {**os.environ, backend.ENVIRONMENT: "fast"}
    done = subprocess.run(
        [sys.executable, "-c", "import gecko_lab.kernels.backend"], env=environment, capture_output=True, text=True
    )
    assert "GECKO_LAB_KERNELS is 'fast'; it must be one of auto, reference, strict" in done.stderr


def test_references_compute_in_their_own_precision_under_autocast() -> None:
    x, w = torch.randn(2, 70, 8), torch.zeros(8)
    want, _ = ops.timestep_decay_norm(x, w, w, groups=4, beta1=0.9, beta2=0.99, eps=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = ops.timestep_decay_norm(x, w, w, groups=4, beta1=0.9, beta2=0.99, eps=1e-5)
    assert torch.equal(got, want)


@pytest.mark.usefixtures("module")
def test_compiled_code_has_no_graph_break() -> None:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(ops.timestep_decay_norm(x, w, w, groups=4, beta1=0.9, beta2=0.99, eps=1e-5)[0], w)

    x, w = torch.randn(2, 70, 8), torch.zeros(8)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(x, w), run(x, w))
