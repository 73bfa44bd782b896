"""What carrying the state costs: a stream read in pieces of 512 against the same tokens in one call, per token.

python -m tests.gpu.timing_streaming [OP ...]

Both are captured in CUDA graphs, so launches from Python do not count, and as many sequences one after the other that
at least 32,768 tokens are read, so the 10 us in which a graph begins do not count either. `floor` is what the pieces of
one kernel each would take if only their launches counted: a chain of kernels of one element in a graph, measured in the
same run. `fwd+bwd` trains piece by piece: gradients stay within a piece.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gecko_lab.components import state as states
from gecko_lab.kernels import ops
from gecko_lab.kernels.backend import use

PIECE, TOKENS = 512, 32768
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
    return sorted(times)[len(times) // 2]


def launch_us(count: int = 256) -> float:
    """Microseconds of one kernel that does nothing much, in a graph of a chain of them."""
    one = torch.zeros(1, device="cuda")

    def chain() -> None:
        for _ in range(count):
            one.add_(1)

    return 1000 * graph_ms(chain) / count


def read(op: Op, pieces: list[Tensor]) -> None:
    state = None
    with torch.no_grad():
        for part in pieces:
            _, state = op(part, state)


def train(op: Op, pieces: list[Tensor], slopes: list[Tensor], parameters: list[Tensor]) -> None:
    state = None
    for part, slope in zip(pieces, slopes):
        y, state = op(part, state)
        torch.autograd.grad(y, [part, *parameters], slope)
        state = states.detach(state)


def main(only: Sequence[str] = ()) -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), f"one empty kernel in a graph: {(launch := launch_us()):.2f} us")
    dim, modes = 4096, 16
    weight, bias = (torch.zeros(dim, device="cuda").requires_grad_() for _ in range(2))
    p = torch.rand(dim, modes, device="cuda").requires_grad_()
    q = torch.polar(1 - p.detach() * 0.5, torch.rand(dim, modes, device="cuda")).requires_grad_()
    gamma = torch.randn(dim, modes, device="cuda", dtype=torch.complex64).requires_grad_()

    def norm(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return ops.timestep_decay_norm(x, weight, bias, groups=64, beta1=0.999, beta2=0.9999, eps=1e-5, state=state)

    def ema(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return ops.complex_ema(x, p, q, gamma, state=state)

    columns = f"{'op':22}{'mode':9}{'B':>3}{'L':>7}{'whole ms':>10}{'pieces ms':>11}{'ratio':>7}"
    print(columns, "  us a piece: whole, pieces, floor")
    for name, op, parameters in (("timestep_decay_norm", norm, [weight, bias]), ("complex_ema", ema, [p, q, gamma])):
        for batch, length in SHAPES if not only or name in only else ():
            count = max(1, TOKENS // (batch * length))
            wholes = [torch.randn(batch, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            wholes = [x.requires_grad_() for x in wholes]
            pieces = [[part.detach().clone().requires_grad_() for part in x.split(PIECE, 1)] for x in wholes]
            slopes = [[torch.randn_like(part) for part in parts] for parts in pieces]
            dys = [torch.cat(parts, 1) for parts in slopes]

            def reading(sequences: list[list[Tensor]], op: Op = op) -> None:
                for parts in sequences:
                    read(op, parts)

            def training(
                sequences: list[list[Tensor]], dys: list[list[Tensor]], op: Op = op, w: list[Tensor] = parameters
            ) -> None:
                for parts, dy in zip(sequences, dys, strict=True):
                    train(op, parts, dy, w)

            single, single_dys = [[x] for x in wholes], [[dy] for dy in dys]
            works: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
                "fwd": (partial(reading, single), partial(reading, pieces)),
                "fwd+bwd": (partial(training, single, single_dys), partial(training, pieces, slopes)),
            }
            for mode, (whole, streamed) in works.items():
                a, b = graph_ms(whole) / count, graph_ms(streamed) / count
                each = [1000 * ms / (length // PIECE) for ms in (a, b)]
                print(
                    f"{name:22}{mode:9}{batch:>3}{length:>7}{a:>10.3f}{b:>11.3f}{b / a:>7.2f}"
                    f"{each[0]:>15.1f}{each[1]:>8.1f}{launch:>8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    with use("strict"):
        main(sys.argv[1:])
