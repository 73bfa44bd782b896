"""`python -m gecko_lab.bench.streaming`: what carrying the state costs.

A stream read in pieces of 512 against the same tokens in one call, per token. Both are captured in CUDA graphs, so
launches from Python do not count, and as many sequences one after the other that at least 32,768 tokens are read, so
the 10 us in which a graph begins do not count either. `fwd+bwd` trains piece by piece: gradients stay within a piece.
Needs a GPU; prints a table, and writes JSON with `--out`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..components import state as states
from ..kernels import ops
from ..kernels.backend import use
from .clock import ceilings
from .machine import header

PIECE, TOKENS = 512, 32768
DIM, MODES, GROUPS = 4096, 16, 64
OPS = ("timestep_decay_norm", "complex_ema")
SHAPES = ((1, 2048), (1, 32768), (2, 2048), (4, 2048), (8, 2048), (8, 4096), (16, 2048), (32, 2048))
Op = Callable[[Tensor, Any], tuple[Tensor, Any]]


def graph_ms(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of one replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def operations() -> dict[str, tuple[Op, list[Tensor]]]:
    """{name: (operation of x and a state, its parameters)}, in the sizes of a 7B layer."""
    weight, bias = (torch.zeros(DIM, device="cuda").requires_grad_() for _ in range(2))
    p = torch.rand(DIM, MODES, device="cuda").requires_grad_()
    q = torch.polar(1 - p.detach() * 0.5, torch.rand(DIM, MODES, device="cuda")).requires_grad_()
    gamma = torch.randn(DIM, MODES, device="cuda", dtype=torch.complex64).requires_grad_()

    def norm(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return ops.timestep_decay_norm(x, weight, bias, groups=GROUPS, beta1=0.999, beta2=0.9999, eps=1e-5, state=state)

    def ema(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return ops.complex_ema(x, p, q, gamma, state=state)

    return dict(zip(OPS, ((norm, [weight, bias]), (ema, [p, q, gamma])), strict=True))


def read(op: Op, sequences: list[list[Tensor]]) -> None:
    """Every sequence, given as its pieces, with the state carried from one to the next."""
    with torch.no_grad():
        for pieces in sequences:
            state = None
            for x in pieces:
                _, state = op(x, state)


def train(op: Op, parameters: list[Tensor], sequences: list[list[Tensor]], slopes: list[list[Tensor]]) -> None:
    """The same with the gradients of every piece, for given gradients of its outputs."""
    for pieces, dys in zip(sequences, slopes, strict=True):
        state = None
        for x, dy in zip(pieces, dys, strict=True):
            y, state = op(x, state)
            torch.autograd.grad(y, [x, *parameters], dy)
            state = states.detach(state)


def rows(name: str, op: Op, parameters: list[Tensor], batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Microseconds per 512 steps of every batch row, of whole sequences and of pieces, forward and with gradients."""
    count = max(1, TOKENS // (batch * length))
    whole, slopes = (
        [[torch.randn(batch, length, DIM, device="cuda", dtype=torch.bfloat16)] for _ in range(count)] for _ in range(2)
    )
    cut = lambda x: [part.clone() for part in x.split(PIECE, 1)]
    pieces, dys = [cut(x) for [x] in whole], [cut(dy) for [dy] in slopes]
    for x in (x for sequence in (*whole, *pieces) for x in sequence):
        x.requires_grad_()
    for mode, works in (
        ("fwd", (lambda: read(op, whole), lambda: read(op, pieces))),
        ("fwd+bwd", (lambda: train(op, parameters, whole, slopes), lambda: train(op, parameters, pieces, dys))),
    ):
        us = [1000 * graph_ms(work) / (count * (length // PIECE)) for work in works]
        yield {
            "name": name,
            "mode": mode,
            "batch": batch,
            "length": length,
            "whole_us": us[0],
            "pieces_us": us[1],
            "ratio": us[1] / us[0],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the JSON; 1 without a GPU."""
    made = argparse.ArgumentParser(prog="python -m gecko_lab.bench.streaming", description=__doc__)
    made.add_argument("--ops", default=",".join(OPS), help="names separated by commas")
    made.add_argument("--out", type=Path, help="JSON to write")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = made.parse_args(given)
    names = options.ops.split(",")
    if unknown := sorted(set(names) - set(OPS)):
        made.error(f"--ops {','.join(unknown)}: known are {', '.join(OPS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: what carrying the state costs is measured on one", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device, known = torch.device("cuda", torch.cuda.current_device()), operations()
    found: list[dict[str, Any]] = []
    print(f"{'':20}{'':8}{'B':>4}{'L':>7}   us per {PIECE} steps: {'whole':>7}{'pieces':>9}{'ratio':>8}")
    with use("strict"):
        for name in names:
            for batch, length in SHAPES:
                for row in rows(name, *known[name], batch, length):
                    found.append(row)
                    print(
                        f"{name:20}{row['mode']:8}{batch:>4}{length:>7}{row['whole_us']:>29.1f}"
                        f"{row['pieces_us']:>9.1f}{row['ratio']:>8.2f}",
                        flush=True,
                    )
    if options.out:
        command = shlex.join(["python", "-m", "gecko_lab.bench.streaming", *given])
        text = {**header(device, torch.bfloat16, command, ceilings(device, torch.bfloat16)), "rows": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
