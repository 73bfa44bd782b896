"""Times of the attention and the memory: `python tests/gpu/timing_attention.py` prints medians of CUDA events.

`--kernels` adds the kernels of one forward and backward pass, by total time.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gecko_lab.kernels.adaptive_working_memory.cuda import adaptive_working_memory
from gecko_lab.kernels.sliding_chunk_attention.cuda import sliding_chunk_attention

SHAPES = {"7b-b1-l32768": (1, 32768, 4), "7b-b8-l4096": (8, 4096, 4), "1b-b1-l32768": (1, 32768, 2)}
FEATURES, WIDTH, CHUNK = 256, 2048, 2048
OPERATIONS: dict[str, Callable[..., Any]] = {"attention": sliding_chunk_attention, "memory": adaptive_working_memory}


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
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


def gigabytes(function: Callable[[], object]) -> float:
    """Peak memory of a call above what was held before it, outputs and gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e9


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    scales = (1.0, FEATURES**-0.5, 1.0)
    return [
        (s * torch.randn(batch, length, heads, size, device="cuda")).to(torch.bfloat16).requires_grad_()
        for s, size in zip(scales, (FEATURES, FEATURES, WIDTH))
    ]


def calls(operation: Callable[..., Any], shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    x = inputs(*shape)
    batch, length, heads = shape
    dy = torch.randn(batch, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    segments = (torch.rand(batch, length, device="cuda") < 1 / 2048).to(torch.int64).cumsum(1)

    def forward(**options: Any) -> Tensor:
        return operation(*x, chunk=CHUNK, **options)[0]  # type: ignore[no-any-return]

    def inference() -> None:
        with torch.no_grad():
            forward()

    def both(**options: Any) -> None:
        torch.autograd.grad(forward(**options), x, dy)

    return {
        "fwd": inference,
        "fwd+bwd": both,
        "fwd+bwd, documents": lambda: both(segments=segments),
    }


def decode(operation: Callable[..., Any], batch: int) -> float:
    """Milliseconds of one token after two and a half chunks, 4 heads."""
    x = [t.detach() for t in inputs(batch, 5 * CHUNK // 2, 4)]
    with torch.no_grad():
        _, state = operation(*x, chunk=CHUNK)
        step = [t[:, :1].contiguous() for t in x]
        return milliseconds(lambda: operation(*step, chunk=CHUNK, state=state))


def kernel_table(function: Callable[[], object]) -> str:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)[:22]
    return "\n".join(f"  {r.self_device_time_total / 1e3:8.3f} ms {r.count:5d} x {r.key[:110]}" for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name in arguments.shape or SHAPES:
        for label, operation in OPERATIONS.items():
            made = calls(operation, SHAPES[name])
            row = [f"{what} {milliseconds(call):.3f} ms {gigabytes(call):.2f} GB" for what, call in made.items()]
            print(f"{name} {label}: {', '.join(row)}", flush=True)
            if arguments.kernels:
                print(kernel_table(made["fwd+bwd"]), flush=True)
            del made
    for batch in (1, 16):
        row = [f"{label} {decode(operation, batch):.4f} ms" for label, operation in OPERATIONS.items()]
        print(f"a token, batch {batch}: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
