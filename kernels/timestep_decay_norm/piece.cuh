// How a piece of a stream is cut: few enough steps for the warps of one cluster of blocks (sm_90 and newer) to hold a
// row's group in registers. A lane has the moments of one step and a warp those of STEPS. Every warp sends what its
// steps do to the running pair to its own block and to all later ones, from shared memory to shared memory: one
// exchange, no barrier of a block, nothing to prepare in global memory.
// Defines: DECAYED 0/1; INPUT, PARAMETER types of x and of the parameters; FEATURES a group; LANES lanes that hold a
// step of a group, an access of 16 bytes each; CLUSTER blocks.
#pragma once
#include "cluster.cuh"
#include "steps.cuh"
#include "vectors.cuh"

using X = INPUT;
using P = PARAMETER;
constexpr int K = FEATURES, VECTOR = K / LANES, ROWS = LANES;  // accesses a lane: one a step
constexpr int STEPS = 32, WARPS = 8, THREADS = 32 * WARPS, UNITS = CLUSTER * WARPS;
constexpr int BLOCKS = LANES > 8 ? 1 : 2;  // that live on a multiprocessor
static_assert(VECTOR * sizeof(X) == 16 && UNITS <= 32, "a lane looks at a warp");

// `order` is the warp's place in its chain, all steps of a row's group: time order forward, the reverse backward.
struct Place {
    int lane, part, first, rank, order;
    uint32_t chain, row;
    int group, width;
    DEVICE Place(int groups) {
        lane = threadIdx.x % 32, part = lane % LANES, first = lane - part;
        rank = blockIdx.x % CLUSTER, order = rank * WARPS + threadIdx.x / 32;
        chain = blockIdx.x / CLUSTER, row = chain / groups;
        group = chain - row * groups, width = groups * K;
    }
};

extern __shared__ __align__(16) char memory[];
constexpr int TILE_BYTES = ROWS * VECTOR * THREADS * int(sizeof(X));
using Rows = Tile<X, VECTOR, 1, THREADS>;  // accesses of a thread of which there are too many for registers

DEVICE void prefetch_row(const X* row) {
#pragma unroll
    for (int i = 0; i < K; i += 128 / int(sizeof(X))) prefetch(row + i);
}

DEVICE Run with_powers(const Run& run, const Run& powers) {
    return {run.p != 0.f ? powers.p : 0.f, run.q != 0.f ? powers.q : 0.f, run.a, run.b};
}
// Straight from the logarithm, because products of rounded betas drift.
DEVICE Run powers_of(float log1, float log2, int steps) { return {expf(steps * log1), expf(steps * log2), 0.f, 0.f}; }

// What the first `count` warps of the chain do.
template <Kind kind> DEVICE Run all_before(const Run (&runs)[UNITS], int count) {
    const int lane = threadIdx.x % 32;
    const Run run = lane < count ? runs[lane] : identity<kind>();
    return from_lane(warp_scan<kind, UNITS>(run), UNITS - 1);
}
