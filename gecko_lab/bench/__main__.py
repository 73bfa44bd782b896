"""`python -m gecko_lab.bench`: time operations, blocks and models; print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import CASES
from .clock import Ceilings, ceilings
from .machine import header
from .rows import BACKENDS, MODES, Bench, Row
from .sizes import SIZES

EPILOG = f"""operations, blocks and models: {", ".join(CASES)}.
shapes: {", ".join(SIZES)}.
decode: a step of one token a row after a stream of the shape's length; prefill: reading it, the last logits only.
backends: reference (plain PyTorch; eager for the Llama peer), compiled (torch.compile of it), cuda (our kernels).
A kernel is timed only after it agrees with the reference on a short input. A row that fails has an error, not a time.
floor: the larger of bytes over the copy rate and matrix operations over the matmul rate, both measured first.
Times are medians of CUDA events (a clock on a CPU) with the least and the most; memory is what the call adds."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m gecko_lab.bench",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_gpu = torch.cuda.is_available()
    made.add_argument("--ops", type=_names(CASES), default=list(CASES), help="names separated by commas (all)")
    default = "7b-b1-l32768" if on_gpu else "tiny"
    made.add_argument("--shapes", type=_names(SIZES), default=[default], help=f"shapes separated by commas ({default})")
    made.add_argument("--mode", type=_names(MODES), default=list(MODES), help="fwd, fwd+bwd or both (both)")
    made.add_argument("--backends", type=_names(BACKENDS), default=list(BACKENDS), help="backends (all)")
    made.add_argument("--device", default="cuda" if on_gpu else "cpu", help="device (the GPU where there is one)")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="of activations (bfloat16; float32 on a CPU)")
    made.add_argument("--seconds", type=float, default=120.0, help="limit of one row, compilation included (120)")
    made.add_argument("--repeats", type=int, default=20, help="most repeats of one row (20)")
    made.add_argument("--out", type=Path, help="JSON file, rewritten after every row")
    return made


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not among {', '.join(known)}")
        return names

    return parse


def document(
    device: torch.device, dtype: torch.dtype, command: str, measured: Ceilings, rows: list[Row]
) -> dict[str, Any]:
    """The JSON of a run; benchmarks/README.md describes it."""
    return {**header(device, dtype, command, measured), "rows": [asdict(row) for row in rows]}


def table(rows: list[Row], measured: Ceilings) -> Table:
    """What a person reads."""
    made = Table(title=f"copy {measured.copy_tbps:.2f} TB/s, matmul {measured.matmul_tflops:.0f} TFLOP/s")
    for column in ("name", "shape", "mode", "backend"):
        made.add_column(column)
    for column in ("ms", "range", "x floor", "GiB"):
        made.add_column(column, justify="right")
    made.add_column("error")
    for row in rows:
        cells = [row.name, row.shape, row.mode, row.backend]
        if row.ms is None or row.ms_range is None:
            made.add_row(*cells, "", "", "", "", row.error, style="dim")
            continue
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        spread = f"{row.ms_range[0]:.3f}-{row.ms_range[1]:.3f}"
        made.add_row(*cells, f"{row.ms:.3f}", spread, f"{row.ms / row.floor_ms:.1f}", peak, "")
    return made


def _found(row: Row) -> str:
    """The time, and the tokens a second of a case that makes or reads them."""
    assert row.ms is not None
    made = CASES[row.name].made
    rate = "" if made is None else f", {1e3 * made(SIZES[row.shape]) / row.ms:,.0f} tokens/s"
    return f"{row.ms:.3f} ms{rate}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 unless the command line is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    measured = ceilings(device, dtype)
    bench = Bench(device, dtype, measured, options.seconds, options.repeats)
    command, rows = shlex.join(["python", "-m", "gecko_lab.bench", *given]), list[Row]()
    for name in options.ops:
        for shape in options.shapes:
            for mode in (m for m in options.mode if m in CASES[name].modes):
                for backend in (b for b in options.backends if b in CASES[name].backends):
                    row = bench.row(CASES[name], SIZES[shape], mode, backend)
                    rows.append(row)
                    console.print(f"{name} {shape} {mode} {backend}: {row.error or _found(row)}", markup=False)
                    if options.out:
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        text = json.dumps(document(device, dtype, command, measured, rows), indent=1)
                        options.out.write_text(text + "\n")
    console.print(table(rows, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
