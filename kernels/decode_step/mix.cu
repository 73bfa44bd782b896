// The ends of a step that are not matrix products: tokens in, and the time-step norm with the moving average.
// Defines: FEATURES of a norm group, MODES (0: no average), COMPLEX, DECAY (the norm with moving averages).
#include "step.cuh"

// Rows of the stream: where their documents stand; embeddings, and this position's angles. Grid (D / 1024, B).
__global__ void __launch_bounds__(THREADS)
    begin(const int64_t* tokens, const T* embedding, T* x, const int64_t* clock, int* fresh, int64_t* segment,
          int64_t* length, int64_t* start, int64_t* counts, int64_t* ids, const double* turns, float* cosine, float* sine,
          float scale, int dim, int vocabulary, int64_t bos, int norms, int pairs, int slots) {
    let_next_begin();
    wait_for_previous();
    const int row = blockIdx.y, batch = gridDim.y;
    const int64_t token = tokens[row], position = *clock;
    if (token < 0 || token >= vocabulary) __trap();  // as an embedding of torch does on a GPU
    for (int i = blockIdx.x * 1024 + threadIdx.x; i < min(dim, int(blockIdx.x + 1) * 1024); i += THREADS)
        x[int64_t(row) * dim + i] = from_float<T>(scale * to_float(embedding[token * dim + i]));
    if (blockIdx.x != 0) return;
    const bool first = token == bos;
    for (int i = threadIdx.x; i < norms; i += THREADS)
        counts[i * batch + row] = first ? 1 : counts[i * batch + row] + 1;
    if (threadIdx.x == 0) {
        const int64_t id = segment[row] + first;
        fresh[row] = first;
        segment[row] = id;
        length[row] = first ? 1 : length[row] + 1;
        if (first) start[row] = position;
        ids[int64_t(row) * slots + position % slots] = id;
    }
    if (row != 0) return;
    for (int i = threadIdx.x; i < pairs; i += THREADS) {
        const double turn = double(position) * turns[i];
        sincospif(2.f * float(turn - rint(turn)), sine + i, cosine + i);
    }
}

// One group of one row. Four lanes share a feature, each with every fourth of its modes. Grid (G, B).
// rate is 1 - beta (which float32 would get wrong), log the logarithm of beta; scale is 1 + weight; squares (B, G) gets the sum of e^2 over the group.
#if COMPLEX
using Mode = float2;
#else
using Mode = float;
#endif

__global__ void __launch_bounds__(THREADS)
    mix(const T* x, T* a, T* e, float* squares, const float* scale, const float* shift, float* mean, float* var,
        const int64_t* count, const int* fresh, Mode* h, const float* p, const Mode* q, const Mode* gamma,
        const float* skip, float beta1, float beta2, float rate1, float rate2,
        double log1, double log2, float eps) {
    constexpr int EACH = (FEATURES + 63) / 64, OWN = (MODES + 3) / 4;
    __shared__ float scratch[WARPS];
    let_next_begin();
    const int group = blockIdx.x, row = blockIdx.y, quad = threadIdx.x / 4, lane = threadIdx.x % 4;
    const int64_t dim = int64_t(gridDim.x) * FEATURES, cell = int64_t(row) * gridDim.x + group;
    if constexpr (MODES > 0) {
        for (int i = threadIdx.x * (128 / sizeof(Mode)); i < FEATURES * MODES; i += THREADS * (128 / sizeof(Mode))) {
            prefetch(h + (row * dim + group * FEATURES) * MODES + i);
            prefetch(q + int64_t(group) * FEATURES * MODES + i);
            prefetch(gamma + int64_t(group) * FEATURES * MODES + i);
            prefetch(p + int64_t(group) * FEATURES * MODES + i);
        }
    }
    wait_for_previous();
    const bool first = fresh[row];
    float values[EACH], sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int f = quad + 64 * i;
        values[i] = f < FEATURES ? to_float(x[row * dim + group * FEATURES + f]) : 0.f;
        if (lane == 0) sum += values[i];
    }
    float m = first ? 0.f : mean[cell], v = first ? 0.f : var[cell];
    const float mu = block_sum<THREADS>(sum, scratch) / FEATURES;
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (lane == 0 && quad + 64 * i < FEATURES) sum += (values[i] - mu) * (values[i] - mu);
    const float spread = block_sum<THREADS>(sum, scratch) / FEATURES;
    float centre, width;
    const int64_t steps = count[row];
#if DECAY
    m = fmaf(beta1, m, rate1 * mu);
    v = fmaf(beta2, v, rate2 * spread);
    centre = m / -expm1f(float(double(steps) * log1));
    width = v / -expm1f(float(double(steps) * log2));
#else
    const float delta = mu - m;
    m += delta / float(steps);
    v += (spread - v + delta * (mu - m)) / float(steps);
    centre = m;
    width = v;
#endif
    if (threadIdx.x == 0) mean[cell] = m, var[cell] = v;
    const float inverse = rsqrtf(width + eps);
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int f = quad + 64 * i;
        if (f >= FEATURES) break;  // whole quads leave
        const int64_t feature = int64_t(group) * FEATURES + f;
        const float in = rounded(fmaf((values[i] - centre) * inverse, scale[feature], shift[feature]));
        if (lane == 0) a[row * dim + feature] = from_float<T>(in);
        float out = in;
        if constexpr (MODES > 0) {
            float y = 0.f;
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                const int n = lane + 4 * j;
                if (n >= MODES) break;
                Mode* const at = h + (row * dim + feature) * MODES + n;
                const int64_t c = feature * MODES + n;
                const Mode w = q[c], g = gamma[c];
                Mode state = *at;
#if COMPLEX
                if (first) state = make_float2(0.f, 0.f);
                state = make_float2(fmaf(w.x, state.x, fmaf(-w.y, state.y, p[c] * in)), fmaf(w.x, state.y, w.y * state.x));
                y = fmaf(g.x, state.x, fmaf(-g.y, state.y, y));
#else
                state = fmaf(w, first ? 0.f : state, p[c] * in);
                y = fmaf(g, state, y);
#endif
                *at = state;
            }
            const uint32_t mine = 0xfu << (threadIdx.x % 32 / 4 * 4);
            y += __shfl_xor_sync(mine, y, 1);
            y += __shfl_xor_sync(mine, y, 2);
            out = rounded(fmaf(in, skip[feature], y));
            if (lane == 0) e[row * dim + feature] = from_float<T>(out);
        }
        if (lane == 0) sum += out * out;
    }
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) squares[cell] = sum;
}
