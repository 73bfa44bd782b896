// The row-wise parts of the adaptive working memory: softmax over features and over time, their derivatives, and the
// shares of the chunks. Products and the chain over chunks stand in chain.cu and cuBLAS.
//
// Compiled with BF16 (type of keys and weights), FEATURES (S <= 32 * FEATURES) and EXACT (S = 32 * FEATURES). Rows x
// (B, L, H, S) are strided by (xb, xt, xh), `wide` where 16-byte loads fit them; what is written is contiguous.
#include "ptx.cuh"

#define INFINITY __int_as_float(0x7f800000)

#if BF16
using Real = bf16;
#else
using Real = float;
#endif

constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;
constexpr int SLAB = 128;

// A lane's features: VECTOR neighbours at a time, in 16-byte accesses where S allows, so that a row is read whole.
#if EXACT
constexpr int VECTOR = FEATURES % 8 == 0 ? 8 : FEATURES % 4 == 0 ? 4 : FEATURES % 2 == 0 ? 2 : 1;
#else
constexpr int VECTOR = 1;
#endif
DEVICE int feature(int i, int lane) { return i / VECTOR * 32 * VECTOR + lane * VECTOR + i % VECTOR; }
DEVICE bool inside(int i, int lane, int features) { return EXACT || feature(i, lane) < features; }

template <class T> DEVICE void read(const T* from, float (&x)[FEATURES], int features, int lane, bool wide = true) {
#pragma unroll
    for (int i = 0; i < FEATURES; i += VECTOR) {
        float part[VECTOR] = {};
        if (!inside(i, lane, features)) {
        } else if (wide) {
            load(from + feature(i, lane), part);
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) part[j] = to_float(from[feature(i + j, lane)]);
        }
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) x[i + j] = part[j];
    }
}

DEVICE void write(Real* to, const float (&x)[FEATURES], int features, int lane) {
#pragma unroll
    for (int i = 0; i < FEATURES; i += VECTOR) {
        float part[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) part[j] = x[i + j];
        if (inside(i, lane, features)) store(to + feature(i, lane), part);
    }
}

// A row's softmax over its S features, S spread over the lanes of a warp.
DEVICE void softmax(float (&x)[FEATURES], int features, int lane) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) top = fmaxf(top, inside(i, lane, features) ? x[i] : -INFINITY);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
        x[i] = inside(i, lane, features) ? exp2f((x[i] - top) * LOG2E) : 0.f;
        sum += x[i];
    }
    float scale = 1.f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) x[i] *= scale;
}

// out (B, L, H, S) = softmax over features of x, zero where live (B, L) is given and false. A warp a row.
extern "C" __global__ void __launch_bounds__(256)
    softmax_features(const Real* __restrict__ x, Real* __restrict__ out, const uint8_t* live, int64_t xb, int64_t xt,
                     int64_t xh, int batch, int length, int heads, int features, int wide) {
    int lane = threadIdx.x % 32;
    int place = blockIdx.x * 8 + threadIdx.x / 32;
    if (place >= batch * length * heads) return;
    int h = place % heads, at = place / heads;  // b * length + t
    float q[FEATURES];
    bool use = !live || live[at];
    read(x + at / length * xb + at % length * xt + h * xh, q, features, lane, wide);
    softmax(q, features, lane);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) q[i] = use ? q[i] : 0.f;
    write(out + int64_t(place) * features, q, features, lane);
}

// Derivative of softmax_features and, where lam is given, of the softmax over time: dx (B, L, H, S) =
// q (dq - sum_s q dq) + w (dwk + dwv + column), with q the softmax over features, w = exp(x - lam) over time.
// lam and column are (B, H, N, S); the rows of a chunk before first (B, N) have w = 0 and q unused: dx = 0 there.
extern "C" __global__ void __launch_bounds__(256)
    softmax_backward(const Real* __restrict__ x, const float* __restrict__ dq, const float* __restrict__ dwk,
                     const float* __restrict__ dwv, const float* __restrict__ lam, const float* __restrict__ column,
                     Real* __restrict__ dx, const uint8_t* live, const int* first, int64_t xb, int64_t xt, int64_t xh,
                     int batch, int length, int heads, int features, int chunk, int wide) {
    int lane = threadIdx.x % 32;
    int place = blockIdx.x * 8 + threadIdx.x / 32;
    if (place >= batch * length * heads) return;
    int h = place % heads, at = place / heads;
    int64_t row = int64_t(place) * features;
    int b = at / length, t = at % length;
    int chunks = lam ? length / chunk : 1, n = lam ? t / chunk : 0;
    bool use = (!live || live[at]) && !(first && t - n * chunk < first[b * chunks + n]);
    float raw[FEATURES], q[FEATURES], d[FEATURES];
    read(x + b * xb + t * xt + h * xh, raw, features, lane, wide);
    read(dq + row, d, features, lane);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) q[i] = raw[i];
    softmax(q, features, lane);
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) dot += q[i] * d[i];
    dot = warp_sum(dot);
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) q[i] *= d[i] - dot;
    if (lam) {
        int64_t c = ((int64_t(b) * heads + h) * chunks + n) * features;
        read(lam + c, d, features, lane);
#pragma unroll
        for (int i = 0; i < FEATURES; ++i) raw[i] = exp2f((raw[i] - d[i]) * LOG2E);
        const float* parts[3] = {dwk + row, dwv + row, column + c};
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            read(parts[part], d, features, lane);
#pragma unroll
            for (int i = 0; i < FEATURES; ++i) q[i] += raw[i] * d[i];
        }
    }
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) q[i] = use ? q[i] : 0.f;
    write(dx + row, q, features, lane);
}

// The softmax over time in two kernels, a block a slab of SLAB rows of one chunk and head. Within them feature(i, lane)
// lies at 32 i + lane.

// partial (B, H, N, slabs, 2, 32 FEATURES): a slab's largest x and its sum of exp(x - largest), from first (B, N) on.
extern "C" __global__ void __launch_bounds__(256)
    time_sums(const Real* __restrict__ x, float* __restrict__ partial, const int* first, int64_t xb, int64_t xt,
              int64_t xh, int chunks, int heads, int features, int chunk, int wide) {
    __shared__ float shared[8][32 * FEATURES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n = blockIdx.y / heads, h = blockIdx.y % heads, b = blockIdx.z;
    const int end = min((int(blockIdx.x) + 1) * SLAB, chunk), start = first ? first[b * chunks + n] : 0;
    const int begin = blockIdx.x * SLAB + warp;
    x += b * xb + int64_t(n) * chunk * xt + h * xh;
    float top[FEATURES], sum[FEATURES] = {};
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) top[i] = NOTHING;
#pragma unroll 4
    for (int t = begin + (max(start - begin, 0) + 7) / 8 * 8; t < end; t += 8) {
        float v[FEATURES];
        read(x + t * xt, v, features, lane, wide);
#pragma unroll
        for (int i = 0; i < FEATURES; ++i) {
            float more = fmaxf(top[i], v[i]);
            sum[i] = sum[i] * exp2f((top[i] - more) * LOG2E) + exp2f((v[i] - more) * LOG2E);
            top[i] = more;
        }
    }
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) shared[warp][32 * i + lane] = top[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
        float most = NOTHING;
#pragma unroll
        for (int w = 0; w < 8; ++w) most = fmaxf(most, shared[w][32 * i + lane]);
        sum[i] *= exp2f((top[i] - most) * LOG2E);
        top[i] = most;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) shared[warp][32 * i + lane] = sum[i];
    __syncthreads();
    partial += (((int64_t(b) * heads + h) * chunks + n) * gridDim.x + blockIdx.x) * 64 * FEATURES;
    for (int i = warp; i < FEATURES; i += 8) {
        float all = 0.f;
#pragma unroll
        for (int w = 0; w < 8; ++w) all += shared[w][32 * i + lane];
        partial[32 * (FEATURES + i) + lane] = all;
    }
    if (warp == 0)
#pragma unroll
        for (int i = 0; i < FEATURES; ++i) partial[32 * i + lane] = top[i];
}

// Both softmaxes of the keys, (B, H, N * chunk, S): weights = exp(x - lam) over time, zero before first, and answers
// over features. lam (B, H, N, S) is written from `partial`, or read where that is null.
extern "C" __global__ void __launch_bounds__(256)
    softmax_keys(const Real* __restrict__ x, const float* __restrict__ partial, float* lam,
                 Real* __restrict__ weights, Real* __restrict__ answers, const int* first, int64_t xb, int64_t xt,
                 int64_t xh, int chunks, int heads, int features, int chunk, int wide) {
    __shared__ float norms[32 * FEATURES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n = blockIdx.y / heads, h = blockIdx.y % heads, b = blockIdx.z;
    const int end = min((int(blockIdx.x) + 1) * SLAB, chunk), start = first ? first[b * chunks + n] : 0;
    const int64_t at = (int64_t(b) * heads + h) * chunks + n;
    lam += at * features;
    for (int i = warp; i < FEATURES; i += 8) {
        if (!inside(i, lane, features)) continue;
        float norm;
        if (partial) {
            const float* of = partial + at * gridDim.x * 64 * FEATURES + 32 * i + lane;
            float most = NOTHING, all = 0.f;
            for (int slab = 0; slab < gridDim.x; ++slab) most = fmaxf(most, of[slab * 64 * FEATURES]);
            for (int slab = 0; slab < gridDim.x; ++slab)
                all += of[slab * 64 * FEATURES + 32 * FEATURES] * exp2f((of[slab * 64 * FEATURES] - most) * LOG2E);
            norm = all > 0.f ? most + logf(all) : NOTHING;
            if (blockIdx.x == 0) lam[feature(i, lane)] = norm;
        } else {
            norm = lam[feature(i, lane)];
        }
        norms[32 * i + lane] = norm;
    }
    __syncthreads();
    x += b * xb + int64_t(n) * chunk * xt + h * xh;
    weights += at * chunk * features, answers += at * chunk * features;
#pragma unroll 2
    for (int t = blockIdx.x * SLAB + warp; t < end; t += 8) {
        float q[FEATURES], w[FEATURES];
        read(x + t * xt, q, features, lane, wide);
#pragma unroll
        for (int i = 0; i < FEATURES; ++i)
            w[i] = t < start ? 0.f : exp2f((q[i] - norms[32 * i + lane]) * LOG2E);
        write(weights + int64_t(t) * features, w, features, lane);
        softmax(q, features, lane);
        write(answers + int64_t(t) * features, q, features, lane);
    }
}

// bf16 tables (N, S, E) of x float32, S <= 256: plain = x, centred = x - its mean over S. A block has 64 columns of a
// table, a warp every eighth row.
extern "C" __global__ void __launch_bounds__(256)
    narrow_tables(const float* __restrict__ x, bf16* __restrict__ plain, bf16* __restrict__ centred, int rows,
                  int width) {
    __shared__ float2 sums[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 64 + 2 * lane;
    const bool use = column < width;  // width is even
    const int64_t start = int64_t(blockIdx.y) * rows * width + column;
    float2 v[32], sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int row = warp + 8 * i;
        v[i] = make_float2(0.f, 0.f);
        if (use && row < rows) v[i] = *reinterpret_cast<const float2*>(x + start + int64_t(row) * width);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) sum.x += v[i].x, sum.y += v[i].y;
    sums[warp][lane] = sum;
    __syncthreads();
    sum = sums[0][lane];
#pragma unroll
    for (int w = 1; w < 8; ++w) sum.x += sums[w][lane].x, sum.y += sums[w][lane].y;
    sum.x /= rows, sum.y /= rows;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int row = warp + 8 * i;
        if (!use || row >= rows) continue;
        const int64_t at = start + int64_t(row) * width;
        *reinterpret_cast<uint32_t*>(plain + at) = pack_bf16(v[i].x, v[i].y);
        *reinterpret_cast<uint32_t*>(centred + at) = pack_bf16(v[i].x - sum.x, v[i].y - sum.y);
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

// From drho * rho and dlast to dlam and dlogz.
extern "C" __global__ void shares_backward(const float* __restrict__ turn, const float* __restrict__ dlast,
                                           const float* __restrict__ rho, const float* __restrict__ keep,
                                           float* __restrict__ dlam, float* __restrict__ dlogz, int rows, int folds,
                                           int features, int heads) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= int64_t(rows) * features) return;
    int row = i / features, s = i % features;
    float g = dlast ? dlast[i] : 0.f;
    for (int f = folds - 1; f >= 0; --f) {
        int64_t j = (int64_t(row) * folds + f) * features + s;
        float r = rho[j], d = turn[j], b = g - d;
        dlam[j] = d + b * r;
        g = b * (1.f - r) * keep[row / heads * folds + f];
    }
    dlogz[i] = g;
}

// out (rows) = sum over columns of a * b, a rounded to bf16 where `narrow` is given, which gets it, dense. A group of
// `inner` rows is dense, and groups lie a_step and b_step apart. A warp a row.
extern "C" __global__ void __launch_bounds__(256)
    row_dot(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out,
            bf16* __restrict__ narrow, int64_t a_step, int64_t b_step, int rows, int inner, int columns, int wide) {
    int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    a += row / inner * a_step + int64_t(row % inner) * columns;
    b += row / inner * b_step + int64_t(row % inner) * columns;
    if (narrow) narrow += int64_t(row) * columns;
    float sum = 0.f;
    if (wide) {
#pragma unroll 4
        for (int i = threadIdx.x % 32 * 4; i < columns; i += 128) {
            float x[4], y[4];
            load(a + i, x), load(b + i, y);
            if (narrow) {
                uint2 v = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
                *reinterpret_cast<uint2*>(narrow + i) = v;
                x[0] = low_bf16(v.x), x[1] = high_bf16(v.x), x[2] = low_bf16(v.y), x[3] = high_bf16(v.y);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) sum += x[k] * y[k];
        }
    } else {
        for (int i = threadIdx.x % 32; i < columns; i += 32) {
            float x = a[i];
            if (narrow) narrow[i] = from_float<bf16>(x), x = to_float(narrow[i]);
            sum += x * b[i];
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[row] = sum;
}
