"""Compiling and caching, which need neither a GPU nor a driver."""

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gecko_lab.kernels.inventory import ARCHS
from gecko_lab.kernels.runtime import CompileError, Module, cache, nvrtc

SOURCE = """
#include "ptx.cuh"
#include "own.cuh"
extern "C" __global__ void scale(const bf16* x, float* y, int n) {
    __shared__ float scratch[4];
    int i = blockIdx.x * 128 + threadIdx.x;
    float v = i < n ? to_float(x[i]) : 0.f;
    y[i] = block_sum<128>(v, scratch) * FACTOR * OWN;
}
template <class T, int K> __global__ void shift(T* x) { x[threadIdx.x] = from_float<T>(to_float(x[threadIdx.x]) + K); }
"""
KERNELS = ("scale", "shift<bf16, 3>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.cu").write_text(SOURCE)
    (tmp_path / "own.cuh").write_text("#pragma once\n#define OWN 1\n")
    return tmp_path


def tiny(folder: Path, **defines: int) -> Module:
    return Module(str(folder / "cuda.py"), "tiny.cu", kernels=KERNELS, defines={"FACTOR": 2, **defines})


def only_entry(kernel_cache: Path) -> Path:
    (entry,) = kernel_cache.iterdir()
    return entry


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_each_architecture(folder: Path, arch: str) -> None:
    info = tiny(folder).compile(arch)
    assert info.cubin[:4] == b"\x7fELF"
    assert info.names["scale"] == "scale"
    assert info.names["shift<bf16, 3>"].startswith("_Z")
    assert set(info.resources) == set(KERNELS)
    assert info.resources["scale"].registers > 0
    assert info.resources["scale"].shared == 16
    assert info.resources["scale"].spill_stores == 0


def test_second_process_reads_the_cache(folder: Path, kernel_cache: Path) -> None:
    first, second = tiny(folder).compile("sm_80"), tiny(folder).compile("sm_80")
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.cubin, first.names, first.resources) == (second.cubin, second.names, second.resources)
    assert only_entry(kernel_cache).name.startswith("tiny.sm_80.")


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob[: len(blob) // 2],
        lambda blob: b"",
        lambda blob: blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:],
        lambda blob: b"another format" + blob,
    ],
    ids=["truncated", "empty", "flipped bit", "foreign"],
)
def test_damaged_entry_is_rebuilt_with_one_line(
    folder: Path, kernel_cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    whole = tiny(folder).compile("sm_80")
    entry = only_entry(kernel_cache)
    entry.write_bytes(damage(entry.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = tiny(folder).compile("sm_80")
    assert not again.from_cache
    assert again.cubin == whole.cubin
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    assert tiny(folder).compile("sm_80").from_cache


def test_what_invalidates_an_entry(folder: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(folder).compile("sm_80")
    assert not tiny(folder, EXTRA=1).compile("sm_80").from_cache
    assert not tiny(folder).compile("sm_89").from_cache
    (folder / "own.cuh").write_text("#pragma once\n#define OWN 2\n")
    assert not tiny(folder).compile("sm_80").from_cache
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    assert not tiny(folder).compile("sm_80").from_cache
    assert len(list(kernel_cache.iterdir())) == 5


def _compile_in_a_race(folder: Path, barrier: Any, answers: Any) -> None:
    module = tiny(folder)
    barrier.wait()
    answers.put(module.compile("sm_80").cubin)


def test_four_processes_race(folder: Path, kernel_cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_compile_in_a_race, args=(folder, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    cubins = {answers.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(cubins) == 1
    only_entry(kernel_cache)
    assert tiny(folder).compile("sm_80").from_cache


def test_unwritable_folder_is_reported_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GECKO_LAB_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cache, "_warned_folders", set())
    with caplog.at_level(logging.WARNING):
        assert tiny(folder).compile("sm_80").cubin
        assert tiny(folder, EXTRA=1).compile("sm_80").cubin
    assert len(caplog.records) == 1
    assert "memory only" in caplog.text


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() == Path(os.environ["GECKO_LAB_KERNEL_CACHE"])
    monkeypatch.delenv("GECKO_LAB_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "gecko_lab" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "gecko_lab" / "kernels"


def test_clear(folder: Path, kernel_cache: Path) -> None:
    tiny(folder).compile("sm_80")
    assert cache.clear() == 1
    assert list(kernel_cache.iterdir()) == []


def test_compile_error_shows_file_line_and_log(folder: Path) -> None:
    (folder / "tiny.cu").write_text(SOURCE.replace("scratch[4];", "scratch[4];\n    undeclared = 1;"))
    with pytest.raises(CompileError, match=r'(?s)tiny\.cu\(6\).*"undeclared" is undefined') as caught:
        tiny(folder).compile("sm_80")
    assert "sm_80" in str(caught.value)


def test_missing_header_is_named(folder: Path) -> None:
    (folder / "own.cuh").unlink()
    with pytest.raises(CompileError, match=r'#include "own.cuh"'):
        tiny(folder).compile("sm_80")


def test_specialisations_are_shared_and_unknown_kernels_refused(folder: Path) -> None:
    module = tiny(folder)
    assert module.specialise(FACTOR=3) is module.specialise(FACTOR=3)
    assert module.specialise(FACTOR=3).label == "tiny.cu[FACTOR=3]"
    assert module.specialise(FACTOR=3).compile("sm_80").cubin != module.compile("sm_80").cubin
    with pytest.raises(ValueError, match="kernel='missing'"):
        module.kernel("missing", args="P", block=32)
    with pytest.raises(ValueError, match="args='Pz'"):
        module.kernel("scale", args="Pz", block=32)


def test_import_touches_neither_cuda_nor_the_disk() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); from gecko_lab.kernels.runtime import Module;"
        "Module('nowhere/cuda.py', 'absent.cu', kernels=('a',)).kernel('a', args='P', block=32);"
        "sys.exit(any(name.startswith('cuda.bindings') for name in set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_failure_to_find_the_builtins_is_mended_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_once, attempts, preloads = nvrtc._compile_once, [], []

    def first_fails(*arguments: Any) -> tuple[int, nvrtc.Program]:
        attempts.append(arguments)
        if len(attempts) == 1:
            return nvrtc.BUILTIN_OPERATION_FAILURE, nvrtc.Program(b"", {}, "failed to open libnvrtc-builtins")
        return compile_once(*arguments)

    preload = nvrtc._preload_builtins
    monkeypatch.setattr(nvrtc, "_compile_once", first_fails)
    monkeypatch.setattr(nvrtc, "_preload_builtins", lambda: preloads.append(preload()))
    assert tiny(folder).compile("sm_80").cubin
    assert (len(attempts), len(preloads)) == (2, 1)
    assert "libnvrtc-builtins" in Path("/proc/self/maps").read_text()


def test_an_architecture_that_nvrtc_does_not_know(folder: Path) -> None:
    with pytest.raises(CompileError, match=r"does not compile for sm_10a"):
        tiny(folder).compile("sm_10a")
