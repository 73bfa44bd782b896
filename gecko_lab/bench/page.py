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

Written by `python -m gecko_lab.bench.page` from the results of the commands under each heading. A floor is the larger
of the bytes that must move over the machine's copy rate and the operations of the matrix products over its product
rate (`gecko_lab/bench/cost.py`), both measured in the same run. Times are ms, medians.
"""


def machine(found: dict[str, Any]) -> list[str]:
    """Where and how a file was measured."""
    rates, versions = found["ceilings"], found["versions"]
    return [
        f"{found['device']}, torch {versions['torch']}, CUDA {versions['cuda']}, {found['dtype']}; copy "
        f"{rates['copy_tbps']:.2f} TB/s (read and write), matrix product {rates['matmul_tflops']:.0f} TFLOP/s. "
        + found.get("note", ""),
        "",
        "```",
        *found.get("commands", [found["command"]]),
        "```",
        "",
    ]


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
    Goal("timestep_decay_norm", "7b-b1-l32768", "fwd", 0.40, 0.25, "most of it is the bytes"),
    Goal("timestep_decay_norm", "7b-b1-l32768", "fwd+bwd", 1.2, 0.7, "most of it is the bytes"),
    Goal("complex_ema", "7b-b1-l32768", "fwd", 1.0, 0.35,
         "a block makes the factors of its channels before its first tile, and its registers leave room for one block"),
    Goal("complex_ema", "7b-b1-l32768", "fwd+bwd", 3.5, 1.2, "the parameters' correlations are almost half of it"),
    Goal("rms_norm", "7b-b1-l32768", "fwd", 0.20, 0.19, "most of it is the bytes"),
    Goal("rms_norm", "7b-b1-l32768", "fwd+bwd", 0.55, 0.48, "most of it is the bytes"),
    Goal("sliding_chunk_attention", "7b-b1-l32768", "fwd", 4.3, 3.3,
         "its products are at 88 % of the product rate; before them the tensor cores wait for exponentials"),
    Goal("sliding_chunk_attention", "7b-b1-l32768", "fwd+bwd", 12.8, 10.0,
         "the kernel of weights and dS waits for exponentials between its products: 490 TFLOP/s (docs/log.md)"),
    Goal("adaptive_working_memory", "7b-b1-l32768", "fwd", 1.4, 1.0,
         "half are small matrix products, a quarter the chain, bound by the bytes of its float32 tables"),
    Goal("adaptive_working_memory", "7b-b1-l32768", "fwd+bwd", 4.0, 2.6,
         "the kernels of the keys' and queries' gradients take 0.9 ms, and the chain reads float32 tables"),
    Goal("gecko_block", "7b-b1-l32768", "fwd+bwd", 98.0, 86.0,
         "the products are at the machine's rate; what is left is attention, memory and the passes over E features"),
    Goal("gecko_block", "7b-b8-l4096", "fwd+bwd", 95.0, 83.0, "the same as for one long row"),
    Goal("gecko_block", "1b-b1-l32768", "fwd+bwd", 36.0, 30.0,
         "at this width products are two thirds of the time, and passes over memory count twice as much as at 7B"),
    Goal("gecko_model", "1b-b1-l32768", "fwd+bwd", 310.0, 265.0,
         "most of it is the blocks; the head makes its logits twice, which `trainer.loss_chunk=0` spares"),
    Goal("decode", "7b-b1-l4096", "fwd", 1.2, 0.85,
         "the weights are read once a step; the rest is the step's chain of small kernels"),
    Goal("decode", "7b-b16-l4096", "fwd", 5.0, 3.0, "keys and values of sixteen rows are read beside the weights"),
    Goal("prefill", "7b-b1-l32768", "fwd", 156.0, 136.5, "its blocks are those of the forward pass above"),
)  # fmt: skip


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the goals that were measured, and what would reach the aims that were not; empty without any."""
    measured = {(r["name"], r["shape"], r["mode"]): r for r in rows if r["backend"] == "cuda"}
    lines = ["| | mode | ms | floor | GiB | reach | aim | |", "|---|---|--:|--:|--:|--:|--:|---|"]
    notes, absent = [], []
    for goal in GOALS:
        name = f"{goal.name} {goal.shape}"
        row = measured.get((goal.name, goal.shape, goal.mode))
        if row is None or row["ms"] is None:
            absent.append(f"{name} {goal.mode}" + ("" if row is None else f" ({row['error']})"))
            continue
        ms = row["ms"]
        word = "aim" if ms <= goal.aim else "reach" if ms <= goal.reach else "missed"
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        cells = [f"{ms:.2f}", f"{row['floor_ms']:.2f}", peak, f"{goal.reach:g}", f"{goal.aim:g}", word]
        lines.append(f"| {name} | {goal.mode} | " + " | ".join(cells) + " |")
        if ms > goal.aim:
            notes.append(f"- {name} {goal.mode}: {ms - goal.aim:.2f} ms above the aim; {goal.hint}.")
    if len(absent) == len(GOALS):
        return []
    if absent:
        notes.append(f"- Not measured in this run: {', '.join(absent)}.")
    return [*lines, "", *notes]


def peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The Llama blocks and the attentions of the baselines, where a file has them."""
    names = ("llama_block", "lab_llama_block", "full_documents", "sliding_window_documents", "chunk_documents")
    found = [r for r in rows if r["name"] in names and r["ms"] is not None]
    if not found:
        return []
    lines = ["", "Baselines of the same run:", "", "| | shape | mode | backend | ms | floor | GiB |",
             "|---|---|---|---|--:|--:|--:|"]  # fmt: skip
    for r in sorted(found, key=lambda r: (names.index(r["name"]), r["shape"], r["mode"])):
        cells = (r["name"], r["shape"], r["mode"], r["backend"], f"{r['ms']:.2f}", f"{r['floor_ms']:.2f}")
        lines.append("| " + " | ".join(cells) + f" | {r['peak_gib'] or 0:.2f} |")
    return lines


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


def page(profile: dict[str, Any], context: dict[str, Any], benches: Sequence[dict[str, Any]], image: str) -> str:
    """docs/performance.md."""
    lines = [TOP]
    for found in benches:
        table = goals(found["rows"])
        title = f"## {'Goals' if table else 'Baselines'}, {found['device']}"
        lines += [title, "", *machine(found), *table, *peers(found["rows"]), ""]
    for found in profile["blocks"][:1]:
        title, _, *rest = block(found)
        lines += [title, "", *machine(profile), *rest, ""]
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
        *machine(context),
        f"![time of a token against the length of the context]({image})",
        "",
        f"One block ({context['shape']}, batch 1), microseconds a token. Inference reads the whole context: Gecko in "
        "pieces with its carried state, Llama in one go where it fits. Training is one forward and backward. Memory "
        "is what the call adds and the input, 8 KiB a token. Calls come from Python: at the shortest lengths a Gecko "
        "block waits for its launches.",
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
    made.add_argument("--bench", type=Path, nargs="*", default=[], help="of gecko_lab.bench, for the tables of goals")
    made.add_argument("--docs", type=Path, default=Path("docs"), help="folder of performance.md (docs)")
    options = made.parse_args(arguments)
    profile, context, *benches = (
        json.loads(path.read_text()) for path in (options.profile, options.context, *options.bench)
    )
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    (options.docs / "images" / "context.svg").write_text(standalone(context_plot(context["rows"])) + "\n")
    (options.docs / "performance.md").write_text(page(profile, context, benches, "images/context.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
