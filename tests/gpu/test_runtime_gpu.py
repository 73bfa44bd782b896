"""The runtime on a real device: streams, threads, graphs, devices, and what a launch costs."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gecko_lab.kernels.runtime import KernelError, LaunchError, Module, arch_of, tensor_map_2d

SOURCE = """
#include "ptx.cuh"
extern "C" __global__ void add(const float* x, float* y, int64_t n, float a) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < n) y[i] = x[i] + a;
}
extern "C" __global__ void spin(float* y, int64_t cycles) {
    int64_t start = clock64();
    while (clock64() - start < cycles) {}
    y[threadIdx.x] = 7.f;
}
extern "C" __global__ void last_of_dynamic(float* y, int n) {
    extern __shared__ float buffer[];
    for (int i = threadIdx.x; i < n; i += 256) buffer[i] = float(i);
    __syncthreads();
    if (threadIdx.x == 0) y[0] = buffer[n - 1];
}
// 16 rows of bf16 against identity, through ldmatrix and mma: y (16, 8) = x (16, 16) times the first 8 unit vectors.
extern "C" __global__ void matrix(const bf16* x, float* y) {
    __shared__ __align__(16) bf16 tile[16 * 16];
    int lane = threadIdx.x;
    copy_async_16(shared_address(tile + lane * 8), x + lane * 8);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    uint32_t a[4];
    load_matrix_x4(a, shared_address(tile + (lane % 16) * 16 + (lane / 16) * 8));
    int g = lane / 4, t = lane % 4;
    float c[4] = {};
    mma_bf16(c, a, pack_bf16(2 * t == g, 2 * t + 1 == g), 0);
    y[g * 8 + 2 * t] = c[0], y[g * 8 + 2 * t + 1] = c[1];
    y[(g + 8) * 8 + 2 * t] = c[2], y[(g + 8) * 8 + 2 * t + 1] = c[3];
}
extern "C" __global__ void sums(const bf16* x, float* y) {
    __shared__ float scratch[8];
    float v[8];
    load<8>(x + 8 * threadIdx.x, v);
    float total = 0.f, largest = -1e30f;
    for (int i = 0; i < 8; ++i) total += v[i], largest = fmaxf(largest, v[i]);
    y[threadIdx.x] = block_sum<256>(total, scratch);
    y[256 + threadIdx.x] = warp_max(largest);
}
"""
KERNELS = ("add", "spin", "last_of_dynamic", "matrix", "sums")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.setenv("GECKO_LAB_KERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "samples.cu").write_text(SOURCE)
    return Module(str(tmp_path / "cuda.py"), "samples.cu", kernels=KERNELS)


class Adder:
    """y = x + a through the kernel."""

    def __init__(self, module: Module) -> None:
        self.kernel = module.kernel("add", args="PPqf", block=256)

    def __call__(self, x: Tensor, a: float) -> Tensor:
        y = torch.full_like(x, float("nan"))
        self.kernel.launch(x.device.index, -(-x.numel() // 256), x.data_ptr(), y.data_ptr(), x.numel(), a)
        return y


def test_launch(module: Module, cuda: torch.device) -> None:
    x = torch.randn(1001, device=cuda)
    torch.testing.assert_close(Adder(module)(x, 2.5), x + 2.5, rtol=0, atol=0)


def test_second_module_is_read_from_disk(module: Module, cuda: torch.device) -> None:
    x = torch.randn(10, device=cuda)
    Adder(module)(x, 1.0)
    again = Module(str(module.path), module.path.name, kernels=KERNELS)
    torch.testing.assert_close(Adder(again)(x, 1.0), x + 1.0)
    assert again.compile(arch_of(cuda.index)).from_cache


def test_runs_on_the_current_stream(module: Module, cuda: torch.device) -> None:
    spin, add = module.kernel("spin", args="Pq", block=32), Adder(module)
    spin.load(cuda.index)
    add.kernel.load(cuda.index)
    x = torch.zeros(32, device=cuda)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        spin.launch(cuda.index, 1, x.data_ptr(), 50_000_000)
        assert not stream.query()
        assert torch.cuda.current_stream(cuda) == stream
        y = add(x, 1.0)
    stream.synchronize()
    assert y.tolist() == [8.0] * 32


def test_two_streams_run_beside_each_other(module: Module, cuda: torch.device) -> None:
    spin = module.kernel("spin", args="Pq", block=32)
    x = torch.zeros(2, 32, device=cuda)
    spin.launch(cuda.index, 1, x.data_ptr(), 1000)
    torch.cuda.synchronize()

    def seconds(streams: list[torch.cuda.Stream]) -> float:
        start = time.perf_counter()
        for row, stream in zip(x, streams):
            with torch.cuda.stream(stream):
                spin.launch(cuda.index, 1, row.data_ptr(), 100_000_000)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    one, other = torch.cuda.Stream(cuda), torch.cuda.Stream(cuda)
    assert seconds([one, other]) < 0.75 * seconds([one, one])


def test_graph_capture_and_replay(module: Module, cuda: torch.device) -> None:
    add = Adder(module)
    x = torch.zeros(300, device=cuda)
    add(x, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = add(add(x, 1.0), 2.0)
    for value in (5.0, -1.0):
        x.fill_(value)
        y.zero_()
        graph.replay()
        assert y.unique().tolist() == [value + 3.0]


def test_first_use_during_capture_is_refused(module: Module, cuda: torch.device) -> None:
    x = torch.zeros(300, device=cuda)
    add = Adder(module)
    with pytest.raises(KernelError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        add(x, 1.0)
    assert add(x, 1.0).unique().tolist() == [1.0]


def test_backward_on_a_fresh_thread(module: Module, cuda: torch.device) -> None:
    add = Adder(module)

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return add(x, 1.0)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return add(gradient.contiguous(), 10.0)

    x = torch.zeros(64, device=cuda, requires_grad=True)
    Shift.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [11.0] * 64


def test_a_plain_thread_may_launch_first(module: Module, cuda: torch.device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    add, x = Adder(module), torch.zeros(64, device=cuda)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda a: add(x, float(a)), range(16)))
    torch.cuda.synchronize()
    assert [result[0].item() for result in results] == list(range(16))


def test_dynamic_shared_memory_beyond_48_kib(module: Module, cuda: torch.device) -> None:
    kernel = module.kernel("last_of_dynamic", args="Pi", block=256)
    limit = kernel.load(cuda.index).smem_limit
    y = torch.zeros(1, device=cuda)
    for size in (1024, limit // 4 * 4):
        kernel.launch(cuda.index, 1, y.data_ptr(), size // 4, smem=size)
        assert y.item() == size // 4 - 1
    with pytest.raises(LaunchError, match="last_of_dynamic"):
        kernel.launch(cuda.index, 1, y.data_ptr(), 1, smem=limit + 1)


def test_matrix_instructions_and_reductions(module: Module, cuda: torch.device) -> None:
    x = torch.randn(16, 16, device=cuda, dtype=torch.bfloat16)
    y = torch.full((16, 8), float("nan"), device=cuda)
    module.kernel("matrix", args="PP", block=32).launch(cuda.index, 1, x.data_ptr(), y.data_ptr())
    torch.testing.assert_close(y, x[:, :8].float(), rtol=0, atol=0)
    x = torch.randn(2048, device=cuda, dtype=torch.bfloat16)
    y = torch.full((2, 256), float("nan"), device=cuda)
    module.kernel("sums", args="PP", block=256).launch(cuda.index, 1, x.data_ptr(), y.data_ptr())
    torch.testing.assert_close(y[0], x.float().sum().expand(256))
    torch.testing.assert_close(y[1], x.float().view(8, 256).amax(1).repeat_interleave(32), rtol=0, atol=0)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one device")
def test_every_device(module: Module) -> None:
    add = Adder(module)
    for index in range(torch.cuda.device_count()):
        x = torch.ones(100, device=f"cuda:{index}")
        assert add(x, float(index)).unique().tolist() == [1.0 + index]
    assert torch.cuda.current_device() == 0


def test_launch_overhead(module: Module, cuda: torch.device) -> None:
    add, x = Adder(module), torch.zeros(256, device=cuda)
    y = torch.empty_like(x)
    values = (cuda.index, (1, 1, 1), x.data_ptr(), y.data_ptr(), x.numel(), 1.0)
    add.kernel.launch(*values)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            add.kernel.launch(*values)
        times.append((time.perf_counter() - start) / 100 * 1e6)
    print(f"\nlaunch: {statistics.median(times):.2f} us (best {min(times):.2f})")
    assert min(times) < 20


def test_tensor_map_is_encoded(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] < 9:
        pytest.skip("needs sm_90 or newer")
    x = torch.zeros(128, 256, device=cuda, dtype=torch.bfloat16)
    encoded = tensor_map_2d(x.data_ptr(), x.dtype, 128, 256, 512, (64, 64))
    assert len(encoded) == 128
    assert any(encoded)
    with pytest.raises(LaunchError, match="cuTensorMapEncodeTiled"):
        tensor_map_2d(x.data_ptr(), x.dtype, 128, 256, 511, (64, 64))
