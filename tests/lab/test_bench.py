"""The benchmark command: its JSON, its costs, and that what goes wrong becomes a row."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gecko_lab.bench import cost
from gecko_lab.bench.__main__ import main
from gecko_lab.bench.cases import CASES, Case, Job
from gecko_lab.bench.clock import Ceilings, measure
from gecko_lab.bench.llama import LlamaModel
from gecko_lab.bench.rows import Bench, distance
from gecko_lab.bench.sizes import SIZES, Size

TINY, SEVEN = SIZES["tiny"], SIZES["7b-b1-l32768"]
CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, torch.float32, Ceilings(0.01, 0.1), seconds=5.0, repeats=3)


def test_a_run_writes_a_row_for_every_combination(tmp_path: Path) -> None:
    out = tmp_path / "results" / "run.json"
    ops = "rms_norm,gate,z_views,llama_block"
    assert main(["--device", "cpu", "--ops", ops, "--shapes", "tiny", "--backends", "reference,cuda", "--repeats", "3",
                 "--out", str(out)]) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert set(found) == {"device", "versions", "command", "dtype", "ceilings", "rows"}
    assert found["versions"]["torch"] == torch.__version__
    assert min(found["ceilings"].values()) > 0
    assert len(found["rows"]) == 3 * 2 * 2 + 2
    for row in found["rows"]:
        assert list(row) == [
            "name", "shape", "mode", "backend", "ms", "ms_range", "peak_gib", "floor_ms", "error",
        ]  # fmt: skip
        assert row["floor_ms"] > 0
        if row["backend"] == "cuda":
            assert (row["ms"], row["error"]) == (None, "no CUDA device")
        else:
            assert row["error"] is None
            assert 0 < row["ms_range"][0] <= row["ms"] <= row["ms_range"][1]


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_made_and_has_gradients(name: str) -> None:
    size = replace(TINY, batch=1, length=48, layers=1)
    job = CASES[name].make(size, CPU, torch.float32)
    out = job.call(*job.inputs)
    assert min(CASES[name].bytes(size, 2)[: len(CASES[name].modes)]) > 0
    if "fwd+bwd" not in CASES[name].modes:
        return
    gradients = torch.autograd.grad(out, job.inputs + job.parameters, [torch.ones_like(y) for y in out])
    assert all(torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all() for g in gradients)


def test_unknown_names_are_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--ops", "rms_nrm"])
    assert "rms_norm" in capsys.readouterr().err


def test_a_case_that_fails_or_takes_too_long_is_a_row(bench: Bench) -> None:
    def fail(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
        raise torch.OutOfMemoryError("no")

    def dawdle(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
        while True:
            time.sleep(0.01)

    case = Case("rms_norm", fail, cost.norm_bytes, cost.no_flops)
    assert bench.row(case, TINY, "fwd", "reference").error == "out of memory"
    bench.seconds = 0.2
    row = bench.row(replace(case, make=dawdle), TINY, "fwd", "reference")
    assert row.ms is None
    assert "limit of 0.2 s" in (row.error or "")


def test_a_kernel_that_disagrees_is_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gecko_lab.kernels import backend

    def make(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
        scale = torch.ones((), requires_grad=True)
        return Job(lambda x: (x * (1.0 if backend.get_mode() == "reference" else wrong),), (scale,))

    case = Case("rms_norm", make, cost.norm_bytes, cost.no_flops)
    wrong = 1.1
    assert "from the reference" in (bench._compare(case, TINY) or "")
    wrong = 1.0
    assert bench._compare(case, TINY) is None


def test_a_stream_is_compared_from_its_start_and_has_a_rate(bench: Bench) -> None:
    from gecko_lab.bench.__main__ import _found

    case = CASES["decode"]
    assert bench._compare(case, TINY) is None
    row = bench.row(case, TINY, "fwd", "reference")
    assert row.error is None
    assert row.ms is not None
    assert _found(row).endswith(f"{2e3 / row.ms:,.0f} tokens/s")


def test_distance_sees_one_wrong_tensor_and_nan() -> None:
    a, b = torch.ones(4), torch.full((4,), 1e-3)
    assert distance([[a, b]], [[a, b]], together=False) == 0
    assert distance([[a, 2 * b]], [[a, b]], together=False) == pytest.approx(1)
    assert distance([[a, 2 * b]], [[a, b]], together=True) < 2e-3
    assert distance([[a * float("nan")]], [[a]], together=True) == float("inf")


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (7, 4), (8, 4), (13, 4), (12, 5)])
def test_visible_pairs_are_those_of_the_mask(length: int, chunk: int) -> None:
    counted = sum(t - chunk * max(t // chunk - 1, 0) + 1 for t in range(length))
    assert cost.visible_pairs(length, chunk) == counted


def test_costs_are_those_of_the_designs() -> None:
    assert cost.gecko_weights(SEVEN) == 222_298_112
    assert cost.attention_flops(SEVEN, 2) == pytest.approx((1.86e12, 3.92e12), rel=0.05)
    assert cost.memory_flops(SEVEN, 2) == pytest.approx((0.31e12, 0.62e12), rel=0.02)
    weights, state = 4 * 222_298_112 + 4096 * 32000, 2049 * 9216 * 2 + 1024 * 2048 * 4 + 2**20
    for batch, name in ((1, "7b-b1-l4096"), (16, "7b-b16-l4096")):
        assert cost.decode_bytes(SIZES[name], 2)[0] == 2 * weights + 4 * batch * state
    assert cost.norm_bytes(SEVEN, 2) == (2 * 268_435_456, 3 * 268_435_456)
    assert Ceilings(3.0, 732.0).floor_ms(3 * 10**9, 0) == pytest.approx(1.0)
    assert Ceilings(3.0, 732.0).floor_ms(0, 732 * 10**9) == pytest.approx(1.0)


def test_the_peer_is_causal_and_has_llamas_size() -> None:
    torch.manual_seed(0)
    model = LlamaModel(64, 4, 96, 2, 257)
    tokens = torch.randint(257, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 257
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])
    with torch.device("meta"):
        block = LlamaModel(4096, 32, 11008, 1, 32000).blocks[0]
    assert sum(p.numel() for p in block.parameters()) == 202_383_360


def test_measure_counts_every_repeat() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), CPU, repeats=5, seconds=1.0)
    assert len(calls) == 6
    assert timing.peak_gib is None
    assert timing.ms_range[0] <= timing.ms <= timing.ms_range[1]
