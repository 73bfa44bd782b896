"""Times of the moving average: `python tests/gpu/timing_complex_ema.py` prints milliseconds, medians of CUDA events."""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from gecko_lab.kernels.complex_ema import launches
from gecko_lab.kernels.complex_ema.cuda import complex_ema

SHAPES = {"7b-b1-l32768": (1, 32768, 4096), "7b-b8-l4096": (8, 4096, 4096), "1b-b1-l32768": (1, 32768, 2048)}
MODES = 16


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call after three warm ones."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def parameters(width: int) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.rand(width, MODES, device="cuda")
    q = torch.polar(0.4 + 0.5 * p, math.tau * torch.rand(width, MODES, device="cuda"))
    return p, q, torch.randn(width, MODES, device="cuda", dtype=torch.complex64)


def shape_times(batch: int, length: int, width: int) -> dict[str, float]:
    """Milliseconds of every part at one shape; documents are 2048 tokens long on average."""
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)
    p, q, gamma = parameters(width)
    dy, documents = torch.randn_like(x), torch.rand(batch, length, device="cuda") < 1 / 2048
    leaves = [t.clone().requires_grad_() for t in (x, p, q, gamma)]

    def both(bos: Tensor | None) -> None:
        torch.autograd.grad(complex_ema(*leaves, bos=bos)[0], leaves, dy)

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: x.clone(),
        "fwd": lambda: complex_ema(x, p, q, gamma),
        "fwd, documents": lambda: complex_ema(x, p, q, gamma, bos=documents),
        "dx": lambda: launches.filter_steps(dy, p, q, gamma, None, None, reverse=True),
        "gradients": lambda: launches.parameter_gradients(x, dy, p, q, gamma, None, None, None),
        "fwd+bwd": lambda: both(None),
        "fwd+bwd, documents": lambda: both(documents),
    }
    return {label: milliseconds(call) for label, call in calls.items()}


def main() -> None:
    print(torch.cuda.get_device_name())
    for name, shape in SHAPES.items():
        print(name, ", ".join(f"{label} {ms:.3f}" for label, ms in shape_times(*shape).items()), flush=True)
    x = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    weights = parameters(4096)
    print(f"a piece of 512 {milliseconds(lambda: complex_ema(x, *weights)):.4f}")
    print(f"a step {milliseconds(lambda: complex_ema(x[:, :1], *weights)):.4f}")


if __name__ == "__main__":
    main()
