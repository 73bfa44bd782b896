// Per-head RMS norm, R affine views and rotary positions: one read of z, R writes; its gradients in one pass too.
// Defines: ELEMENT and PARAMETER types, HEAD features, VIEWS, WIDTH features a lane and run, LANES of a row.
#include "ptx.cuh"

using T = ELEMENT;
using P = PARAMETER;
constexpr int S = HEAD, R = VIEWS, W = WIDTH;
constexpr int THREADS = 128;
constexpr int GROUPS = THREADS / LANES;  // rows, one a (token, head), that a block has in hand at a time
constexpr int RUNS = S / W;              // runs of W features in a row; lane l has runs l, l + LANES, ...
constexpr int V = (RUNS + LANES - 1) / LANES;
constexpr bool KEEP = V * W <= 8;        // wider heads read the weights again in backward: no room in registers
static_assert(S % W == 0 && W % 2 == 0 && LANES <= 32 && R >= 1 && R <= 4, "layout");

// Which row a group of lanes has, and how it steps. Groups in flight are a multiple of the heads: a group keeps its head.
struct Rows {
    uint32_t row, token, step, heads;
    int lane, head;
    DEVICE Rows(uint32_t heads_) : heads(heads_) {
        lane = threadIdx.x % LANES;
        step = gridDim.x * GROUPS;
        row = blockIdx.x * GROUPS + threadIdx.x / LANES;
        token = row / heads;
        head = row - token * heads;
    }
    DEVICE void next() { row += step, token += step / heads; }
};

DEVICE int feature(int lane, int v) { return (lane + v * LANES) * W; }
DEVICE bool owns(int lane, int v) { return RUNS % LANES == 0 || lane + v * LANES < RUNS; }

template <class X> DEVICE void load_row(const X* from, int lane, bool inside, float (&to)[V][W]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (inside && owns(lane, v)) {
            load(from + feature(lane, v), to[v]);
        } else {
#pragma unroll
            for (int w = 0; w < W; ++w) to[v][w] = 0.f;
        }
    }
}

// Start bringing a row into L2. Forward gains a seventh by it on an H200; backward, with more loads of its own, nothing.
template <class X> DEVICE void fetch_row(const X* from, int lane) {
#pragma unroll
    for (int v = 0; v < V; ++v)
        if (owns(lane, v)) prefetch(from + feature(lane, v));
}

template <class X> DEVICE void store_row(X* to, int lane, bool inside, const float (&from)[V][W]) {
#pragma unroll
    for (int v = 0; v < V; ++v)
        if (inside && owns(lane, v)) store(to + feature(lane, v), from[v]);
}

DEVICE float dot(const float (&a)[V][W], const float (&b)[V][W]) {
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
        for (int w = 0; w < W; ++w) sum = fmaf(a[v][w], b[v][w], sum);
    return warp_sum<LANES>(sum);
}

struct Turn {
    float cosine[V][W / 2], sine[V][W / 2];
    DEVICE void load_angles(const float* cos, const float* sin, int64_t position, int lane) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (owns(lane, v)) {
                load(cos + position * (S / 2) + feature(lane, v) / 2, cosine[v]);
                load(sin + position * (S / 2) + feature(lane, v) / 2, sine[v]);
            } else {  // zeros turned by what happens to be in a register could be NaN
#pragma unroll
                for (int w = 0; w < W / 2; ++w) cosine[v][w] = sine[v][w] = 0.f;
            }
    }
    // By the angle, or back by it when `sign` is -1.
    DEVICE void apply(float (&x)[V][W], float sign) const {
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int w = 0; w < W; w += 2) {
                const float c = cosine[v][w / 2], s = sign * sine[v][w / 2], a = x[v][w], b = x[v][w + 1];
                x[v][w] = fmaf(a, c, -b * s);
                x[v][w + 1] = fmaf(a, s, b * c);
            }
    }
};

DEVICE void load_scale(const P* gamma, int view, int head, int heads, int lane, float (&scale)[V][W]) {
    load_row(gamma + (int64_t(view) * heads + head) * S, lane, true, scale);
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
        for (int w = 0; w < W; ++w) scale[v][w] = (1.f + scale[v][w]) * rsqrtf(float(S));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    forward(T* y0, T* y1, T* y2, T* y3, const T* z, const P* gamma, const P* beta, const float* cos, const float* sin,
            uint32_t rows, uint32_t heads, uint32_t length, int rope_heads, int rotated, float eps) {
    T* const y[4] = {y0, y1, y2, y3};
    Rows at(heads);
    const bool turned = cos != nullptr && at.head < rope_heads;
    float scale[R][V][W], shift[R][V][W];
#pragma unroll
    for (int i = 0; i < R; ++i) {
        load_scale(gamma, i, at.head, heads, at.lane, scale[i]);
        load_row(beta + (int64_t(i) * heads + at.head) * S, at.lane, true, shift[i]);
    }
    for (uint32_t first = blockIdx.x * GROUPS; first < rows; first += at.step, at.next()) {
        const bool inside = at.row < rows, turns = turned && inside;
        const int64_t offset = int64_t(at.row) * S;
        float x[V][W];
        load_row(z + offset, at.lane, inside, x);
        if (at.row + at.step < rows) fetch_row(z + offset + int64_t(at.step) * S, at.lane);
        Turn turn;
        if (turns) turn.load_angles(cos, sin, at.token % length, at.lane);
        const float r = rsqrtf(dot(x, x) * (1.f / S) + eps);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            float view[V][W];
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int w = 0; w < W; ++w) view[v][w] = fmaf(x[v][w] * r, scale[i][v][w], shift[i][v][w]);
            if (turns && i < rotated) turn.apply(view, 1.f);
            store_row(y[i] + offset, at.lane, inside, view);
        }
    }
}

// partial (groups in flight, 2R, S): what each group of lanes saw of dgamma, then of dbeta.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward(T* dz, float* partial, const T* g0, const T* g1, const T* g2, const T* g3, const T* z, const P* gamma,
             const float* cos, const float* sin, uint32_t rows, uint32_t heads, uint32_t length, int rope_heads,
             int rotated, float eps) {
    const T* const g[4] = {g0, g1, g2, g3};
    Rows at(heads);
    const bool turned = cos != nullptr && at.head < rope_heads;
    float scale[KEEP ? R : 1][V][W], dgamma[R][V][W], dbeta[R][V][W];
#pragma unroll
    for (int i = 0; i < R; ++i) {
        if constexpr (KEEP) load_scale(gamma, i, at.head, heads, at.lane, scale[i]);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int w = 0; w < W; ++w) dgamma[i][v][w] = dbeta[i][v][w] = 0.f;
    }
    for (uint32_t first = blockIdx.x * GROUPS; first < rows; first += at.step, at.next()) {
        const bool inside = at.row < rows, turns = turned && inside;
        const int64_t offset = int64_t(at.row) * S;
        float x[V][W], dx[V][W], dview[KEEP ? R : 1][V][W];
        load_row(z + offset, at.lane, inside, x);
        if constexpr (KEEP) {
#pragma unroll
            for (int i = 0; i < R; ++i) load_row(g[i] + offset, at.lane, inside, dview[i]);
        }
        Turn turn;
        if (turns) turn.load_angles(cos, sin, at.token % length, at.lane);
        const float square = dot(x, x) * (1.f / S);
        const float r = inside ? rsqrtf(square + eps) : 0.f;
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int w = 0; w < W; ++w) x[v][w] *= r, dx[v][w] = 0.f;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            float(&d)[V][W] = dview[KEEP ? i : 0];
            float(&m)[V][W] = scale[KEEP ? i : 0];
            if constexpr (!KEEP) {
                load_row(g[i] + offset, at.lane, inside, d);
                load_scale(gamma, i, at.head, heads, at.lane, m);
            }
            if (turns && i < rotated) turn.apply(d, -1.f);
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int w = 0; w < W; ++w) {
                    dbeta[i][v][w] += d[v][w];
                    dgamma[i][v][w] = fmaf(d[v][w], x[v][w], dgamma[i][v][w]);
                    dx[v][w] = fmaf(d[v][w], m[v][w], dx[v][w]);
                }
        }
        const float along = dot(dx, x) * (1.f / S);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int w = 0; w < W; ++w) dx[v][w] = r * (dx[v][w] - x[v][w] * along);
        store_row(dz + offset, at.lane, inside, dx);
    }
    float* const mine = partial + int64_t(blockIdx.x * GROUPS + threadIdx.x / LANES) * (2 * R * S);
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int w = 0; w < W; ++w) dgamma[i][v][w] *= rsqrtf(float(S));
        store_row(mine + i * S, at.lane, true, dgamma[i]);
        store_row(mine + (R + i) * S, at.lane, true, dbeta[i]);
    }
}

// dgamma and dbeta (R, heads * S): partial (parts, heads, 2R, S) summed over its parts in a fixed order.
constexpr int COLUMNS = 32, SLICES = 16;
extern "C" __global__ void __launch_bounds__(COLUMNS* SLICES)
    reduce(P* dgamma, P* dbeta, const float* partial, uint32_t parts, uint32_t heads) {
    __shared__ float sums[SLICES][COLUMNS];
    const uint32_t slice = threadIdx.x / COLUMNS, lane = threadIdx.x % COLUMNS;
    const uint32_t column = blockIdx.x * COLUMNS + lane, width = heads * S;
    const uint32_t view = column / width, at = column % width, head = at / S;
    const bool inside = column < 2 * R * width;
    float sum = 0.f;
    if (inside) {
        const float* from = partial + (int64_t(head) * 2 * R + view) * S + at % S;
        const int64_t step = int64_t(heads) * 2 * R * S;
#pragma unroll 8
        for (uint32_t part = slice; part < parts; part += SLICES) sum += from[part * step];
    }
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && inside) {
#pragma unroll
        for (int i = 1; i < SLICES; ++i) sum += sums[i][lane];
        P* const to = view < R ? dgamma + int64_t(view) * width : dbeta + int64_t(view - R) * width;
        to[at] = from_float<P>(sum);
    }
}
