"""`python -m gecko_lab.bench.profile`: the Gecko block, forward and backward, kernel by kernel, beside the Llama block.

Needs a GPU; writes the JSON that `gecko_lab.bench.page` makes docs/performance.md from.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..kernels import backend
from .cases import CASES
from .clock import Ceilings, Timing, ceilings, measure
from .kernels import rows, step_floor
from .machine import header
from .rows import runner
from .sizes import SIZES, Size

PASSES = 3


def block_time(name: str, size: Size, device: torch.device, *, compiled: bool) -> tuple[Timing, Any]:
    """Forward and backward of a block in bfloat16: its time, and the call."""
    torch.manual_seed(0)
    run = runner(CASES[name].make(size, device, torch.bfloat16), "fwd+bwd", compiled=compiled)
    for _ in range(3):
        run()
    return measure(run, device, repeats=20, seconds=6.0), run


def profile(size: Size, device: torch.device, measured: Ceilings) -> dict[str, Any]:
    """What a block of this size costs: its time, the peer's, and the rows of its kernels."""
    timing, run = block_time("gecko_block", size, device, compiled=False)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(PASSES):
            run()
        torch.cuda.synchronize(device)
    found = rows(profiler.events(), size, measured, PASSES)
    del run, profiler
    gc.collect()
    torch.cuda.empty_cache()
    with backend.use("reference"):
        peer, _ = block_time("llama_block", size, device, compiled=True)
    steps = {(row.step, row.way) for row in found}
    cost = CASES["gecko_block"]
    floor = measured.floor_ms(sum(cost.bytes(size, 2)), sum(cost.flops(size, 2)))
    return {
        "shape": size.name,
        "gecko": {**asdict(timing), "floor_ms": floor},
        "llama": asdict(peer),
        "kernels": [asdict(row) for row in found],
        "step_floors": [
            {"step": step, "way": way, "floor_ms": step_floor(step, way, size, measured)} for step, way in sorted(steps)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile the shapes and write the file; 1 without a GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser("python -m gecko_lab.bench.profile", description=__doc__)
    made.add_argument("--shapes", default="7b-b1-l32768", help="separated by commas; the page shows the first")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/profile.json"), help="JSON to write")
    options = made.parse_args(given)
    if not torch.cuda.is_available():
        print("no CUDA device: a profile of kernels needs one", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    measured = ceilings(device, torch.bfloat16)
    command = shlex.join(["python", "-m", "gecko_lab.bench.profile", *given])
    blocks = []
    for shape in options.shapes.split(","):
        blocks.append(profile(SIZES[shape], device, measured))
        total = sum(row["ms"] for row in blocks[-1]["kernels"])
        gecko, llama = blocks[-1]["gecko"]["ms"], blocks[-1]["llama"]["ms"]
        print(f"{shape}: gecko {gecko:.1f} ms (kernels {total:.1f}), llama compiled {llama:.1f} ms")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {**header(device, torch.bfloat16, command, measured), "blocks": blocks}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
