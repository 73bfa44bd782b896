// Matrix products of a step: y = W x for the few tokens of a batch, limited by the reading of W. A block has 32 rows of
// W and up to TOKENS tokens; its warps share the columns. What comes before (norms) and after (biases, activations,
// residuals) happens here too. Defines: TOKENS (8, 16, 32), ALIGNED (rows in multiples of 16 bytes).
#include "step.cuh"

constexpr int ROWS = 32, TILES = TOKENS / 8, PITCH = ROWS + 1;
constexpr bool TENSOR = sizeof(T) == 2 && ALIGNED;
constexpr int UNROLL = TILES > 2 ? 2 : 4;

DEVICE uint4 stream_16(const T* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// How tokens are normalised on their way in: (x - mean) inverse scale + shift, statistics a token.
struct Plain {
    static constexpr bool ACTIVE = false;
};
struct Normed {
    static constexpr bool ACTIVE = true;
    const float *scale, *shift;
    const float *mean, *inverse;  // shared memory
};

template <class Norm> DEVICE uint4 normalised(uint4 x, const Norm& norm, int token, int k) {
    if constexpr (!Norm::ACTIVE) return x;
    else {
        const float m = norm.mean[token], r = norm.inverse[token];
        float v[8] = {low_bf16(x.x), high_bf16(x.x), low_bf16(x.y), high_bf16(x.y),
                      low_bf16(x.z), high_bf16(x.z), low_bf16(x.w), high_bf16(x.w)};
        float scale[8], shift[8];
        load(norm.scale + k, scale);
        load(norm.shift + k, shift);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - m) * r, scale[i], shift[i]);
        return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}

// sums[token][row] = W x for two tiles of 16 rows, the later ones beginning at w0 and w1 and `rows` of them inside.
// x (tokens, columns). `ready` is called once, before x is read.
template <class Ready>
DEVICE void product(const T* w0, const T* w1, int rows0, int rows1, const T* x, int tokens, int columns, float* parts,
                    float* sums, Ready ready) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (TENSOR) {
        const int g = lane / 4, t = lane % 4;
        const int share = (columns / 32 + (columns % 32 != 0) + WARPS - 1) / WARPS * 32;
        const int end = min(columns, (warp + 1) * share);
        const T* from[4] = {w0 + int64_t(min(g, rows0 - 1)) * columns, w0 + int64_t(min(g + 8, rows0 - 1)) * columns,
                            w1 + int64_t(min(g, rows1 - 1)) * columns, w1 + int64_t(min(g + 8, rows1 - 1)) * columns};
        float c[2][TILES][4] = {};
        uint4 w[UNROLL][4];
        int k = warp * share + 8 * t;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        auto fill = [&] {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
#pragma unroll
                for (int i = 0; i < 4; ++i) w[u][i] = k + 32 * u < end ? stream_16(from[i] + k + 32 * u) : zero;
        };
        fill();
        auto norm = ready();
        while (k - 8 * t < end) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int at = k + 32 * u;
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const int token = g + 8 * j;
                    uint4 v = zero;
                    if (token < tokens && at < end)
                        v = normalised(*reinterpret_cast<const uint4*>(x + int64_t(token) * columns + at), norm, token, at);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint4 low = w[u][2 * i], high = w[u][2 * i + 1];
                        const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
                        mma_bf16(c[i][j], first, v.x, v.y);  // columns in another order, the same for both operands
                        mma_bf16(c[i][j], second, v.z, v.w);
                    }
                }
            }
            k += 32 * UNROLL;
            fill();
        }
        float* const mine = parts + warp * TOKENS * PITCH;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    mine[(8 * j + 2 * t + r % 2) * PITCH + 16 * i + g + r / 2 * 8] = c[i][j][r];
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * ROWS; i += THREADS) {
            const int at = i / ROWS * PITCH + i % ROWS;
            float sum = 0.f;
#pragma unroll
            for (int part = 0; part < WARPS; ++part) sum += parts[part * TOKENS * PITCH + at];
            sums[at] = sum;
        }
        __syncthreads();
    } else {  // float32, and widths that tensor cores would not take: four rows a warp, eight tokens at a time
        auto norm = ready();
        constexpr int W = ALIGNED ? 4 : 1;
        for (int token0 = 0; token0 < tokens; token0 += 8) {
            float c[4][8] = {};
            for (int k = lane * W; k < columns; k += 32 * W) {
                float w[4][W];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = 4 * warp + i, in = r % 16;
                    load(r < 16 ? w0 + int64_t(min(in, rows0 - 1)) * columns + k : w1 + int64_t(min(in, rows1 - 1)) * columns + k, w[i]);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int token = token0 + j;
                    if (token >= tokens) break;
                    float v[W];
                    load(x + int64_t(token) * columns + k, v);
#pragma unroll
                    for (int n = 0; n < W; ++n) {
                        if constexpr (decltype(norm)::ACTIVE)
                            v[n] = rounded(fmaf((v[n] - norm.mean[token]) * norm.inverse[token], norm.scale[k + n], norm.shift[k + n]));
#pragma unroll
                        for (int i = 0; i < 4; ++i) c[i][j] = fmaf(w[i][n], v[n], c[i][j]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float sum = warp_sum(c[i][j]);
                    if (lane == 0 && token0 + j < tokens) sums[(token0 + j) * PITCH + 4 * warp + i] = sum;
                }
        }
        __syncthreads();
    }
}

struct Shared {
    float parts[TENSOR ? WARPS * TOKENS * PITCH : 1], sums[TOKENS * PITCH], mean[TOKENS], inverse[TOKENS];
};

// Token statistics from sums of squares (tokens, count): an RMS norm over `columns`.
DEVICE Normed rms(Shared& s, const float* squares, int count, int tokens, int columns, const float* scale,
                  const float* shift, float eps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int token = warp; token < tokens; token += WARPS) {
        float sum = 0.f;
        for (int i = lane; i < count; i += 32) sum += squares[token * count + i];
        sum = warp_sum(sum);
        if (lane == 0) s.mean[token] = 0.f, s.inverse[token] = rsqrtf(sum / columns + eps);
    }
    __syncthreads();
    return {scale, shift, s.mean, s.inverse};
}

// The same from (mean, sum of squares about it) of every ROWS features, moments (tokens, count, 2): a layer norm, or an
// RMS norm where not `centred`.
DEVICE Normed layer(Shared& s, const float2* moments, int tokens, int columns, bool centred, const float* scale,
                    const float* shift, float eps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = (columns + ROWS - 1) / ROWS;
    for (int token = warp; token < tokens; token += WARPS) {
        const float2* const from = moments + token * count;
        float sum = 0.f;
        for (int i = lane; i < count; i += 32) sum += from[i].x * min(ROWS, columns - i * ROWS);
        const float mean = centred ? warp_sum(sum) / columns : 0.f;
        sum = 0.f;
        for (int i = lane; i < count; i += 32) {
            const float away = from[i].x - mean;
            sum += from[i].y + away * away * min(ROWS, columns - i * ROWS);
        }
        sum = warp_sum(sum);
        if (lane == 0) s.mean[token] = mean, s.inverse[token] = rsqrtf(sum / columns + eps);
    }
    __syncthreads();
    return {scale, shift, s.mean, s.inverse};
}

struct Place {
    int block, token, tokens;  // of this block: rows in ROWS from `block` on, and its tokens
    DEVICE Place(int batch) : block(blockIdx.x), token(blockIdx.y * TOKENS), tokens(min(batch - int(blockIdx.y) * TOKENS, TOKENS)) {}
};

// v = silu(Wv a + bv), into its slot of the ring (B, slots, V); z, r, h = W rms(e) + b. Grid: the rows of v, z, r, h.
__global__ void __launch_bounds__(THREADS)
    project_in(const T* a, const T* e, const float* squares, const float* scale, const float* shift, const T* wv,
               const T* wz, const T* wr, const T* wh, const float* bv, const float* bz, const float* br,
               const float* bh, T* ring, T* z, T* r, T* h, const int64_t* clock, float eps, int batch, int dim,
               int values, int keys, int groups, int slots) {
    __shared__ Shared s;
    chain_next();
    Place at(batch);
    const int vs = (values + ROWS - 1) / ROWS, zs = (keys + ROWS - 1) / ROWS;
    const int which = at.block < vs ? 0 : at.block < vs + zs ? 1 : at.block < 2 * vs + zs ? 2 : 3;
    const int row = (at.block - (which == 0 ? 0 : which == 1 ? vs : which == 2 ? vs + zs : 2 * vs + zs)) * ROWS;
    const T* const w = which == 0 ? wv : which == 1 ? wz : which == 2 ? wr : wh;
    const float* const bias = which == 0 ? bv : which == 1 ? bz : which == 2 ? br : bh;
    const int height = which == 1 ? keys : which == 3 ? dim : values;
    const T* const low = w + int64_t(row) * dim;
    const int inside = height - row;
    const T* const high = inside > 16 ? low + int64_t(16) * dim : low;
    const int64_t first = int64_t(at.token) * dim;
    if (which == 0)
        product(low, high, min(inside, 16), inside > 16 ? min(inside - 16, 16) : 1, a + first, at.tokens, dim, s.parts,
                s.sums, [&] { chain_wait(); return Plain(); });
    else
        product(low, high, min(inside, 16), inside > 16 ? min(inside - 16, 16) : 1, e + first, at.tokens, dim, s.parts,
                s.sums, [&] {
                    chain_wait();
                    return rms(s, squares + at.token * groups, groups, at.tokens, dim, scale, shift, eps);
                });
    T* const y = which == 1 ? z : which == 2 ? r : h;
    for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
        const int token = i / ROWS, n = i % ROWS;
        if (n >= inside) continue;
        const float sum = s.sums[token * PITCH + n] + bias[row + n];
        const int64_t line = at.token + token;
        if (which == 0) ring[(line * slots + *clock % slots) * values + row + n] = from_float<T>(silu(rounded(sum)));
        else y[line * height + row + n] = from_float<T>(sum);
    }
}

// y = x + (h + Wu), and its moments (B, D / ROWS). Grid: the rows of W (D, V).
__global__ void __launch_bounds__(THREADS)
    project_out(const T* u, const T* w, const T* h, const T* x, T* y, float2* moments, int batch, int dim, int values) {
    __shared__ Shared s;
    chain_next();
    Place at(batch);
    const int row = at.block * ROWS, inside = dim - row;
    const T* const low = w + int64_t(row) * values;
    product(low, inside > 16 ? low + int64_t(16) * values : low, min(inside, 16), inside > 16 ? min(inside - 16, 16) : 1,
            u + int64_t(at.token) * values, at.tokens, values, s.parts, s.sums, [&] { chain_wait(); return Plain(); });
    const int n = threadIdx.x % 32;
    for (int token = threadIdx.x / 32; token < at.tokens; token += WARPS) {
        const int64_t to = int64_t(at.token + token) * dim + row + n;
        float sum = 0.f;
        if (n < inside) {
            sum = rounded(rounded(s.sums[token * PITCH + n]) + to_float(h[to]));
            sum = rounded(sum + to_float(x[to]));
            y[to] = from_float<T>(sum);
        }
        const int count = min(inside, ROWS);
        const float mean = warp_sum(sum) / count, away = n < inside ? sum - mean : 0.f;
        const float2 found = make_float2(mean, warp_sum(away * away));
        if (n == 0) moments[int64_t(at.token + token) * gridDim.x + at.block] = found;
    }
}

// f = silu(W1 n + b1) [* W3 n], n the norm of y. Grid: 16 rows of each matrix (GATED), or 32 of W1.
template <bool GATED>
__global__ void __launch_bounds__(THREADS)
    widen(const T* y, const float2* moments, const float* scale, const float* shift, const T* w1, const T* w3,
          const float* bias, T* f, float eps, int centred, int batch, int dim, int width) {
    constexpr int STEP = GATED ? ROWS / 2 : ROWS;
    __shared__ Shared s;
    chain_next();
    Place at(batch);
    const int row = at.block * STEP, inside = width - row, count = (dim + ROWS - 1) / ROWS;
    const T* const low = w1 + int64_t(row) * dim;
    const T* const high = GATED ? w3 + int64_t(row) * dim : inside > 16 ? low + int64_t(16) * dim : low;
    const int rows1 = GATED ? min(inside, 16) : inside > 16 ? min(inside - 16, 16) : 1;
    product(low, high, min(inside, 16), rows1, y + int64_t(at.token) * dim, at.tokens, dim, s.parts, s.sums, [&] {
        chain_wait();
        return layer(s, moments + int64_t(at.token) * count, at.tokens, dim, centred, scale, shift, eps);
    });
    for (int i = threadIdx.x; i < at.tokens * STEP; i += THREADS) {
        const int token = i / STEP, n = i % STEP;
        if (n >= inside) continue;
        float out = silu(rounded(s.sums[token * PITCH + n] + (bias ? bias[row + n] : 0.f)));
        if constexpr (GATED) out *= rounded(s.sums[token * PITCH + 16 + n]);
        f[int64_t(at.token + token) * width + row + n] = from_float<T>(out);
    }
}

// x = base + alpha (W f + b). Grid: the rows of W (D, F).
__global__ void __launch_bounds__(THREADS)
    narrow(const T* f, const T* w, const float* bias, const float* alpha, const T* base, T* x, int batch, int dim,
           int width) {
    __shared__ Shared s;
    chain_next();
    Place at(batch);
    const int row = at.block * ROWS, inside = dim - row;
    const T* const low = w + int64_t(row) * width;
    product(low, inside > 16 ? low + int64_t(16) * width : low, min(inside, 16), inside > 16 ? min(inside - 16, 16) : 1,
            f + int64_t(at.token) * width, at.tokens, width, s.parts, s.sums, [&] { chain_wait(); return Plain(); });
    for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
        const int token = i / ROWS, n = i % ROWS;
        if (n >= inside) continue;
        float out = rounded(s.sums[token * PITCH + n] + (bias ? bias[row + n] : 0.f));
        if (alpha) out = rounded(alpha[row + n] * out);
        const int64_t to = int64_t(at.token + token) * dim + row + n;
        x[to] = from_float<T>(to_float(base[to]) + out);
    }
}

// logits = W x, float32; the step is over, so the clock moves on. Grid: the rows of W (vocabulary, D).
__global__ void __launch_bounds__(THREADS)
    head(const T* x, const T* w, float* logits, int64_t* clock, int batch, int dim, int vocabulary) {
    __shared__ Shared s;
    chain_next();
    Place at(batch);
    const int row = at.block * ROWS, inside = vocabulary - row;
    const T* const low = w + int64_t(row) * dim;
    product(low, inside > 16 ? low + int64_t(16) * dim : low, min(inside, 16), inside > 16 ? min(inside - 16, 16) : 1,
            x + int64_t(at.token) * dim, at.tokens, dim, s.parts, s.sums, [&] { chain_wait(); return Plain(); });
    for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
        const int token = i / ROWS, n = i % ROWS;
        if (n < inside) logits[int64_t(at.token + token) * vocabulary + row + n] = s.sums[token * PITCH + n];
    }
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *clock += 1;
}
