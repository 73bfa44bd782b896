// y = silu(a) [* b] [+ far] and its gradients: one pass over memory each. Defines: ELEMENT type, WIDTH elements an access.
#include "ptx.cuh"

using T = ELEMENT;
constexpr int W = WIDTH;
constexpr int UNROLL = 2;  // accesses a thread and operand, so that enough bytes are on their way

// The fast division gives 0 where the exponential overflows, which is the limit.
DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// a and b are rows of `columns` accesses, a_stride and b_stride elements apart; all else is contiguous.
struct Offsets {
    int64_t flat, a, b;
    DEVICE Offsets(uint32_t i, uint32_t columns, int64_t a_stride, int64_t b_stride) {
        const uint32_t row = i / columns, column = i - row * columns;
        flat = int64_t(i) * W;
        a = row * a_stride + int64_t(column) * W;
        b = row * b_stride + int64_t(column) * W;
    }
};

template <bool HAS_B, bool HAS_FAR>
__global__ void __launch_bounds__(256) forward(T* y, const T* a, const T* b, const T* far, uint32_t count,
                                               uint32_t columns, int64_t a_stride, int64_t b_stride) {
    const uint32_t first = blockIdx.x * (blockDim.x * UNROLL) + threadIdx.x;
    float xa[UNROLL][W], xb[UNROLL][W], xf[UNROLL][W];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i < count) {
            const Offsets at(i, columns, a_stride, b_stride);
            load(a + at.a, xa[u]);
            if constexpr (HAS_B) load(b + at.b, xb[u]);
            if constexpr (HAS_FAR) load(far + at.flat, xf[u]);
        }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i < count) {
#pragma unroll
            for (int w = 0; w < W; ++w) {
                xa[u][w] *= sigmoid(xa[u][w]);
                if constexpr (HAS_B) xa[u][w] *= xb[u][w];
                if constexpr (HAS_FAR) xa[u][w] += xf[u][w];
            }
            store(y + int64_t(i) * W, xa[u]);
        }
    }
}

// With AGAIN the value y replaces its gradient in dy: cheaper than to have kept it.
template <bool HAS_B, bool AGAIN>
__global__ void __launch_bounds__(256) backward(T* da, T* db, T* dy, const T* a, const T* b, uint32_t count,
                                                uint32_t columns, int64_t a_stride, int64_t b_stride) {
    const uint32_t first = blockIdx.x * (blockDim.x * UNROLL) + threadIdx.x;
    float g[UNROLL][W], xa[UNROLL][W], xb[UNROLL][W];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i < count) {
            const Offsets at(i, columns, a_stride, b_stride);
            load(dy + at.flat, g[u]);
            load(a + at.a, xa[u]);
            if constexpr (HAS_B) load(b + at.b, xb[u]);
        }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i < count) {
            const int64_t at = int64_t(i) * W;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float s = sigmoid(xa[u][w]), silu = xa[u][w] * s;
                const float slope = s + silu * (1.f - s);
                if constexpr (HAS_B) {
                    const float y = silu * xb[u][w];
                    xa[u][w] = g[u][w] * xb[u][w] * slope;
                    xb[u][w] = g[u][w] * silu;
                    g[u][w] = y;
                } else {
                    xa[u][w] = g[u][w] * slope;
                }
            }
            store(da + at, xa[u]);
            if constexpr (HAS_B) store(db + at, xb[u]);
            if constexpr (AGAIN) store(dy + at, g[u]);
        }
    }
}

// Gradient of silu(x + bias), x holding the sum, for two readers: dx = (dy + dy2) silu'(x), dy2 null for one, and in
// partial (slices, columns) the sums of dx, rounded as it is stored, over the rows of each slice: dbias when added up.
extern "C" __global__ void __launch_bounds__(128)
    backward_columns(T* dx, float* partial, const T* dy, const T* dy2, const T* x, uint32_t rows, uint32_t columns) {
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (column >= columns) return;
    float sums[W];
#pragma unroll
    for (int w = 0; w < W; ++w) sums[w] = 0.f;
    for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y * UNROLL) {
        float g[UNROLL][W], other[UNROLL][W], v[UNROLL][W];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint32_t at = row + u * gridDim.y;
            if (at >= rows) continue;
            const int64_t offset = int64_t(at) * columns + column;
            load(dy + offset, g[u]);
            load(x + offset, v[u]);
            if (dy2 != nullptr) load(dy2 + offset, other[u]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint32_t at = row + u * gridDim.y;
            if (at >= rows) continue;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float s = sigmoid(v[u][w]), slope = s + v[u][w] * s * (1.f - s);
                g[u][w] = (dy2 != nullptr ? g[u][w] + other[u][w] : g[u][w]) * slope;
                sums[w] += to_float(from_float<T>(g[u][w]));
            }
            store(dx + int64_t(at) * columns + column, g[u]);
        }
    }
    store(partial + int64_t(blockIdx.y) * columns + column, sums);
}
