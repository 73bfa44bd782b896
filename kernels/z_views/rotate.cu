// Rotary positions of the heads of tokens, and a scale: one pass over memory. Backward is the turn by -sin.
// Defines: ELEMENT type, WIDTH elements an access (even).
#include "ptx.cuh"

using T = ELEMENT;
constexpr int W = WIDTH, UNROLL = 2;

// x, y (tokens, heads, 2 * half); `run` accesses a head, `count` in all.
extern "C" __global__ void __launch_bounds__(256)
    rotate(T* y, const T* x, const float* cos, const float* sin, uint32_t count, uint32_t run, uint32_t heads,
           uint32_t length, int rope_heads, float sign, float scale) {
    const uint32_t first = blockIdx.x * (blockDim.x * UNROLL) + threadIdx.x, half = run * W / 2;
    float v[UNROLL][W], c[UNROLL][W / 2], s[UNROLL][W / 2];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i >= count) continue;
        load(x + int64_t(i) * W, v[u]);
        const uint32_t head = i / run, column = i - head * run, token = head / heads;
        if (int(head - token * heads) < rope_heads) {
            const int64_t at = int64_t(token % length) * half + column * (W / 2);
            load(cos + at, c[u]);
            load(sin + at, s[u]);
        } else {
#pragma unroll
            for (int w = 0; w < W / 2; ++w) c[u][w] = 1.f, s[u][w] = 0.f;
        }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (i >= count) continue;
#pragma unroll
        for (int w = 0; w < W; w += 2) {
            const float cosine = scale * c[u][w / 2], sine = scale * sign * s[u][w / 2], a = v[u][w], b = v[u][w + 1];
            v[u][w] = fmaf(a, cosine, -b * sine);
            v[u][w + 1] = fmaf(a, sine, b * cosine);
        }
        store(y + int64_t(i) * W, v[u]);
    }
}
