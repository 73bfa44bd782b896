// The row-wise half of sliding-chunk attention: scores -> weights, and its derivative. One block a row.
//
// Compiled with THREADS and VECS (THREADS * VECS * 4 >= 2 * chunk), BF16 (type of the weights; scores are float32) and
// ALIGNED (chunk % 4 == 0). A row's visible keys are those from the start of its document to itself; keys are counted
// from the rectangle's first. Weights lie in a band: one chunk further is 2 chunk^2 + chunk entries further.
#include "dropkey.cuh"

#define INFINITY __int_as_float(0x7f800000)

#if BF16
using Weight = bf16;
#else
using Weight = float;
#endif

struct Row {
    int64_t scores, weights, lse;  // offsets of the row
    int low, high;                 // visible keys [low, high]
    uint32_t key;                  // of the dropout's random numbers
};

DEVICE Row locate(const int* starts, const int64_t* seed, int64_t item, int ld, int rows, int row, int key, int chunk,
                  int length, int total, int heads, int first_batch, int first_head, int all_heads) {
    int n = blockIdx.x / rows, r = blockIdx.x % rows;
    int b = first_batch + blockIdx.y / heads, h = first_head + blockIdx.y % heads;
    int t = row + n * chunk + r, k = key + n * chunk;
    Row out;
    out.scores = (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * ld;
    out.weights = blockIdx.y * item + int64_t(n) * (2ll * chunk * chunk + chunk) + int64_t(r) * 2 * chunk;
    out.lse = (int64_t(b) * all_heads + h) * length + t - (total - length);
    out.low = starts ? starts[int64_t(b) * total + t] - k : 0;
    out.high = t - k;
    if (seed) out.key = row_key(uint64_t(*seed), b * all_heads + h, t);
    return out;
}

DEVICE bool visible(const Row& row, int j, bool drop, uint32_t threshold) {
    if (j < row.low || j > row.high) return false;
    return !drop || !dropped(row.key, j, threshold);
}

DEVICE void put(Weight* to, int j, int keys, const float (&x)[4]) {
#if ALIGNED
    if (j + 4 <= keys) {
#if BF16
        *reinterpret_cast<uint2*>(to + j) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
#else
        *reinterpret_cast<float4*>(to + j) = make_float4(x[0], x[1], x[2], x[3]);
#endif
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (j + i < keys) to[j + i] = from_float<Weight>(x[i]);
}

DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (THREADS == 32) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) x = fmaxf(x, scratch[warp]);
    __syncthreads();
    return x;
}

#define PLACE                                                                                                       \
    const int *starts, const int64_t *seed, uint32_t threshold, int64_t item, int ld, int rows, int row, int key,   \
        int keys, int chunk, int length, int total, int heads, int first_batch, int first_head, int all_heads
#define LOCATE                                                                                                      \
    locate(starts, seed, item, ld, rows, row, key, chunk, length, total, heads, first_batch, first_head, all_heads)

// weights = softmax of a row's visible scores, zeros elsewhere; lse = log of the sum of exp. A row whose largest
// score is infinite, or that sees nothing, gets zeros and lse = inf.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_rows(const float* __restrict__ scores, Weight* __restrict__ weights, float* __restrict__ lse, PLACE) {
    __shared__ float scratch[32];
    Row at = LOCATE;
    float x[VECS][4];
    float top = -INFINITY;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int j = (v * THREADS + threadIdx.x) * 4;
        float4 s = make_float4(0.f, 0.f, 0.f, 0.f);
        if (j <= at.high && j + 3 >= at.low) s = *reinterpret_cast<const float4*>(scores + at.scores + j);
        x[v][0] = s.x, x[v][1] = s.y, x[v][2] = s.z, x[v][3] = s.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!visible(at, j + i, seed != nullptr, threshold)) x[v][i] = -INFINITY;
            top = fmaxf(top, x[v][i]);
        }
    }
    top = block_max(top, scratch);
    bool empty = isinf(top);
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[v][i] = empty ? 0.f : exp2f((x[v][i] - top) * 1.4426950408889634f);
            sum += x[v][i];
        }
    sum = block_sum<THREADS>(sum, scratch);
    float scale = empty ? 0.f : 1.f / sum;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int j = (v * THREADS + threadIdx.x) * 4;
        float w[4] = {x[v][0] * scale, x[v][1] * scale, x[v][2] * scale, x[v][3] * scale};
        put(weights + at.weights, j, keys, w);
    }
    if (threadIdx.x == 0) lse[at.lse] = empty ? INFINITY : top + logf(sum);
}

// From scores and dweights (d loss / d weights), both float32: the weights again, and
// dscores = weights * (dweights - sum over the row of weights * dweights).
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_rows_backward(const float* __restrict__ scores, const float* __restrict__ dweights,
                          Weight* __restrict__ weights, Weight* __restrict__ dscores, const float* __restrict__ lse,
                          PLACE) {
    __shared__ float scratch[32];
    Row at = LOCATE;
    float norm = lse[at.lse];
    float x[VECS][4], d[VECS][4];
    float delta = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int j = (v * THREADS + threadIdx.x) * 4;
        float4 s = make_float4(0.f, 0.f, 0.f, 0.f), g = s;
        if (j <= at.high && j + 3 >= at.low) {
            s = *reinterpret_cast<const float4*>(scores + at.scores + j);
            g = *reinterpret_cast<const float4*>(dweights + at.scores + j);
        }
        x[v][0] = s.x, x[v][1] = s.y, x[v][2] = s.z, x[v][3] = s.w;
        d[v][0] = g.x, d[v][1] = g.y, d[v][2] = g.z, d[v][3] = g.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bool seen = visible(at, j + i, seed != nullptr, threshold) && !isinf(norm);
            x[v][i] = seen ? exp2f((x[v][i] - norm) * 1.4426950408889634f) : 0.f;
            d[v][i] = seen ? d[v][i] : 0.f;
            delta += x[v][i] * d[v][i];
        }
    }
    delta = block_sum<THREADS>(delta, scratch);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int j = (v * THREADS + threadIdx.x) * 4;
        put(weights + at.weights, j, keys, x[v]);
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = x[v][i] * (d[v][i] - delta);
        put(dscores + at.weights, j, keys, w);
    }
}
