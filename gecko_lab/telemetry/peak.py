"""The device's own peak: how fast a large matrix product runs here, the denominator of MFU.

bfloat16 on a GPU, float32 on a CPU with the threads of this process. Measured once a process for at most half a
second and kept in the run's environment.json, so that a resumed run on the same device divides by the same number.
"""

from __future__ import annotations

import json
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..run import write_atomic

SECONDS = 0.5


def device_label(device: torch.device) -> str:
    """What a peak belongs to: the name of the GPU, or the CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@lru_cache
def measure(device: torch.device, seconds: float = SECONDS) -> float:
    """FLOPs a second of the fastest of the square products that fit in ``seconds``."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    generator = torch.Generator(device=device).manual_seed(0)  # leaves the run's random state alone
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best, began, repeats = float("inf"), time.perf_counter(), 4 if cuda else 1
    while best == float("inf") or time.perf_counter() - began < seconds:
        before = _now(device)
        for _ in range(repeats):
            a @ a
        best = min(best, (_now(device) - before) / repeats)
    return 2.0 * size**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def of_run(environment: Path, device: torch.device) -> float:
    """The peak that the run's environment.json names for this device; measured and written there when it names none."""
    history: list[dict[str, Any]] = json.loads(environment.read_text()) if environment.exists() else []
    label = device_label(device)
    for entry in reversed(history):
        if entry.get("peak_device") == label:
            return float(entry["peak_flops_per_second"])
    peak = measure(device)
    if history:
        history[-1] |= {"peak_device": label, "peak_flops_per_second": peak}
        write_atomic(environment, json.dumps(history, indent=2) + "\n")
    return peak
