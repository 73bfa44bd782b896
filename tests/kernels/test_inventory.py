"""Every kernel of the package: it is found, compiles for every architecture, and the self check works."""

from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from gecko_lab.kernels import __main__ as command
from gecko_lab.kernels import inventory, ops, selfcheck

EXAMPLES = inventory.examples()


def _compilations() -> list[ParameterSet]:
    return [
        pytest.param(entry, arch, id=f"{entry.folder}-{entry.module.label}-{arch}")
        for entry in inventory.entries()
        for arch in entry.module.archs or inventory.ARCHS
    ]


@pytest.mark.parametrize(("entry", "arch"), _compilations())
def test_compiles_within_the_spill_budget(entry: inventory.Entry, arch: str) -> None:
    info = entry.module.compile(arch)
    assert set(info.resources) == set(entry.module.kernels)
    spills = {kernel: used.spill_stores + used.spill_loads for kernel, used in info.resources.items()}
    assert max(spills.values()) <= entry.spill_budget, spills


def test_every_folder_with_kernels_is_listed() -> None:
    folders = {entry.folder for entry in inventory.entries()}
    assert folders == set(inventory.folders())
    assert "complex_ema" in folders


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.op}-{example.label}")
def test_references_pass_the_check_of_the_kernels(example: inventory.Example) -> None:
    """In float32 against float64 on the CPU: the examples are well formed and the tolerance is sane."""
    outcome = selfcheck.compare(example, torch.float32, getattr(ops, example.op), torch.device("cpu"))
    assert outcome.ok, outcome


def test_the_check_notices_wrong_values_and_wrong_gradients() -> None:
    example = next(example for example in EXAMPLES if example.op == "rms_norm")

    def call(wrong: str) -> selfcheck.Outcome:
        def rms_norm(x: torch.Tensor, *args: torch.Tensor, **kwargs: float) -> torch.Tensor:
            exact = x.dtype is torch.float64
            y = ops.rms_norm(x.detach() if wrong == "gradient" and not exact else x, *args, **kwargs)
            return y * 1.01 if wrong == "value" and not exact else y

        return selfcheck.compare(example, torch.float32, rms_norm, torch.device("cpu"))

    assert call("").ok
    assert not call("value").ok
    assert not call("gradient").ok
    assert call("gradient").forward < 1e-5


def test_a_failing_operation_is_reported_not_raised() -> None:
    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    outcome = selfcheck.compare(EXAMPLES[0], torch.bfloat16, broken, torch.device("cpu"))
    assert not outcome.ok
    assert outcome.failure == "RuntimeError: no such kernel"


def test_list_names_every_operation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main([]) == command.OK
    printed = capsys.readouterr().out
    assert all(entry.folder in printed for entry in inventory.entries())


def test_compile_fails_with_the_log_and_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bad.cu").write_text('extern "C" __global__ void bad() { nonsense; }')
    module = inventory.Module(str(tmp_path / "cuda.py"), "bad.cu", kernels=("bad",))
    monkeypatch.setattr(inventory, "entries", lambda: [inventory.Entry("bad", module)])
    assert command.main(["compile", "--arch", "sm_80"]) == command.FAILED
    assert '"nonsense" is undefined' in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_check_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check"]) == command.NO_GPU
    assert "CUDA device" in capsys.readouterr().out
