"""`python -m gecko_lab.bench.page`: docs/performance.md and its plot, out of the JSON files of a GPU machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..studies.svg import standalone
from .plot import context_plot

TOP = """# Performance

Written by `python -m gecko_lab.bench.page` from the results of these commands:

```
{commands}
```

{device}; torch {torch}, CUDA {cuda}; {dtype}. Ceilings measured there: copy {copy:.2f} TB/s (read and write), matrix
product {matmul:.0f} TFLOP/s. A floor is the larger of the bytes that must move over the one and the operations of the
matrix products over the other (`gecko_lab/bench/cost.py`). Times are ms, medians.
"""


@dataclass(frozen=True)
class Goal:
    """Times in ms of a row of the benchmark, and what would get there where it is missed."""

    name: str
    shape: str
    mode: str
    reach: float
    aim: float
    hint: str


GOALS = (
    Goal("sliding_chunk_attention", "7b-b1-l32768", "fwd", 4.3, 3.3,
         "its products run at the strips' extents; a kernel of the exact causal extent would skip the masked part"),
    Goal("sliding_chunk_attention", "7b-b1-l32768", "fwd+bwd", 12.8, 10.0,
         "scores and their gradients go through memory; fused into the products of dv and dq they would not"),
    Goal("adaptive_working_memory", "7b-b1-l32768", "fwd", 1.4, 1.0,
         "softmaxes over time and features read the keys twice; one pass would do"),
    Goal("adaptive_working_memory", "7b-b1-l32768", "fwd+bwd", 4.0, 2.6,
         "float32 tables and gradients of the softmaxes are written and read again; tables in two bf16 parts would do"),
    Goal("gecko_block", "7b-b1-l32768", "fwd+bwd", 98.0, 86.0,
         "the products are at the machine's rate; what is left is attention, memory and the passes over E features"),
    Goal("gecko_block", "7b-b8-l4096", "fwd+bwd", 95.0, 83.0, "the same as for one long row"),
    Goal("gecko_block", "1b-b1-l32768", "fwd+bwd", 36.0, 30.0,
         "at this width products are two thirds of the time, and passes over memory count twice as much as at 7B"),
    Goal("gecko_model", "1b-b1-l32768", "fwd+bwd", 310.0, 265.0,
         "`trainer.loss_chunk=0` keeps the logits in bfloat16: one product of the head less"),
    Goal("decode", "7b-b1-l4096", "fwd", 1.2, 0.85,
         "the weights are read once a step; the rest is the step's chain of small kernels"),
    Goal("decode", "7b-b16-l4096", "fwd", 5.0, 3.0, "keys and values of sixteen rows are read beside the weights"),
    Goal("prefill", "7b-b1-l32768", "fwd", 156.0, 136.5, "its blocks are those of the forward pass above"),
)  # fmt: skip


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the goals that were measured."""
    measured = {(r["name"], r["shape"], r["mode"]): r for r in rows if r["backend"] == "cuda"}
    lines = ["| | mode | ms | floor | GiB | reach | aim | |", "|---|---|--:|--:|--:|--:|--:|---|"]
    notes = []
    for goal in GOALS:
        row = measured.get((goal.name, goal.shape, goal.mode))
        if row is None or row["ms"] is None:
            reason = "not measured" if row is None else row["error"]
            cells = ["-", "-", "-", f"{goal.reach:g}", f"{goal.aim:g}", reason]
        else:
            ms = row["ms"]
            word = "aim" if ms <= goal.aim else "reach" if ms <= goal.reach else "missed"
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            cells = [f"{ms:.2f}", f"{row['floor_ms']:.2f}", peak, f"{goal.reach:g}", f"{goal.aim:g}", word]
            if ms > goal.aim:
                over = f"{ms - goal.aim:.2f} ms above the aim"
                notes.append(f"- {goal.name} {goal.shape} {goal.mode}: {over}; {goal.hint}.")
        lines.append(f"| {goal.name} {goal.shape} | {goal.mode} | " + " | ".join(cells) + " |")
    return [*lines, "", *notes] if notes else lines


def block(found: dict[str, Any]) -> list[str]:
    """Steps of the block with their floors, then every kernel."""
    gecko, kernels = found["gecko"], found["kernels"]
    total = sum(row["ms"] for row in kernels)
    floors = {(row["step"], row["way"]): row["floor_ms"] for row in found["step_floors"]}
    steps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in kernels:
        steps.setdefault((row["step"], row["way"]), []).append(row)
    lines = [
        f"## The block, forward and backward, {found['shape']}",
        "",
        f"Gecko {gecko['ms']:.1f} ms ({gecko['ms_range'][0]:.1f} to {gecko['ms_range'][1]:.1f}, floor "
        f"{gecko['floor_ms']:.1f}, {gecko['peak_gib']:.2f} GiB); the compiled Llama block of the same width in the "
        f"same run {found['llama']['ms']:.1f} ms ({found['llama']['peak_gib']:.2f} GiB). The kernels: {total:.1f} ms.",
        "",
        "| step | | kernels | ms | share | floor |",
        "|---|---|--:|--:|--:|--:|",
    ]
    ordered = sorted(steps.items(), key=lambda item: -sum(row["ms"] for row in item[1]))
    for (step, way), group in ordered:
        floor = floors.get((step, way))
        if floor is None and all(row["floor_ms"] is not None for row in group):
            floor = sum(row["floor_ms"] for row in group)
        lines.append(f"| {step} | {way} | " + _numbers(group, total, floor))
    lines += [
        "",
        "Every kernel. A floor stands where the operands of the launch tell it: matrix products, additions, copies.",
        "",
        "| step | | kernel | calls | ms | share | floor |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for (step, way), group in ordered:
        for row in group:
            if row["ms"] >= 0.0005 * total:
                lines.append(f"| {step} | {way} | {row['kernel']} | " + _numbers([row], total, row["floor_ms"]))
        small = [row for row in group if row["ms"] < 0.0005 * total]
        if small:
            lines.append(f"| {step} | {way} | {len(small)} more | " + _numbers(small, total, None))
    return lines


def _numbers(group: Sequence[dict[str, Any]], total: float, floor: float | None) -> str:
    ms, calls = sum(row["ms"] for row in group), sum(row["calls"] for row in group)
    return f"{calls:.0f} | {ms:.3f} | {100 * ms / total:.1f} % | {'' if floor is None else f'{floor:.3f}'} |"


def page(profile: dict[str, Any], context: dict[str, Any], bench: dict[str, Any], image: str) -> str:
    """docs/performance.md."""
    sources = [found for found in (bench, profile, context) if found]
    commands = [found["command"] for found in sources]
    if len({found["device"] for found in sources}) > 1:
        raise ValueError(f"results of different devices: {', '.join(str(found['device']) for found in sources)}")
    machine = profile
    top = TOP.format(
        commands="\n".join(commands), device=machine["device"], torch=machine["versions"]["torch"],
        cuda=machine["versions"]["cuda"], dtype=machine["dtype"], copy=machine["ceilings"]["copy_tbps"],
        matmul=machine["ceilings"]["matmul_tflops"],
    )  # fmt: skip
    lines = [top, "## Goals", "", *goals(bench["rows"] if bench else []), ""]
    for found in profile["blocks"][:1]:
        lines += [*block(found), ""]
    others = [
        f"{found['shape']}: Gecko {found['gecko']['ms']:.1f} ms (floor {found['gecko']['floor_ms']:.1f}), "
        f"Llama compiled {found['llama']['ms']:.1f} ms."
        for found in profile["blocks"][1:]
    ]
    if others:
        lines += ["Other shapes in the same run:", "", *(f"- {text}" for text in others), ""]
    lines += [
        "## Time of a token against the length of the context",
        "",
        f"![time of a token against the length of the context]({image})",
        "",
        f"One block ({context['shape']}, batch 1), microseconds a token. Inference reads the whole context: Gecko in "
        "pieces with its carried state, Llama in one go where it fits. Training is one forward and backward.",
        "",
        *context_table(context["rows"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def context_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """us a token (peak GiB) of both families by length."""
    columns = [(f, m) for m in ("inference", "training") for f in ("gecko", "llama")]
    cells = {(r["family"], r["mode"], r["length"]): r for r in rows}
    lines = ["| tokens | " + " | ".join(f"{f}, {m}" for f, m in columns) + " |", "|--:|" + "--:|" * len(columns)]
    for length in sorted({r["length"] for r in rows}):
        parts = []
        for family, mode in columns:
            r = cells.get((family, mode, length))
            if r is None or r["us_per_token"] is None:
                parts.append("" if r is None else r["error"])
                continue
            pieces = ", pieces" if r["how"] != "one go" and family == "llama" else ""
            parts.append(f"{r['us_per_token']:.3g} ({r['peak_gib']:.1f} GiB{pieces})")
        lines.append(f"| {length:,} | " + " | ".join(parts) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the plot."""
    made = argparse.ArgumentParser("python -m gecko_lab.bench.page", description=__doc__)
    results = Path("benchmarks/results")
    made.add_argument("--profile", type=Path, default=results / "profile.json", help="of gecko_lab.bench.profile")
    made.add_argument("--context", type=Path, default=results / "context.json", help="of gecko_lab.bench.context")
    made.add_argument("--bench", type=Path, help="of gecko_lab.bench, for the table of goals")
    made.add_argument("--docs", type=Path, default=Path("docs"), help="folder of performance.md (docs)")
    options = made.parse_args(arguments)
    read = {
        name: json.loads(path.read_text()) if path else {}
        for name, path in (("profile", options.profile), ("context", options.context), ("bench", options.bench))
    }
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    drawn = standalone(context_plot(read["context"]["rows"]))
    (options.docs / "images" / "context.svg").write_text(drawn + "\n")
    text = page(read["profile"], read["context"], read["bench"], "images/context.svg")
    (options.docs / "performance.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
