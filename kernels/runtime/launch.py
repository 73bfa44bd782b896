"""Launch one kernel of a module on torch's current stream, with little work a call."""

import ctypes
import os
import struct
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import device
from .errors import KernelError, LaunchError

if TYPE_CHECKING:
    from .module import Module

# Every argument starts on a multiple of 8 bytes. T holds the 128 bytes of a CUtensorMap.
_SLOTS = {"P": "Q", "q": "q", "i": "i4x", "I": "I4x", "f": "f4x", "d": "d", "T": "128s"}
_SIZES = {letter: struct.calcsize(f"={slot}") for letter, slot in _SLOTS.items()}


@dataclass(frozen=True)
class Loaded:
    """A kernel on one device: its CUfunction and what its launches need."""

    function: Any
    host: device.Host
    arch: str
    smem_limit: int
    starts_early: bool  # compute capability 9.0 and newer


class Kernel:
    """A __global__ function with the types of its arguments and its block. Made by Module.kernel."""

    def __init__(
        self,
        module: "Module",
        name: str,
        args: str,
        block: int | tuple[int, ...],
        smem: int,
        most_shared: bool = False,
    ) -> None:
        if unknown := sorted(set(args) - set(_SLOTS)):
            raise ValueError(f"args={args!r} of kernel {name}: {unknown} not among {', '.join(_SLOTS)}")
        self.module, self.name, self.args, self.smem = module, name, args, smem
        self.block, self.most_shared = _three(block), most_shared
        self._struct = struct.Struct("=" + "".join(_SLOTS[letter] for letter in args))
        self._reset()
        _kernels.add(self)

    def __repr__(self) -> str:
        return f"Kernel({self.module.label}: {self.name})"

    def launch(
        self,
        device_index: int,
        grid: int | tuple[int, ...],
        *values: Any,
        smem: int | None = None,
        early: bool = False,
    ) -> None:
        """Enqueue the kernel on torch's current stream of a device.

        `values` follow `args`: pointers are integers (tensor.data_ptr()). `smem` replaces the kernel's own number of
        dynamic bytes. `early`: it may begin before the kernel enqueued before it has ended, and has to wait itself
        (PTX griddepcontrol.wait) before it reads what that one writes and writes what that one reads; before compute
        capability 9.0 this changes nothing. Raises LaunchError, or ValueError where the values do not fit `args`.
        """
        loaded = self._loaded.get(device_index) or self.load(device_index)
        try:
            buffer, pointers = self._local.arguments
        except AttributeError:
            buffer, pointers = self._new_arguments()
        try:
            self._struct.pack_into(buffer, 0, *values)
        except struct.error as error:
            raise ValueError(f"kernel {self.name} takes args={self.args!r}, not {values!r}: {error}") from None
        host, shape, smem = loaded.host, _three(grid), self.smem if smem is None else smem
        early = early and loaded.starts_early
        if host.current_device() == device_index:
            self._enqueue(loaded, device_index, shape, smem, pointers, early)
        else:
            with host.select(device_index):
                self._enqueue(loaded, device_index, shape, smem, pointers, early)

    def load(self, device_index: int) -> Loaded:
        """Compile and load for a device now, so that the first launch does neither."""
        with self._lock:
            if (loaded := self._loaded.get(device_index)) is None:
                loaded = self._loaded[device_index] = self._load(device_index)
            return loaded

    def _enqueue(
        self, loaded: Loaded, device_index: int, grid: tuple[int, int, int], smem: int, pointers: int, early: bool
    ) -> None:
        host = loaded.host
        stream = host.raw_stream(device_index)
        launch = host.driver.cuLaunchKernel
        arguments: tuple[Any, ...] = (loaded.function, *grid, *self.block, smem, stream, pointers, 0)
        if early:
            launch = host.driver.cuLaunchKernelEx
            arguments = (self._early_config(host.driver, grid, smem, stream), loaded.function, pointers, 0)
        (code,) = launch(*arguments)
        if code and int(code) == device.INVALID_CONTEXT:
            device.make_context_current(device_index)
            (code,) = launch(*arguments)
        if int(code):
            raise LaunchError(
                f"{self.module.label}: kernel {self.name} on device {device_index} ({loaded.arch}), grid {grid}, "
                f"block {self.block}, {smem} dynamic bytes of shared memory (at most {loaded.smem_limit}): "
                f"{device.describe(code)}"
            )

    def _early_config(self, driver: Any, grid: tuple[int, int, int], smem: int, stream: int) -> Any:
        """This thread's configuration of early launches, with the numbers of this one."""
        try:
            config = self._local.config
        except AttributeError:
            config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.blockDimX, config.blockDimY, config.blockDimZ = self.block
            config.attrs, config.numAttrs = [attribute], 1
            self._local.config = config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.sharedMemBytes, config.hStream = smem, stream
        return config

    def _load(self, device_index: int) -> Loaded:
        host = device.host()
        if host.capturing():
            raise KernelError(
                f"{self.module.label}: kernel {self.name} is needed for the first time while a CUDA graph is captured; "
                "run the operation once before the capture"
            )
        arch = device.arch_of(device_index)
        library, names = self.module.library(arch)
        driver, what = host.driver, f"{self.module.label}: kernel {self.name} ({arch})"
        with host.select(device_index):
            device.make_context_current(device_index)
            kernel = device.check(what, driver.cuLibraryGetKernel(library, names[self.name].encode()))
            # Asking for the function loads it into the context now; otherwise the driver would at the first launch.
            function = device.check(what, driver.cuKernelGetFunction(kernel))
            static = int(
                device.check(
                    what,
                    driver.cuFuncGetAttribute(
                        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function
                    ),
                )
            )
            limit = device.attribute(device_index, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN") - static
            key = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device.check(what, driver.cuFuncSetAttribute(function, key, limit))
            if self.most_shared:
                key = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                device.check(what, driver.cuFuncSetAttribute(function, key, 100))
        starts_early = device.attribute(device_index, "COMPUTE_CAPABILITY_MAJOR") >= 9
        return Loaded(function, host, arch, limit, starts_early)

    def _new_arguments(self) -> tuple[Any, int]:
        """This thread's argument buffer and the address of the pointers into it, both reused by every launch."""
        buffer = ctypes.create_string_buffer(max(self._struct.size, 8))
        pointers = (ctypes.c_void_p * max(len(self.args), 1))()
        offset = 0
        for index, letter in enumerate(self.args):
            pointers[index] = ctypes.addressof(buffer) + offset
            offset += _SIZES[letter]
        self._local.owner = pointers
        self._local.arguments = buffer, ctypes.addressof(pointers)
        return self._local.arguments

    def _reset(self) -> None:
        """Forget every handle: at construction, and in a forked child, where the parent's are not valid."""
        self._lock = threading.RLock()
        self._local = threading.local()
        self._loaded: dict[int, Loaded] = {}


def _three(extent: int | tuple[int, ...]) -> tuple[int, int, int]:
    if isinstance(extent, int):
        return extent, 1, 1
    x, y, z = (*extent, 1, 1)[:3]
    return x, y, z


_kernels: "weakref.WeakSet[Kernel]" = weakref.WeakSet()


def _after_fork() -> None:
    for kernel in list(_kernels):
        kernel._reset()


os.register_at_fork(after_in_child=_after_fork)
