"""Compile CUDA C++ at run time, keep the result on disk, launch it on torch's current stream.

Only `cuda.bindings` (NVRTC and the driver) is used: no nvcc, no toolkit, no host compiler. Nothing happens at import.
See docs/kernels.md.
"""

from .device import arch_of, launch_stream
from .errors import CompileError, KernelError, LaunchError
from .launch import Kernel
from .module import CompiledInfo, Module
from .nvrtc import Resources, supported_archs
from .tensor_map import tensor_map_2d

__all__ = [
    "CompileError",
    "CompiledInfo",
    "Kernel",
    "KernelError",
    "LaunchError",
    "Module",
    "Resources",
    "arch_of",
    "launch_stream",
    "supported_archs",
    "tensor_map_2d",
]
