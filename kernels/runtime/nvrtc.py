"""CUDA C++ source -> CUBIN through NVRTC. Needs no GPU and no driver."""

import ctypes
import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .errors import CompileError, KernelError

OPTIONS = ("--std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v")
BUILTIN_OPERATION_FAILURE = 7


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers a thread, bytes of stack and spills a thread, bytes of static shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Program:
    """One compiled source: the image, {kernel as written: mangled name} and NVRTC's log."""

    cubin: bytes
    names: Mapping[str, str]
    log: str
    resources: Mapping[str, Resources] = field(default_factory=dict)


@lru_cache(maxsize=1)
def api() -> Any:
    """cuda.bindings.nvrtc, imported on first use (about 0.1 s)."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(f"the CUDA kernels need the packages cuda-bindings and nvidia-cuda-nvrtc: {error}") from error
    return nvrtc


@lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """NVRTC's (major, minor)."""
    error, major, minor = _call(api().nvrtcVersion)
    if int(error):
        raise KernelError(f"nvrtcVersion: {error}")
    return major, minor


@lru_cache(maxsize=1)
def supported_archs() -> tuple[int, ...]:
    """The compute capabilities, such as 80 or 90, that this NVRTC compiles for."""
    error, archs = _call(api().nvrtcGetSupportedArchs)
    if int(error):
        raise KernelError(f"nvrtcGetSupportedArchs: {error}")
    return tuple(archs)


def compile_program(
    source: str,
    file_name: str,
    arch: str,
    *,
    kernels: Sequence[str],
    headers: Mapping[str, str],
    defines: Mapping[str, str],
    options: Sequence[str] = (),
) -> Program:
    """Compile one source for one architecture ("sm_90a").

    `kernels` are names or template instances ("fwd<float, 3>"); `headers` maps an include name to its text.
    Raises CompileError with NVRTC's log.
    """
    arguments = (source, file_name, arch, tuple(kernels), headers, defines, tuple(options))
    error, program = _compile_once(*arguments)
    if error == BUILTIN_OPERATION_FAILURE:
        _preload_builtins()
        error, program = _compile_once(*arguments)
    if error:
        raise CompileError(f"{file_name} does not compile for {arch} (NVRTC error {error}):\n{program.log}")
    return program


def _compile_once(
    source: str,
    file_name: str,
    arch: str,
    kernels: tuple[str, ...],
    headers: Mapping[str, str],
    defines: Mapping[str, str],
    options: tuple[str, ...],
) -> tuple[int, Program]:
    nvrtc = api()
    error, handle = _call(
        nvrtc.nvrtcCreateProgram,
        source.encode(),
        file_name.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    if int(error):
        raise CompileError(f"{file_name}: nvrtcCreateProgram: {error}")
    try:
        for kernel in kernels:
            nvrtc.nvrtcAddNameExpression(handle, kernel.encode())
        flags = [
            f"--gpu-architecture={arch}",
            *OPTIONS,
            *options,
            *(f"-D{key}={text}" for key, text in defines.items()),
        ]
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(flags), [flag.encode() for flag in flags])
        log = (
            _read(handle, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            .decode(errors="replace")
            .rstrip("\0 \n")
        )
        if int(error):
            return int(error), Program(b"", {}, log)
        cubin = _read(handle, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        names = {kernel: nvrtc.nvrtcGetLoweredName(handle, kernel.encode())[1].decode() for kernel in kernels}
        by_mangled_name = parse_resources(log)
        resources = {kernel: by_mangled_name[name] for kernel, name in names.items() if name in by_mangled_name}
        return 0, Program(cubin, names, log, resources)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _read(handle: Any, size_of: Any, fill: Any) -> bytes:
    error, size = size_of(handle)
    if int(error):
        raise CompileError(f"{size_of.__name__}: {error}")
    # The binding writes into the object; Python shares bytes of length 0 and 1, so those are never handed over.
    buffer = bytes(max(size, 2))
    (error,) = fill(handle, buffer)
    if int(error):
        raise CompileError(f"{fill.__name__}: {error}")
    return buffer[:size]


def _call(function: Any, *arguments: Any) -> Any:
    """Call NVRTC; a missing shared library becomes a KernelError that says what to install."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise KernelError(f"NVRTC cannot be loaded (package nvidia-cuda-nvrtc): {error}") from error


def _preload_builtins() -> None:
    """Load libnvrtc-builtins from NVRTC's own folder: the wheel 13.0.88 has no RPATH and cannot find it."""
    with open("/proc/self/maps") as maps:
        found = re.search(r"(/\S*)/libnvrtc\.so\.(\d+)", maps.read())
    if found:
        for library in glob.glob(f"{found.group(1)}/libnvrtc-builtins.so.{found.group(2)}*"):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_resources(log: str) -> dict[str, Resources]:
    """{mangled kernel name: Resources} from the lines of ptxas -v in a program log."""
    found = {}
    for entry in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found[entry["name"]] = Resources(
            registers=int(entry["registers"]),
            spill_stores=int(entry["stores"]),
            spill_loads=int(entry["loads"]),
            stack=int(entry["stack"]),
            shared=int(shared[1]) if shared else 0,
        )
    return found
