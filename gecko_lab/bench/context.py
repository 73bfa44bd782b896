"""`python -m gecko_lab.bench.context`: the time of a token against the length of the context, Gecko beside Llama.

One block of each. Inference reads the whole context: Gecko in pieces with its carried state, Llama in one go, or in
pieces with its keys and values where one go does not fit. Training is one forward and backward of the whole. Needs a
GPU; writes the JSON that `gecko_lab.bench.page` draws.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cases import CASES
from .clock import ceilings
from .machine import header
from .sizes import SIZES, Size

BLOCKS = {"gecko": "gecko_block", "llama": "lab_llama_block"}


def read(block: nn.Module, x: Tensor, piece: int) -> None:
    """Read x (B, L, D) in pieces, carrying the state and dropping the outputs."""
    state = None
    with torch.no_grad():
        for part in x.split(piece, 1):
            _, state = block(part, None, state)


def train(block: nn.Module, x: Tensor) -> None:
    """Forward and backward of the whole."""
    leaf = x.detach().requires_grad_()
    y, _ = block(leaf, None, None)
    torch.autograd.grad(y, [leaf, *block.parameters()], torch.ones_like(y))


def seconds(run: Callable[[], None], patience: float) -> float:
    """The median of three calls, or one call where that takes longer than ``patience`` seconds."""
    times: list[float] = []
    while len(times) < 3 and not (times and times[0] > patience):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(family: str, mode: str, block: nn.Module, x: Tensor, piece: int) -> dict[str, Any]:
    """One point: us a token, or why there is none."""
    length = x.shape[1]
    ways: list[tuple[str, Callable[[], None]]] = []
    if mode == "training":
        ways.append(("one go", lambda: train(block, x)))
    else:
        if family == "llama" or length <= piece:
            ways.append(("one go", lambda: read(block, x, length)))
        if length > piece:
            ways.append((f"pieces of {piece}", lambda: read(block, x, piece)))
    found: dict[str, Any] = {"family": family, "mode": mode, "length": length}
    for how, run in ways:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            took = seconds(run, 1.0)
        except torch.OutOfMemoryError:
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30
        return {**found, "how": how, "us_per_token": 1e6 * took / length, "peak_gib": peak, "error": None}
    return {**found, "how": None, "us_per_token": None, "peak_gib": None, "error": "out of memory"}


def sweep(size: Size, lengths: Sequence[int], piece: int, budget: float, device: torch.device) -> list[dict[str, Any]]:
    """Every family, mode and length while ``budget`` seconds last for each curve; then the curve ends."""
    found = []
    for family, case in BLOCKS.items():
        torch.manual_seed(0)
        block = CASES[case].make(replace(size, batch=1, length=1), device, torch.bfloat16).block
        assert block is not None
        for mode in ("inference", "training"):
            start = time.perf_counter()
            warm = torch.randn(1, lengths[0], size.dim, device=device, dtype=torch.bfloat16)
            row(family, mode, block, warm, piece)
            for length in lengths:
                x = torch.randn(1, length, size.dim, device=device, dtype=torch.bfloat16)
                found.append(row(family, mode, block, x, piece))
                print(found[-1], flush=True)
                if found[-1]["error"] or time.perf_counter() - start > budget:
                    break
        del block
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file; 1 without a GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser("python -m gecko_lab.bench.context", description=__doc__)
    made.add_argument("--shape", choices=SIZES, default="7b-b1-l32768", help="sizes of the layer")
    made.add_argument("--longest", type=int, default=2**20, help="tokens, doubled from 2048 (1048576)")
    made.add_argument("--piece", type=int, default=32768, help="tokens of a piece (32768)")
    made.add_argument("--budget", type=float, default=40.0, help="seconds of one curve (40)")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/context.json"), help="JSON to write")
    options = made.parse_args(given)
    if not torch.cuda.is_available():
        print("no CUDA device: times against the context need one", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    lengths = [2048]
    while lengths[-1] * 2 <= options.longest:
        lengths.append(lengths[-1] * 2)
    size = SIZES[options.shape]
    command = shlex.join(["python", "-m", "gecko_lab.bench.context", *given])
    found = {
        **header(device, torch.bfloat16, command, ceilings(device, torch.bfloat16)),
        "shape": size.name,
        "rows": sweep(size, lengths, options.piece, options.budget, device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
