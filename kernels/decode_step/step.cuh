// What the kernels of a decode step share. ELEMENT: type of activations and matrices; all sums are float32.
#pragma once
#include "ptx.cuh"

using T = ELEMENT;
#define INFINITY __int_as_float(0x7f800000)
constexpr int THREADS = 256, WARPS = THREADS / 32;

// A step is a chain of launches. Each lets the next begin at once, and reads what the chain has written only after
// wait_for_previous(): until then it may touch what earlier steps left (weights, buffered keys and values, states).

DEVICE float rounded(float x) { return to_float(from_float<T>(x)); }
DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// The largest over the block, in every thread.
DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) x = fmaxf(x, scratch[warp]);
    __syncthreads();
    return x;
}
