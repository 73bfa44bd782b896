// The row-wise parts of the adaptive working memory: softmax over features and over time, their derivatives, and the
// shares of the chunks. Products and the chain over chunks stand in chain.cu and cuBLAS.
//
// Compiled with BF16 (type of keys and weights) and FEATURES (S <= 32 * FEATURES). Rows x (B, L, H, S) are strided by
// (xb, xt, xh); what is written is contiguous.
#include "ptx.cuh"

#define INFINITY __int_as_float(0x7f800000)

#if BF16
using Real = bf16;
#else
using Real = float;
#endif

constexpr float NOTHING = -1e30f;

// A row's softmax over its S features, S spread over the lanes of a warp.
DEVICE void softmax(float (&x)[FEATURES], int features, int lane) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) top = fmaxf(top, lane + 32 * i < features ? x[i] : -INFINITY);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
        x[i] = lane + 32 * i < features ? exp2f((x[i] - top) * 1.4426950408889634f) : 0.f;
        sum += x[i];
    }
    float scale = 1.f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) x[i] *= scale;
}

DEVICE void read(const Real* from, float (&x)[FEATURES], int features, int lane) {
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) x[i] = lane + 32 * i < features ? to_float(from[lane + 32 * i]) : 0.f;
}

// out (B, L, H, S) = softmax over features of x, zero where live (B, L) is given and false. A warp a row.
extern "C" __global__ void __launch_bounds__(256)
    softmax_features(const Real* __restrict__ x, Real* __restrict__ out, const uint8_t* live, int64_t xb, int64_t xt,
                     int64_t xh, int batch, int length, int heads, int features) {
    int lane = threadIdx.x % 32;
    int place = blockIdx.x * 8 + threadIdx.x / 32;
    if (place >= batch * length * heads) return;
    int h = place % heads, at = place / heads;  // b * length + t
    int64_t row = place;
    float q[FEATURES];
    bool use = !live || live[at];
    read(x + at / length * xb + at % length * xt + h * xh, q, features, lane);
    softmax(q, features, lane);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i)
        if (lane + 32 * i < features) out[row * features + lane + 32 * i] = from_float<Real>(use ? q[i] : 0.f);
}

// Derivative of softmax_features and, where lam is given, of softmax_time: dx (B, L, H, S) =
// q (dq - sum_s q dq) + w (dwk + dwv + column), with q the softmax over features, w = exp(x - lam) over time.
// dq comes in `parts` (1 or 2) neighbouring rows of S whose sum counts. lam and column are (B, H, N, S); the rows of a chunk before first (B, N) have w = 0 and q unused: dx = 0 there.
extern "C" __global__ void __launch_bounds__(256)
    softmax_backward(const Real* __restrict__ x, const float* __restrict__ dq, const float* __restrict__ dwk,
                     const float* __restrict__ dwv, const float* __restrict__ lam, const float* __restrict__ column,
                     Real* __restrict__ dx, const uint8_t* live, const int* first, int64_t xb, int64_t xt, int64_t xh,
                     int batch, int length, int heads, int features, int chunk, int parts) {
    int lane = threadIdx.x % 32;
    int place = blockIdx.x * 8 + threadIdx.x / 32;
    if (place >= batch * length * heads) return;
    int h = place % heads, at = place / heads;
    int64_t row = place;
    int b = at / length, t = at % length;
    int chunks = lam ? length / chunk : 1, n = lam ? t / chunk : 0;
    bool use = (!live || live[at]) && !(first && t - n * chunk < first[b * chunks + n]);
    float raw[FEATURES], q[FEATURES], d[FEATURES];
    read(x + b * xb + t * xt + h * xh, raw, features, lane);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) q[i] = raw[i];
    softmax(q, features, lane);
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
        d[i] = 0.f;
        if (lane + 32 * i < features)
            for (int part = 0; part < parts; ++part) d[i] += dq[(row * parts + part) * features + lane + 32 * i];
        dot += q[i] * d[i];
    }
    dot = warp_sum(dot);
    int64_t c = ((int64_t(b) * heads + h) * chunks + n) * features + lane;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
        if (lane + 32 * i >= features) continue;
        int64_t j = row * features + lane + 32 * i;
        float g = q[i] * (d[i] - dot);
        if (lam) g += exp2f((raw[i] - lam[c + 32 * i]) * 1.4426950408889634f) * (dwk[j] + dwv[j] + column[c + 32 * i]);
        dx[j] = from_float<Real>(use ? g : 0.f);
    }
}

// lam (B, H, N, S) = logsumexp over a chunk's rows from first (B, N) on, w (B, N * chunk, H, S) = exp(x - lam), zero
// before first. A block has 32 features of one chunk and head; its 8 warps share the rows.
extern "C" __global__ void __launch_bounds__(256)
    softmax_time(const Real* __restrict__ x, Real* __restrict__ w, float* __restrict__ lam, const int* first,
                 int64_t xb, int64_t xt, int64_t xh, int chunks, int heads, int features, int chunk) {
    __shared__ float tops[8][32], sums[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = blockIdx.x * 32 + lane;
    int n = blockIdx.y / heads, h = blockIdx.y % heads, b = blockIdx.z;
    int start = first ? first[b * chunks + n] : 0;
    bool inside = s < features;
    x += b * xb + int64_t(n) * chunk * xt + h * xh + s;
    float top = -INFINITY, sum = 0.f;
    if (inside)
        for (int t = start + warp; t < chunk; t += 8) {
            float v = to_float(x[t * xt]);
            if (v > top) sum *= exp2f((top - v) * 1.4426950408889634f), top = v;
            sum += exp2f((v - top) * 1.4426950408889634f);
        }
    tops[warp][lane] = top, sums[warp][lane] = sum;
    __syncthreads();
    float most = -INFINITY, all = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, tops[i][lane]);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (sums[i][lane] > 0.f) all += sums[i][lane] * exp2f((tops[i][lane] - most) * 1.4426950408889634f);
    if (!inside) return;
    float norm = all > 0.f ? most + logf(all) : NOTHING;
    if (warp == 0) lam[((int64_t(b) * heads + h) * chunks + n) * features + s] = norm;
    w += ((int64_t(b) * chunks + n) * chunk * heads + h) * features + s;
    for (int t = warp; t < chunk; t += 8) {
        float v = t < start ? 0.f : exp2f((to_float(x[t * xt]) - norm) * 1.4426950408889634f);
        w[int64_t(t) * heads * features] = from_float<Real>(v);
    }
}

// out (N, 2, width) bf16 = x (N, width) float32 as the sum of two bf16, the larger first. Four elements a thread.
extern "C" __global__ void __launch_bounds__(256)
    split(const float* __restrict__ x, bf16* __restrict__ out, int64_t total, int64_t width) {
    int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (i + j >= total) return;
        int64_t to = (i + j) / width * 2 * width + (i + j) % width;
        float v = x[i + j];
        bf16 high = from_float<bf16>(v);
        out[to] = high;
        out[to + width] = from_float<bf16>(v - to_float(high));
    }
}

// The share rho (R, F, S) of each of F chunks in the running normaliser: logz' = logaddexp(lam, logz),
// rho = exp(lam - logz'). keep (B, F) is 0 where the table is cleared first; a row of R has batch row / heads.
extern "C" __global__ void shares(const float* __restrict__ lam, const float* __restrict__ keep,
                                  const float* __restrict__ logz, float* __restrict__ rho, float* __restrict__ last,
                                  int rows, int folds, int features, int heads) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= int64_t(rows) * features) return;
    int row = i / features, s = i % features;
    float z = logz[i];
    for (int f = 0; f < folds; ++f) {
        float l = lam[(int64_t(row) * folds + f) * features + s];
        if (keep[row / heads * folds + f] == 0.f) z = NOTHING;
        float top = fmaxf(l, z);
        z = top + log1pf(expf(fminf(l, z) - top));
        rho[(int64_t(row) * folds + f) * features + s] = expf(l - z);
    }
    last[i] = z;
}

// From drho and dlast to dlam and dlogz.
extern "C" __global__ void shares_backward(const float* __restrict__ drho, const float* __restrict__ dlast,
                                           const float* __restrict__ rho, const float* __restrict__ keep,
                                           float* __restrict__ dlam, float* __restrict__ dlogz, int rows, int folds,
                                           int features, int heads) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= int64_t(rows) * features) return;
    int row = i / features, s = i % features;
    float g = dlast ? dlast[i] : 0.f;
    for (int f = folds - 1; f >= 0; --f) {
        int64_t j = (int64_t(row) * folds + f) * features + s;
        float r = rho[j], d = drho[j] * r, b = g - d;
        dlam[j] = d + b * r;
        g = b * (1.f - r) * keep[row / heads * folds + f];
    }
    dlogz[i] = g;
}

// out (rows) = sum over columns of a * b; a group of `inner` rows is dense, and groups lie a_step and b_step apart. A
// warp a row.
extern "C" __global__ void __launch_bounds__(256)
    row_dot(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out, int64_t a_step,
            int64_t b_step, int rows, int inner, int columns) {
    int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    a += row / inner * a_step + int64_t(row % inner) * columns;
    b += row / inner * b_step + int64_t(row % inner) * columns;
    float sum = 0.f;
    for (int i = threadIdx.x % 32; i < columns; i += 32) sum += a[i] * b[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[row] = sum;
}
