"""Loading and launching against a stand-in for the driver."""

import ctypes
import gc
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gecko_lab.kernels.runtime import KernelError, LaunchError, Module, device

SOURCE = 'extern "C" __global__ void probe(float* p, int i, float f, long long q) { if (i) p[q] = f; }'
INVALID_CONTEXT, INVALID_VALUE = 201, 1


class Names:
    def __getattr__(self, name: str) -> str:
        return name


class FakeDriver:
    """Answers like cuda.bindings.driver and writes down every launch with the argument values that it could read."""

    CUdevice_attribute = CUfunction_attribute = CUlaunchAttributeID = Names()
    CUlaunchConfig, CUlaunchAttribute = SimpleNamespace, lambda self: SimpleNamespace(value=SimpleNamespace())

    def __init__(self, layout: str = "PifQ") -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.errors: list[int] = []
        self.current = threading.local()
        self.gate = threading.Lock()

    def context(self) -> int | None:
        return getattr(self.current, "device", None)

    def cuDeviceGetAttribute(self, key: str, index: int) -> tuple[int, int]:
        values = {"CAPABILITY_MAJOR": 9, "CAPABILITY_MINOR": 0, "BLOCK_OPTIN": 232448}
        return 0, next(value for name, value in values.items() if key.endswith(name))

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.calls.append(("cuCtxSetCurrent", context))
        self.current.device = context
        return (0,)

    def cuLibraryLoadData(self, image: bytes, *rest: Any) -> tuple[int, str]:
        self.calls.append(("cuLibraryLoadData", image[:4]))
        return 0, "library"

    def cuLibraryGetKernel(self, library: str, name: bytes) -> tuple[int, bytes]:
        return 0, name

    def cuKernelGetFunction(self, kernel: bytes) -> tuple[int, str]:
        return 0, f"{kernel.decode()} on {self.context()}"

    def cuFuncGetAttribute(self, key: str, function: str) -> tuple[int, int]:
        return 0, 1024

    def cuFuncSetAttribute(self, function: str, key: str, value: int) -> tuple[int]:
        self.calls.append(("cuFuncSetAttribute", value))
        return (0,)

    def cuLaunchKernel(self, function: str, *rest: Any) -> tuple[int]:
        grid, block, (smem, stream, pointers, _) = rest[:3], rest[3:6], rest[6:]
        if self.context() is None:
            return (INVALID_CONTEXT,)
        if self.errors:
            return (self.errors.pop(),)
        array = (ctypes.c_void_p * 4).from_address(pointers)
        types = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_int64)
        values = tuple(kind.from_address(place).value for kind, place in zip(types, array))
        with self.gate:
            self.launches.append((function, grid, block, smem, stream, values, pointers))
        return (0,)

    def cuLaunchKernelEx(self, config: SimpleNamespace, function: str, pointers: int, extra: int) -> tuple[int]:
        (attribute,) = config.attrs
        assert config.numAttrs == 1
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        return self.cuLaunchKernel(
            f"{function}, early", *grid, *block, config.sharedMemBytes, config.hStream, pointers, extra
        )

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return 0, f"CUDA_ERROR_{code}".encode()

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, b"as the driver explains it"


class Machine:
    """A fake driver behind a fake torch: two GPUs, stream 70 + index on each."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.selected = 0
        self.host = device.Host(
            self.driver, lambda index: 70 + index, lambda: self.selected, self.select, lambda: False
        )

    @contextmanager
    def select(self, index: int) -> Any:
        before, self.selected = self.selected, index
        yield
        self.selected = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(device, "host", lambda: made.host)
    return made


@pytest.fixture
def module(tmp_path: Path) -> Module:
    (tmp_path / "probe.cu").write_text(SOURCE)
    return Module(str(tmp_path / "cuda.py"), "probe.cu", kernels=("probe",))


def test_launch_passes_everything_on(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=(32, 4), smem=64)
    kernel.launch(0, (5, 6), 0xFFFF_0000_0000, -3, 1.5, -(2**40))
    kernel.launch(0, 7, 1, 2, 3.0, 4, smem=100_000)
    first, second = machine.driver.launches
    assert first[:6] == ("probe on 0", (5, 6, 1), (32, 4, 1), 64, 70, (0xFFFF_0000_0000, -3, 1.5, -(2**40)))
    assert second[1:6] == ((7, 1, 1), (32, 4, 1), 100_000, 70, (1, 2, 3.0, 4))
    assert ("cuFuncSetAttribute", 232448 - 1024) in machine.driver.calls
    assert sum(call[0] == "cuLibraryLoadData" for call in machine.driver.calls) == 1


@pytest.mark.parametrize("most_shared", [False, True])
def test_kernels_ask_for_shared_memory(machine: Machine, module: Module, most_shared: bool) -> None:
    """All of a multiprocessor, in percent, for those that say so, and for no other."""
    module.kernel("probe", args="Pifq", block=32, most_shared=most_shared).load(0)
    assert (("cuFuncSetAttribute", 100) in machine.driver.calls) == most_shared


def test_early_launches_pass_everything_on(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=(32, 4), smem=64)
    kernel.launch(0, (5, 6), 1, -3, 1.5, 2, early=True)
    kernel.launch(0, 7, 3, 4, 2.5, 5, smem=100_000, early=True)
    kernel.launch(0, 8, 3, 4, 2.5, 5)
    machine.driver.current.device = None
    kernel.launch(0, 9, 3, 4, 2.5, 6, early=True)
    first, second, third, fourth = machine.driver.launches
    assert first[:6] == ("probe on 0, early", (5, 6, 1), (32, 4, 1), 64, 70, (1, -3, 1.5, 2))
    assert second[:6] == ("probe on 0, early", (7, 1, 1), (32, 4, 1), 100_000, 70, (3, 4, 2.5, 5))
    assert third[:2] == ("probe on 0", (8, 1, 1))
    assert fourth[1:4] == ((9, 1, 1), (32, 4, 1), 64)


def test_tensor_maps_are_passed_by_value(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="TPi", block=32)
    kernel.load(0)
    seen = []

    def look(function: str, *rest: Any) -> tuple[int]:
        places = (ctypes.c_void_p * 3).from_address(rest[8])
        seen.append((ctypes.string_at(places[0], 128), ctypes.c_uint64.from_address(places[1]).value))
        return (0,)

    machine.driver.cuLaunchKernel = look  # type: ignore[method-assign]
    kernel.launch(0, 1, bytes(range(128)), 99, 1)
    assert seen == [(bytes(range(128)), 99)]


def test_each_device_has_its_own_function_and_stream(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    for index in (0, 1, 0, 1):
        kernel.launch(index, 1, 0, 0, 0.0, index)
    assert [(launch[0], launch[4]) for launch in machine.driver.launches] == [
        ("probe on 0", 70),
        ("probe on 1", 71),
    ] * 2
    assert machine.selected == 0


def test_threads_have_their_own_arguments(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    kernel.load(0)
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        for step in range(200):
            kernel.launch(0, number, number, step, float(step), number)
        together.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = machine.driver.launches
    assert len(launches) == 8 * 200
    assert all(values[0] == values[3] == grid[0] for _, grid, _, _, _, values, _ in launches)
    assert len({pointers for *_, pointers in launches}) == 8


def test_a_thread_without_a_context_gets_the_primary_one(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    kernel.launch(0, 1, 0, 0, 0.0, 0)
    before = len(machine.driver.calls)
    thread = threading.Thread(target=kernel.launch, args=(0, 1, 0, 0, 0.0, 1))
    thread.start()
    thread.join()
    assert [launch[5][3] for launch in machine.driver.launches] == [0, 1]
    assert machine.driver.calls[before:] == [("cuCtxSetCurrent", 0)]


def test_a_context_that_stays_invalid_is_an_error(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    kernel.load(0)
    machine.driver.errors = [INVALID_CONTEXT, INVALID_CONTEXT]
    with pytest.raises(LaunchError, match="CUDA_ERROR_201"):
        kernel.launch(0, 1, 0, 0, 0.0, 0)
    assert machine.driver.errors == []


def test_launch_error_names_kernel_grid_and_architecture(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    kernel.load(0)
    machine.driver.errors = [INVALID_VALUE]
    with pytest.raises(LaunchError) as caught:
        kernel.launch(0, (0, 2), 0, 0, 0.0, 0)
    for part in ("probe.cu", "kernel probe", "(0, 2, 1)", "sm_90a", "CUDA_ERROR_1", "231424"):
        assert part in str(caught.value)


@pytest.mark.parametrize("values", [(0, 0, 0.0), (0, 2**31, 0.0, 0), (None, 0, 0.0, 0), (0, 1.5, 0.0, 0)])
def test_values_that_do_not_fit_are_refused(machine: Machine, module: Module, values: tuple[Any, ...]) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    with pytest.raises(ValueError, match="args='Pifq'"):
        kernel.launch(0, 1, *values)
    assert machine.driver.launches == []


def test_first_use_during_capture_is_refused_and_later_use_is_not(
    machine: Machine, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    relaxed = machine.host
    machine.host = replace(relaxed, capturing=lambda: True)
    with pytest.raises(KernelError, match="while a CUDA graph is captured"):
        kernel.launch(0, 1, 0, 0, 0.0, 0)
    machine.host = relaxed
    kernel.load(0)
    machine.host = replace(relaxed, capturing=lambda: True)
    kernel.launch(0, 1, 0, 0, 0.0, 0)
    assert len(machine.driver.launches) == 1


def test_a_forked_child_starts_afresh(machine: Machine, module: Module) -> None:
    kernel = module.kernel("probe", args="Pifq", block=32)
    kernel.launch(0, 1, 0, 0, 0.0, 0)
    held = threading.Event()
    release = threading.Event()

    def hold_the_locks() -> None:
        with kernel._lock, module._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold_the_locks)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        before = len(machine.driver.calls)
        kernel.launch(0, 1, 0, 0, 0.0, 0)
        reloaded = any(call[0] == "cuLibraryLoadData" for call in machine.driver.calls[before:])
        os._exit(0 if reloaded else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kernel._loaded


def test_modules_are_freed(tmp_path: Path) -> None:
    from gecko_lab.kernels.runtime import module as module_file

    gc.collect()
    before = len(module_file._modules)
    Module(str(tmp_path / "cuda.py"), "probe.cu", kernels=("probe",))
    gc.collect()
    assert len(module_file._modules) == before


def test_without_a_gpu_the_error_says_so(module: Module) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    device.host.cache_clear()
    with pytest.raises(KernelError, match="no CUDA device"):
        module.kernel("probe", args="Pifq", block=32).launch(0, 1, 0, 0, 0.0, 0)
