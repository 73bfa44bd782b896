"""Times of a call: medians with their range, peak memory, and the ceilings of the machine."""

from __future__ import annotations

import itertools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

AHEAD = 20_000_000  # cycles that the GPU waits while Python enqueues the calls, so that launches cost nothing


class TooSlow(RuntimeError):
    """A row took longer than its limit."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, least and most over the repeats; GiB above what was allocated before (None: CPU)."""

    ms: float
    ms_range: tuple[float, float]
    peak_gib: float | None


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after so many seconds. Needs the main thread of a POSIX system, else no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow(f"longer than the limit of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(run: Callable[[], object], device: torch.device, *, repeats: int, seconds: float) -> Timing:
    """Time a call that has run before: at least 3 repeats, at most ``repeats``, about ``seconds`` in all."""
    on_gpu = device.type == "cuda"
    start = time.perf_counter()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
    run()
    peak = None
    if on_gpu:
        torch.cuda.synchronize(device)
        peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30
    count = max(3, min(repeats, int(seconds / (time.perf_counter() - start))))
    times = _gpu_times(run, count, device) if on_gpu else _cpu_times(run, count)
    return Timing(statistics.median(times), (min(times), max(times)), peak)


def _cpu_times(run: Callable[[], object], count: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(count):
        run()
        marks.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]


def _gpu_times(run: Callable[[], object], count: int, device: torch.device) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    with torch.cuda.device(device):
        torch.cuda._sleep(AHEAD)
        for start, end in events:
            start.record()
            run()
            end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: a copy in TB/s, read and write; a square matrix product in TFLOP/s."""

    copy_tbps: float
    matmul_tflops: float

    def floor_ms(self, moved: int, flops: int) -> float:
        """The least time in which so many bytes and operations are possible, in ms."""
        return 1e3 * max(moved / (self.copy_tbps * 1e12), flops / (self.matmul_tflops * 1e12))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure them: a copy of 1 GiB and an 8192^3 product on a GPU, 64 MiB and 512^3 on a CPU."""
    on_gpu = device.type == "cuda"
    source = torch.randn((2**30 if on_gpu else 2**26) // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    edge = 8192 if on_gpu else 512
    a, b = torch.randn(2, edge, edge, device=device, dtype=dtype)

    def median(run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return measure(run, device, repeats=20, seconds=2).ms

    copy, matmul = median(lambda: target.copy_(source)), median(lambda: a @ b)
    return Ceilings(2 * source.nbytes / copy / 1e9, 2 * edge**3 / matmul / 1e9)
