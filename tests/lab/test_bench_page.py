"""The performance page: kernels find their steps and floors, and the page and the plot say what was measured."""

import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from gecko_lab.bench import cost, page
from gecko_lab.bench.clock import Ceilings
from gecko_lab.bench.kernels import readable, rows, step_floor
from gecko_lab.bench.plot import context_plot
from gecko_lab.bench.sizes import SIZES, packed

SEVEN, CEILINGS = SIZES["7b-b1-l32768"], Ceilings(3.0, 700.0)
Kernel = namedtuple("Kernel", "name duration")


def event(*names: str, shapes: list[list[int]] | None = None, kernels: list[Kernel] | None = None) -> SimpleNamespace:
    """An operator inside others, the outermost first; it launched these kernels."""
    at = None
    for name in names:
        at = SimpleNamespace(name=name, cpu_parent=at, input_shapes=[], kernels=[])
    at.input_shapes, at.kernels = shapes or [], kernels or []
    return at


def test_kernels_find_their_step_and_floor() -> None:
    product = Kernel("nvjet_sm90_tst_256x128", 3000.0)
    add = Kernel("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<bf16> >(int)", 600.0)
    found = rows(
        [
            event("_Linears", "aten::addmm", shapes=[[8192], [32768, 4096], [4096, 8192]], kernels=[product]),
            event("_LinearsBackward", "aten::mm", shapes=[[8192, 32768], [32768, 4096], []], kernels=[product]),
            event("_GatedFeedForwardBackward", "aten::addmm_", shapes=[[32768, 4096], [32768, 8192], [8192, 4096]],
                  kernels=[product]),
            event("gecko_lab::sliding_chunk_attention", "aten::bmm", shapes=[[8, 2048, 256], [8, 256, 2048], []],
                  kernels=[product, Kernel("Memset (Device)", 1.0)]),
            event("gecko_lab::swiglu_again", kernels=[Kernel("void backward<true, true>(bf16*)", 1000.0)] * 2),
            event("aten::add", shapes=[[1, 32768, 4096], [1, 32768, 4096], []], kernels=[add]),
        ],
        SEVEN, CEILINGS, passes=2,
    )  # fmt: skip
    by = {(r.step, r.way, r.kernel): r for r in found}
    wide = 2 * 32768 * 4096 * 8192 / 700e12 * 1e3 / 2
    for way, kernel in (("forward", "v, r, output: D x E"), ("backward", "v, r, output: D x E, of weights"),
                        ("backward", "feed-forward, of inputs")):
        row = by["matrix products", way, kernel]
        assert (row.calls, row.ms) == (0.5, 1.5)
        assert row.floor_ms == pytest.approx(wide)
    attention = by["sliding chunk attention", "forward", "cuBLAS product"]
    assert attention.floor_ms == pytest.approx(CEILINGS.floor_ms(2 * 8 * (2 * 2048 * 256 + 2048**2), 0) / 2)
    assert by["sliding chunk attention", "forward", "memset"].floor_ms == 0
    gates = by["gates", "backward", "backward"]
    assert (gates.calls, gates.ms, gates.floor_ms) == (1.0, 1.0, None)
    assert by["additions, sums, copies", "forward", "addition"].floor_ms == pytest.approx(
        CEILINGS.floor_ms(3 * SEVEN.tokens * 4096 * 2, 0) / 2
    )
    assert step_floor("gates", "forward", SEVEN, CEILINGS) == pytest.approx(
        CEILINGS.floor_ms(SEVEN.tokens * (6 * 8192 + 3 * 8192) * 2, 0)
    )
    assert step_floor("matrix products", "forward", SEVEN, CEILINGS) is None


@pytest.mark.parametrize(("kernel", "name"), [
    ("void filter<false>(bf16 const*, int)", "filter"), ("softmax_rows", "softmax_rows"),
    ("void at::native::reduce_kernel<128, 4>", "sum"), ("Memcpy DtoD (Device -> Device)", "memcpy"),
    ("sm90_xmma_gemm_bf16", "cuBLAS product"),
])  # fmt: skip
def test_names_of_kernels(kernel: str, name: str) -> None:
    assert readable(kernel) == name


def test_pairs_of_the_baselines_are_those_of_their_masks() -> None:
    size = SIZES["tiny"]
    time = torch.arange(size.length)
    see = (time <= time[:, None]) & (time // packed(size) == time[:, None] // packed(size))
    flops = 4 * size.batch * size.dim
    assert cost.full_flops(size, 2)[0] == flops * int(see.sum())
    assert cost.window_flops(size, 2) == cost.full_flops(size, 2)
    see &= time // size.chunk == time[:, None] // size.chunk
    assert cost.chunk_flops(size, 2)[0] == flops * int(see.sum())


def results(folder: Path) -> list[str]:
    """Made-up files of the three commands, and the options of the page."""
    head = {"device": "Some GPU", "versions": {"torch": "2", "cuda": "13", "python": "3"}, "command": "python -m x",
            "dtype": "bfloat16", "ceilings": {"copy_tbps": 3.0, "matmul_tflops": 700.0}}  # fmt: skip
    kernel = {"step": "gates", "way": "forward", "kernel": "forward", "calls": 2.0, "ms": 1.5, "floor_ms": None}
    time = {"ms": 90.0, "ms_range": [89.0, 91.0], "peak_gib": 7.0, "floor_ms": 60.0}
    one = {"shape": "7b-b1-l32768", "gecko": time, "llama": {**time, "ms": 120.0}, "kernels": [kernel],
           "step_floors": [{"step": "gates", "way": "forward", "floor_ms": 1.25}]}  # fmt: skip
    points = [
        {"family": f, "mode": m, "length": n, "how": "one go", "us_per_token": u * n**p, "peak_gib": 1.0, "error": None}
        for n in (2048, 4096, 8192) for f, p in (("gecko", 0), ("llama", 0.5))
        for m, u in (("inference", 1.0), ("training", 3.0))
    ]  # fmt: skip
    points[-1].update(us_per_token=None, error="out of memory")
    row = {"name": "gecko_block", "shape": "7b-b1-l32768", "mode": "fwd+bwd", "backend": "cuda", "error": None, **time}
    files = {"profile": {**head, "blocks": [one, {**one, "shape": "1b"}]}, "bench": {**head, "rows": [row]},
             "context": {**head, "shape": "7b", "rows": points}}  # fmt: skip
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return [part for name in files for part in (f"--{name}", str(folder / f"{name}.json"))]


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    assert page.main([*results(tmp_path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "performance.md").read_text()
    for part in (
        "| gecko_block 7b-b1-l32768 | fwd+bwd | 90.00 | 60.00 | 7.00 | 98 | 86 | reach |", "4.00 ms above the aim",
        "| gates | forward | 2 | 1.500 | 100.0 % | 1.250 |", "Gecko 90.0 ms (89.0 to 91.0", "120.0 ms", "Some GPU",
        "| 8,192 | 1 (1.0 GiB) |", "out of memory", "Not measured in this run: timestep_decay_norm",
        "- 1b: Gecko 90.0 ms", "images/context.svg",
    ):  # fmt: skip
        assert part in text, part
    drawn = ElementTree.parse(tmp_path / "images" / "context.svg").getroot()
    words = ["".join(t.itertext()) for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"2K", "8K", "Gecko, reading", "Llama, forward and backward"} <= set(words)


def test_each_heading_names_its_machine(tmp_path: Path) -> None:
    options = results(tmp_path)
    other = json.loads((tmp_path / "bench.json").read_text())
    row = {**other["rows"][0], "name": "lab_llama_block", "backend": "compiled"}
    (tmp_path / "other.json").write_text(
        json.dumps({**other, "device": "Another", "rows": [row], "commands": ["python -m a", "python -m b"]})
    )
    at = options.index("--bench") + 2
    options.insert(at, str(tmp_path / "other.json"))
    assert page.main([*options, "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "performance.md").read_text()
    assert "## Goals, Some GPU" in text
    assert "## Baselines, Another" in text
    assert "python -m a\npython -m b\n" in text
    assert "| lab_llama_block | 7b-b1-l32768 | fwd+bwd | compiled | 90.00 | 60.00 | 7.00 |" in text
    with pytest.raises(ValueError, match="nothing to draw"):
        context_plot([])
