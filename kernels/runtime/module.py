"""One .cu file with its headers and defines: compiled when first needed, loaded once an architecture."""

import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache, device, nvrtc
from .errors import CompileError
from .launch import Kernel
from .nvrtc import Program, Resources

INCLUDE = Path(__file__).resolve().parent.parent / "include"
_INCLUDE_LINE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
Define = int | float | bool | str


@dataclass(frozen=True)
class CompiledInfo:
    """A compiled module: `resources` and `names` are keyed by the kernel as written in `Module.kernels`."""

    arch: str
    cubin: bytes
    log: str
    names: Mapping[str, str]
    resources: Mapping[str, Resources]
    seconds: float
    from_cache: bool


class Module:
    """A .cu file beside a Python file, specialised by preprocessor defines. Construction is free of any work.

    `kernels` are the names of its __global__ functions, or template instances such as "fwd<float, 3>"; `archs`
    limits the module to some architectures (None: all).
    """

    def __init__(
        self,
        beside: str,
        source: str,
        *,
        kernels: Sequence[str],
        defines: Mapping[str, Define] | None = None,
        options: Sequence[str] = (),
        archs: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(beside).parent / source
        self.kernels = tuple(kernels)
        self.defines = {key: _text(value) for key, value in (defines or {}).items()}
        self.options = tuple(options)
        self.archs = None if archs is None else tuple(archs)
        self._specialised: dict[tuple[tuple[str, Define], ...], Module] = {}
        self._reset()
        _modules.add(self)

    def __repr__(self) -> str:
        return f"Module({self.label})"

    @property
    def label(self) -> str:
        """The file and its defines: complex_ema.cu[N=16]."""
        defines = ",".join(f"{key}={text}" for key, text in sorted(self.defines.items()))
        return f"{self.path.name}[{defines}]" if defines else self.path.name

    def specialise(self, **defines: Define) -> "Module":
        """The same file with some defines added or changed; equal calls return the same object."""
        key = tuple(sorted(defines.items()))
        if (made := self._specialised.get(key)) is None:
            made = Module(
                str(self.path),
                self.path.name,
                kernels=self.kernels,
                defines={**self.defines, **defines},
                options=self.options,
                archs=self.archs,
            )
            made = self._specialised.setdefault(key, made)
        return made

    def kernel(
        self, name: str, *, args: str, block: int | tuple[int, ...], smem: int = 0, most_shared: bool = False
    ) -> Kernel:
        """A launchable kernel. `args` has a letter an argument (docs/kernels.md); `smem` is dynamic, in bytes.

        `most_shared`: as much of a multiprocessor as possible is shared memory, whatever the kernel needs. Kernels
        with different shares never run there at once, so a kernel launched early would wait for the one before it.
        """
        if name not in self.kernels:
            raise ValueError(f"kernel={name!r} is not one of the kernels of {self.label}: {', '.join(self.kernels)}")
        return Kernel(self, name, args, block, smem, most_shared)

    def compile(self, arch: str) -> CompiledInfo:
        """The CUBIN for an architecture ("sm_90a"), from the cache or from NVRTC. Needs no GPU."""
        with self._lock:
            if (info := self._compiled.get(arch)) is None:
                info = self._compiled[arch] = self._compile(arch)
            return info

    def library(self, arch: str) -> tuple[Any, Mapping[str, str]]:
        """The loaded CUlibrary, which is independent of a context, and its mangled names."""
        with self._lock:
            if (loaded := self._loaded.get(arch)) is None:
                info = self.compile(arch)
                library = device.check(
                    f"cuLibraryLoadData({self.label}, {arch})",
                    device.host().driver.cuLibraryLoadData(info.cubin, [], [], 0, [], [], 0),
                )
                loaded = self._loaded[arch] = (library, info.names)
            return loaded

    def sources(self) -> tuple[str, dict[str, str]]:
        """The text of the .cu file, and {include name: text} of every header that it reaches."""
        source = self.path.read_text()
        headers: dict[str, str] = {}
        pending = _INCLUDE_LINE.findall(source)
        while pending:
            name = pending.pop()
            if name not in headers:
                headers[name] = self._header(name)
                pending += _INCLUDE_LINE.findall(headers[name])
        return source, dict(sorted(headers.items()))

    def _header(self, name: str) -> str:
        for place in (self.path.parent, INCLUDE):
            if (place / name).is_file():
                return (place / name).read_text()
        raise CompileError(f'{self.path}: #include "{name}" is neither beside the file nor in {INCLUDE}')

    def _compile(self, arch: str) -> CompiledInfo:
        source, headers = self.sources()
        identity = (nvrtc.version(), nvrtc.OPTIONS, arch, self.options, sorted(self.defines.items()), self.kernels)
        key = hashlib.sha256(repr((identity, self.path.name, source, headers)).encode()).hexdigest()[:32]
        name = f"{self.path.stem}.{arch}.{key}"
        start = time.perf_counter()
        program: Program | None = cache.load(name)
        from_cache = program is not None
        if program is None:
            program = nvrtc.compile_program(
                source,
                self.path.name,
                arch,
                kernels=self.kernels,
                headers=headers,
                defines=self.defines,
                options=self.options,
            )
            cache.store(name, program)
        seconds = time.perf_counter() - start
        return CompiledInfo(arch, program.cubin, program.log, program.names, program.resources, seconds, from_cache)

    def _reset(self) -> None:
        """Forget every handle: at construction, and in a forked child, where the parent's are not valid."""
        self._lock = threading.RLock()
        self._compiled: dict[str, CompiledInfo] = {}
        self._loaded: dict[str, tuple[Any, Mapping[str, str]]] = {}


def _text(value: Define) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


_modules: "weakref.WeakSet[Module]" = weakref.WeakSet()


def _after_fork() -> None:
    for module in list(_modules):
        module._reset()


os.register_at_fork(after_in_child=_after_fork)
