"""What every results file says first: the machine, the versions, the command."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from .clock import Ceilings


def header(device: torch.device, dtype: torch.dtype, command: str, measured: Ceilings) -> dict[str, Any]:
    """{device, versions, command, dtype, ceilings}; benchmarks/README.md describes it."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "versions": {
            "gecko_lab": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else None,
            "python": platform.python_version(),
        },
        "command": command,
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": asdict(measured),
    }
