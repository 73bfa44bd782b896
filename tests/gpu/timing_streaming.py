"""What carrying the state costs: a stream read in pieces of 512 against the same tokens in one call, per token.

python -m tests.gpu.timing_streaming     (both captured in CUDA graphs, so that launches from Python do not count)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gecko_lab.components import state as states
from gecko_lab.kernels import ops

PIECE = 512


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


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    print(f"{'op':22}{'B':>4}{'L':>8}{'whole ms':>10}{'pieces ms':>11}{'ratio':>7}")
    dim, modes = 4096, 16
    weight, bias = torch.zeros(dim, device="cuda"), torch.zeros(dim, device="cuda")
    p = torch.rand(dim, modes, device="cuda")
    q = torch.polar(1 - p * 0.5, torch.rand(dim, modes, device="cuda"))
    gamma = torch.randn(dim, modes, device="cuda", dtype=torch.complex64)

    def norm(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return ops.timestep_decay_norm(x, weight, bias, groups=64, beta1=0.999, beta2=0.9999, eps=1e-5, state=state)

    def ema(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return ops.complex_ema(x, p, q, gamma, state=state)

    for name, op in (("timestep_decay_norm", norm), ("complex_ema", ema)):
        for batch, length in ((1, 2048), (1, 32768), (8, 2048), (8, 4096), (32, 2048)):
            x = torch.randn(batch, length, dim, device="cuda", dtype=torch.bfloat16)
            pieces = [part.contiguous() for part in x.split(PIECE, 1)]

            def whole(op: Any = op, x: torch.Tensor = x) -> None:
                op(x, None)

            def streamed(op: Any = op, pieces: list[torch.Tensor] = pieces) -> None:
                state = None
                for part in pieces:
                    _, state = op(part, state)
                    state = states.detach(state)

            with torch.no_grad():
                a, b = graph_ms(whole), graph_ms(streamed)
            print(f"{name:22}{batch:>4}{length:>8}{a:>10.3f}{b:>11.3f}{b / a:>7.2f}")


if __name__ == "__main__":
    main()
