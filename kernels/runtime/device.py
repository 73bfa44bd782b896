"""The machine under the kernels: the driver, architectures, contexts, and torch's streams."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .errors import KernelError, LaunchError

INVALID_CONTEXT = 201


@dataclass(frozen=True)
class Host:
    """Everything that a launch asks of the outside world; the tests put a stand-in here."""

    driver: Any
    raw_stream: Callable[[int], int]
    current_device: Callable[[], int]
    select: Callable[[int], AbstractContextManager[Any]]
    capturing: Callable[[], bool]


@lru_cache(maxsize=1)
def host() -> Host:
    """The CUDA driver and torch, imported on first use."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(f"the CUDA kernels need the package cuda-bindings: {error}") from error
    if not torch.cuda.is_available():
        raise KernelError("no CUDA device: torch.cuda.is_available() is False")
    torch.cuda.init()
    return Host(
        driver=driver,
        raw_stream=torch._C._cuda_getCurrentRawStream,
        current_device=torch._C._cuda_getDevice,
        select=torch.cuda.device,
        capturing=torch.cuda.is_current_stream_capturing,
    )


def launch_stream(device: int) -> int:
    """The raw handle of torch's current stream on a device."""
    return host().raw_stream(device)


def describe(code: Any) -> str:
    """A driver error as "CUDA_ERROR_... (what it means)"."""
    driver = host().driver
    name, text = driver.cuGetErrorName(code)[1], driver.cuGetErrorString(code)[1]
    return f"{(name or b'?').decode()} ({(text or b'?').decode()})"


def check(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call's (error, value) pair; raises LaunchError naming the call."""
    if int(result[0]):
        raise LaunchError(f"{what}: {describe(result[0])}")
    return result[1] if len(result) == 2 else result[1:]


def attribute(device: int, name: str) -> int:
    """A CUdevice_attribute by its name without the prefix, such as "MULTIPROCESSOR_COUNT"."""
    driver = host().driver
    key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(check(f"cuDeviceGetAttribute({name})", driver.cuDeviceGetAttribute(key, device)))


def arch_of(device: int) -> str:
    """The exact architecture of a device ("sm_89", "sm_90a"): what its CUBIN is compiled for."""
    major, minor = attribute(device, "COMPUTE_CAPABILITY_MAJOR"), attribute(device, "COMPUTE_CAPABILITY_MINOR")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def make_context_current(device: int) -> None:
    """Make the primary context of a device, the one that torch uses, current on this thread.

    A fresh thread, such as those on which autograd runs backward, has none.
    """
    driver = host().driver
    check("cuInit", driver.cuInit(0))
    handle = check("cuDeviceGet", driver.cuDeviceGet(device))
    context = check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(handle))
    check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
