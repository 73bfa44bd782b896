"""What reading costs along a stream: seconds and memory of each piece."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Cost(NamedTuple):
    begin: int
    end: int
    tokens: int
    seconds: float
    memory: int
    state: int


class Meter:
    """Times pieces and notes the memory that each reached: of a GPU the peak of what torch allocated during the piece,
    else what the process holds in RAM after it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.costs = device, list[Cost]()
        self._began = 0.0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = time.perf_counter()

    def stop(self, begin: int, end: int, tokens: int, state: int) -> None:
        """After targets begin .. end - 1 were read: ``tokens`` over all rows, ``state`` bytes carried."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._began
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident()
        self.costs.append(Cost(begin, end, tokens, seconds, memory, state))

    def between(self, begin: int, end: int) -> dict[str, Any]:
        """Of the pieces that end in (begin, end]; of the one that covers ``end`` when none does: tokens_per_second,
        memory_mb (the largest), state_kb (the last)."""
        inside = [c for c in self.costs if begin < c.end <= end] or [c for c in self.costs if c.begin < end <= c.end]
        return {
            "tokens_per_second": sum(c.tokens for c in inside) / sum(c.seconds for c in inside),
            "memory_mb": max(c.memory for c in inside) / 1e6,
            "state_kb": inside[-1].state / 1e3,
        }


def resident() -> int:
    """Bytes of RAM that this process holds (where the system does not say: the most that it ever held)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
