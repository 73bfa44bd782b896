// Cross entropy of rows of logits: forward reads a row once (a running maximum and sum), backward replaces it by its
// gradient. A block has a row. Defines: ELEMENT type of the logits, WIDTH elements an access.
#include "ptx.cuh"

using T = ELEMENT;
constexpr int W = WIDTH, THREADS = 512, WARPS = THREADS / 32;
constexpr float LEAST = -3.0e38f;  // the maximum of nothing; finite, so that differences of two of them are

// The sum of exp(x - most) over what was seen. NaN passes into the sum, since fmaxf leaves it out of the maximum.
struct Running {
    float most = LEAST, sum = 0.f;
    DEVICE void add(float other_most, float other_sum) {
        const float next = fmaxf(most, other_most);
        sum = sum * __expf(most - next) + other_sum * __expf(other_most - next);
        most = next;
    }
    DEVICE void add(const float (&x)[W]) {
        float top = x[0], part = 0.f;
#pragma unroll
        for (int w = 1; w < W; ++w) top = fmaxf(top, x[w]);
        top = fmaxf(fmaxf(top, most), LEAST);
#pragma unroll
        for (int w = 0; w < W; ++w) part += __expf(x[w] - top);
        sum = sum * __expf(most - top) + part;
        most = top;
    }
    DEVICE void over_warp() {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            add(__shfl_xor_sync(0xffffffffu, most, offset), __shfl_xor_sync(0xffffffffu, sum, offset));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    forward(float* losses, float* lse, const T* logits, const int64_t* targets, int columns) {
    __shared__ float tops[WARPS], sums[WARPS];
    const T* const row = logits + int64_t(blockIdx.x) * columns;
    Running seen;
#pragma unroll 2
    for (int i = threadIdx.x * W; i < columns; i += THREADS * W) {
        float x[W];
        load(row + i, x);
        seen.add(x);
    }
    seen.over_warp();
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = seen.most, sums[threadIdx.x / 32] = seen.sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    Running all;
    if (threadIdx.x < WARPS) all.most = tops[threadIdx.x], all.sum = sums[threadIdx.x];
    all.over_warp();
    if (threadIdx.x == 0) {
        const int64_t target = targets[blockIdx.x];
        const float rest = logf(all.sum);
        const bool known = target >= 0 && target < columns;  // else NaN, which a run notices
        lse[blockIdx.x] = all.most + rest;
        losses[blockIdx.x] = known ? (all.most - to_float(row[target])) + rest : __uint_as_float(0x7fffffffu);
    }
}

// logits <- (softmax - [column is the target]) * dlosses
extern "C" __global__ void __launch_bounds__(THREADS)
    backward(T* logits, const int64_t* targets, const float* lse, const float* dlosses, int columns) {
    T* const row = logits + int64_t(blockIdx.x) * columns;
    const int64_t target = targets[blockIdx.x];
    const float total = lse[blockIdx.x], scale = dlosses[blockIdx.x];
#pragma unroll 2
    for (int i = threadIdx.x * W; i < columns; i += THREADS * W) {
        float x[W];
        load(row + i, x);
#pragma unroll
        for (int w = 0; w < W; ++w) x[w] = (__expf(x[w] - total) - (i + w == target ? 1.f : 0.f)) * scale;
        store(row + i, x);
    }
}
