// Norms over the features of a row (spec section 2): RMS, and with CENTERED the layer norm; GROUPS slices of FEATURES
// features side by side. A thread owns fixed columns and walks over rows, so that the weights and the sums of their
// gradients stay in registers.
// Defines: CENTERED 0/1; INPUT, PARAMETER types of x and of the parameters; FEATURES a group; VECTOR elements an access;
// LANES threads a group (a power of two up to 32, or all of the block); VECTORS accesses a thread, group and row;
// GROUPS groups a block; FORWARD_ROWS, BACKWARD_ROWS rows at a time; THREADS a block;
// FORWARD_BLOCKS, BACKWARD_BLOCKS a multiprocessor.
#include "ptx.cuh"
#include "../timestep_decay_norm/vectors.cuh"

using X = INPUT;
using P = PARAMETER;
constexpr int K = FEATURES;
constexpr int SLOTS = LANES * GROUPS, ACROSS = THREADS / SLOTS, WARPS = THREADS / 32;
constexpr bool WHOLE = LANES * VECTORS * VECTOR == K;

struct Share {
    int lane, group, step;
    DEVICE Share(int strip) {
        lane = threadIdx.x % LANES;
        group = strip * GROUPS + threadIdx.x / LANES % GROUPS;
        step = threadIdx.x / SLOTS;
    }
    DEVICE int column(int v) const { return (v * LANES + lane) * VECTOR; }
    DEVICE bool within(int v) const { return WHOLE || column(v) < K; }
};

// The sums over the threads of a group, for several values at once. Two buffers take turns: a thread that writes one
// has passed the barrier behind which every thread had finished with it.
template <int Values> struct Sums {
    float (*buffers)[WARPS][Values];
    int turn = 0;
    DEVICE void operator()(float (&values)[Values]) {
#pragma unroll
        for (float& value : values) value = warp_sum<(LANES < 32 ? LANES : 32)>(value);
        if constexpr (LANES > 32) {
            float(*buffer)[Values] = buffers[turn];
            turn ^= 1;
            if (threadIdx.x % 32 == 0) {
#pragma unroll
                for (int i = 0; i < Values; ++i) buffer[threadIdx.x / 32][i] = values[i];
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < Values; ++i) {
                values[i] = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) values[i] += buffer[w][i];
            }
        }
    }
};

DEVICE void read_weights(const P* weight, const Share& mine, int groups, float (&w)[VECTORS][VECTOR], float plus) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        float raw[VECTOR] = {};
        if (weight && mine.group < groups && mine.within(v)) load(weight + int64_t(mine.group) * K + mine.column(v), raw);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) w[v][i] = plus + raw[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(const X* x_all, const P* weight, const P* bias, X* y_all, float* saved, int64_t rows, int groups, float eps) {
    constexpr int ROWS = FORWARD_ROWS;
    __shared__ float buffers[2][WARPS][ROWS];
    Sums<ROWS> sum_group = {buffers};
    const int strips = (groups + GROUPS - 1) / GROUPS;
    const Share mine(blockIdx.x % strips);
    float w[VECTORS][VECTOR], b[VECTORS][VECTOR];
    read_weights(weight, mine, groups, w, 1.f);
    if (CENTERED) read_weights(bias, mine, groups, b, 0.f);

    const int64_t stride = int64_t(gridDim.x / strips) * ROWS * ACROSS;
    for (int64_t start = int64_t(blockIdx.x / strips) * ROWS * ACROSS; start < rows; start += stride) {
        Vector<X, VECTOR> x[ROWS][VECTORS];
        const int64_t base = (start + mine.step) * groups * K + int64_t(mine.group) * K;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const bool inside = mine.group < groups && start + mine.step + r * ACROSS < rows;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                x[r][v].clear();
                if (inside && mine.within(v)) x[r][v].read(x_all + base + int64_t(r * ACROSS) * groups * K + mine.column(v));
            }
        }
        float mean[ROWS] = {}, scale[ROWS] = {};
        if constexpr (CENTERED) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int v = 0; v < VECTORS; ++v)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) mean[r] += x[r][v][i];
            sum_group(mean);
#pragma unroll
            for (float& value : mean) value *= 1.f / K;
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            if (!mine.within(v)) continue;
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float d = x[r][v][i] - mean[r];
                    scale[r] = fmaf(d, d, scale[r]);
                }
        }
        sum_group(scale);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            scale[r] = rsqrtf(scale[r] * (1.f / K) + eps);
            const int64_t row = start + mine.step + r * ACROSS;
            if (mine.group >= groups || row >= rows) continue;
            if (saved && mine.lane == 0) {
                saved[row * groups + mine.group] = scale[r];
                if (CENTERED) saved[(rows + row) * groups + mine.group] = mean[r];
            }
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (!mine.within(v)) continue;
                float y[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float unit = (x[r][v][i] - mean[r]) * scale[r];
                    y[i] = CENTERED ? fmaf(unit, w[v][i], b[v][i]) : unit * w[v][i];
                }
                write(y_all + base + int64_t(r * ACROSS) * groups * K + mine.column(v), y);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    backward(const X* x_all, const X* dy_all, const P* weight, const float* saved, X* dx_all, float* partial, int64_t rows,
             int groups) {
    constexpr int ROWS = BACKWARD_ROWS, SUMS = 1 + CENTERED;
    __shared__ float buffers[2][WARPS][ROWS * SUMS];
    __shared__ float exchange[THREADS * VECTOR];
    Sums<ROWS * SUMS> sum_group = {buffers};
    const int strips = (groups + GROUPS - 1) / GROUPS;
    const Share mine(blockIdx.x % strips);
    float w[VECTORS][VECTOR];
    read_weights(weight, mine, groups, w, 1.f);
    float gradient[SUMS][VECTORS][VECTOR] = {};  // of the weight, then of the bias

    const int64_t stride = int64_t(gridDim.x / strips) * ROWS * ACROSS;
    for (int64_t start = int64_t(blockIdx.x / strips) * ROWS * ACROSS; start < rows; start += stride) {
        Vector<X, VECTOR> x[ROWS][VECTORS], dy[ROWS][VECTORS];
        float mean[ROWS] = {}, scale[ROWS] = {};
        const int64_t base = (start + mine.step) * groups * K + int64_t(mine.group) * K;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int64_t row = start + mine.step + r * ACROSS;
            const bool inside = mine.group < groups && row < rows;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                x[r][v].clear(), dy[r][v].clear();
                if (inside && mine.within(v)) {
                    const int64_t at = base + int64_t(r * ACROSS) * groups * K + mine.column(v);
                    x[r][v].read(x_all + at), dy[r][v].read(dy_all + at);
                }
            }
            if (inside) {
                scale[r] = saved[row * groups + mine.group];
                if (CENTERED) mean[r] = saved[(rows + row) * groups + mine.group];
            }
        }
        float sums[ROWS * SUMS] = {};  // of dy w (x - mean), then of dy w
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float g = dy[r][v][i] * w[v][i];
                    sums[r] = fmaf(g, x[r][v][i] - mean[r], sums[r]);
                    if (CENTERED) sums[(SUMS - 1) * ROWS + r] += g;
                }
        sum_group(sums);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (mine.group >= groups || start + mine.step + r * ACROSS >= rows) continue;
            const float stretch = -sums[r] * scale[r] * scale[r] * scale[r] * (1.f / K);
            const float shift = CENTERED ? -sums[(SUMS - 1) * ROWS + r] * scale[r] * (1.f / K) : 0.f;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (!mine.within(v)) continue;
                float dx[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float g = dy[r][v][i], d = x[r][v][i] - mean[r];
                    dx[i] = fmaf(g * w[v][i], scale[r], fmaf(stretch, d, shift));
                    gradient[0][v][i] = fmaf(g, d * scale[r], gradient[0][v][i]);
                    if (CENTERED) gradient[SUMS - 1][v][i] += g;
                }
                write(dx_all + base + int64_t(r * ACROSS) * groups * K + mine.column(v), dx);
            }
        }
    }

    if (!partial) return;
    partial += int64_t(blockIdx.x / strips) * SUMS * groups * K;
#pragma unroll
    for (int s = 0; s < SUMS; ++s)
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            __syncthreads();
            write(exchange + threadIdx.x * VECTOR, gradient[s][v]);
            __syncthreads();
            for (int at = threadIdx.x; at < SLOTS * VECTOR; at += THREADS) {
                const int slot = at / VECTOR, group = blockIdx.x % strips * GROUPS + slot / LANES;
                const int column = (v * LANES + slot % LANES) * VECTOR + at % VECTOR;
                if (group >= groups || column >= K) continue;
                float sum = 0.f;
#pragma unroll
                for (int a = 0; a < ACROSS; ++a) sum += exchange[a * SLOTS * VECTOR + at];
                partial[(int64_t(s) * groups + group) * K + column] = sum;
            }
        }
}

extern "C" __global__ void __launch_bounds__(1024) parameters(const float* partial, P* dweight, P* dbias, int N, int D) {
    sum_partials(partial, dweight, dbias, N, D);
}
