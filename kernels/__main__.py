"""`python -m gecko_lab.kernels`: what compiles, what it takes, and whether it is right on this machine's GPU."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.console import Console
from rich.table import Table

from . import inventory
from .runtime import CompiledInfo, KernelError, arch_of, cache
from .runtime.nvrtc import version

OK, FAILED, NO_GPU = 0, 1, 2


def list_kernels(console: Console) -> int:
    """Print every module with its kernels, without compiling anything."""
    table = Table("operation", "module", "kernels", "only on", title="CUDA kernels")
    for folder, module, _ in inventory.entries():
        instances = Counter(kernel.partition("<")[0] for kernel in module.kernels)
        names = [name if count == 1 else f"{name} ({count})" for name, count in instances.items()]
        table.add_row(folder, module.label, ", ".join(names), ", ".join(module.archs or ()))
    console.print(table)
    console.print(f"cache: {cache.folder() or 'none (no home directory)'}")
    if not torch.cuda.is_available():
        console.print("no CUDA device here: operations use the reference; kernels can still be compiled (compile)")
    return OK


def compile_kernels(console: Console, archs: Sequence[str], jobs: int) -> int:
    """Compile every module for some architectures and print what each kernel takes."""
    entries = [
        (entry, arch)
        for arch in archs
        for entry in inventory.entries()
        if entry.module.archs is None or arch in entry.module.archs
    ]
    table = Table("operation", "module", "kernel", "arch", "regs", "spills", "stack", "smem", "compile")
    table.columns[1].overflow = "fold"
    start, failures = time.perf_counter(), []

    def build(item: tuple[inventory.Entry, str]) -> CompiledInfo | KernelError:
        try:
            return item[0].module.compile(item[1])
        except KernelError as error:
            return error

    with ThreadPoolExecutor(jobs) as pool:
        for (entry, arch), info in zip(entries, pool.map(build, entries), strict=True):
            if isinstance(info, KernelError):
                failures.append(info)
                continue
            took = "cached" if info.from_cache else f"{info.seconds:.2f} s"
            labels = [entry.folder, entry.module.label, took]
            for kernel, used in info.resources.items():
                spills = used.spill_stores + used.spill_loads
                numbers = (str(used.registers), str(spills), str(used.stack), str(used.shared))
                folder, module, time_taken = labels
                table.add_row(folder, module, kernel, arch, *numbers, time_taken)
                labels = ["", "", ""]
    console.print(table)
    major, minor = version()
    seconds = time.perf_counter() - start
    console.print(f"spills, stack and smem in bytes; NVRTC {major}.{minor}, {seconds:.1f} s in all")
    console.print(f"cache: {cache.folder()}")
    for error in failures:
        console.print(str(error), style="red", markup=False)
    return FAILED if failures else OK


def check_kernels(console: Console, names: Sequence[str]) -> int:
    """Compare every operation with its reference on this machine's GPU; needs one."""
    if not torch.cuda.is_available():
        console.print(
            "check needs a CUDA device and this machine has none; the reference would be compared with itself"
        )
        return NO_GPU
    from . import backend, ops, selfcheck

    device = torch.device("cuda", torch.cuda.current_device())
    console.print(f"{torch.cuda.get_device_name(device)} ({arch_of(device.index)}), torch {torch.__version__}")
    table = Table("operation", "case", "dtype", "forward", "gradient", "ok", title="largest error / largest value")
    outcomes = []
    with backend.use("strict"):
        for example in inventory.examples():
            if names and example.op not in names:
                continue
            for dtype in selfcheck.TOLERANCE:
                outcome = selfcheck.compare(example, dtype, getattr(ops, example.op), device)
                outcomes.append(outcome)
                errors = ("", "") if outcome.failure else (f"{outcome.forward:.1e}", f"{outcome.backward:.1e}")
                verdict = "yes" if outcome.ok else "[red]NO[/red]"
                table.add_row(outcome.op, outcome.case, str(dtype).removeprefix("torch."), *errors, verdict)
    console.print(table)
    for failure in dict.fromkeys(f"{outcome.op}: {outcome.failure}" for outcome in outcomes if outcome.failure):
        console.print(failure, style="red", markup=False)
    return OK if outcomes and all(outcome.ok for outcome in outcomes) else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 well, 1 a kernel fails, 2 check without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m gecko_lab.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the kernels (the default)")
    build = commands.add_parser("compile", help="compile ahead of use; show registers, spills and shared memory")
    build.add_argument("--arch", action="append", help="sm_90a, ...; again for more (default: this GPU, else all)")
    build.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    check = commands.add_parser("check", help="compare every operation with its reference on this GPU")
    check.add_argument("op", nargs="*", help="only these operations")
    commands.add_parser("clear-cache", help="delete the compiled kernels on disk")
    chosen = parser.parse_args(arguments)
    console = Console()
    if chosen.command == "compile":
        here = [arch_of(torch.cuda.current_device())] if torch.cuda.is_available() else list(inventory.ARCHS)
        return compile_kernels(console, chosen.arch or here, chosen.jobs)
    if chosen.command == "check":
        return check_kernels(console, chosen.op)
    if chosen.command == "clear-cache":
        console.print(f"{cache.clear()} compiled kernels deleted from {cache.folder()}")
        return OK
    return list_kernels(console)


if __name__ == "__main__":
    sys.exit(main())
