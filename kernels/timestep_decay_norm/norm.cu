// Time-step norms (spec sections 1.1 and 1.2), forward and backward, one pass over memory each: a block holds a tile of
// steps and whole groups in shared memory, forms the moments, tells later tiles what its own does to the running pair,
// hears what arrives from earlier ones, and finishes the tile.
#include "forward.cuh"
#include "backward.cuh"

// Before a chain of tiles that looks back through global memory: `slots` become "not yet", and `begin` is found.
extern "C" __global__ void __launch_bounds__(1024) prepare(const uint8_t* bos, int* begin, uint64_t* slots, int64_t count,
                                                           int rows, int L) {
    if (int(blockIdx.x) >= rows) {
        const int64_t stride = int64_t(gridDim.x - rows) * 1024;
        for (int64_t i = int64_t(blockIdx.x - rows) * 1024 + threadIdx.x; i < count; i += stride) slots[i] = ~0ull;
        return;
    }
    __shared__ int latest[32];
    bos += int64_t(blockIdx.x) * L, begin += int64_t(blockIdx.x) * L;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, span = (L + 1023) / 1024 * 32;
    const int from = min(warp * span, L), to = min(from + span, L);
    const int last = find_begins(bos, from, to, -1, [](int, int) {});
    if (lane == 0) latest[warp] = last;
    __syncthreads();
    int before = -1;
    for (int w = 0; w < warp; ++w) before = max(before, latest[w]);
    find_begins(bos, from, to, before, [&](int t, int latest_bos) { begin[t] = latest_bos; });
}

extern "C" __global__ void __launch_bounds__(1024) parameters(const float* partial, P* dweight, P* dbias, int N, int D) {
    sum_partials(partial, dweight, dbias, N, D);
}
