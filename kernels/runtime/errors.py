"""What can go wrong between a .cu file and a running kernel."""


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched here."""


class CompileError(KernelError):
    """NVRTC refused a source; the message carries its log with file and line."""


class LaunchError(KernelError):
    """The driver refused a call; the message names the kernel, the grid and the architecture."""
