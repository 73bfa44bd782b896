// Matrix products of a step: y = W x for the few tokens of a batch, limited by the reading of W. A block goes through
// tiles of 16 rows of W; its warps share the columns. W comes through a ring in shared memory that stays full from tile
// to tile, and fills before the step's chain has made x. What comes before (norms) and after (biases, activations,
// residuals) happens here too. Defines: TOKENS (8, 16, 32) a block, ALIGNED (rows in multiples of 16 bytes), STAGED (all
// of x fits into shared memory; else two tiles at a time share what is read of it), STAGES of the ring.
#include "step.cuh"

constexpr int ROWS = 16, TILES = TOKENS / 8, DEPTH = 64;
constexpr bool TENSOR = sizeof(T) == 2 && ALIGNED;
constexpr int HIGH = TENSOR && !STAGED ? 2 : 1, PITCH = HIGH * ROWS + 1, PIECES = 4 * HIGH;

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

// The rows of a tile: 8 from `low` and 8 from `high` on, so many of them inside the matrix.
struct Tile {
    const T *low, *high;
    int lows, highs;
    DEVICE Tile(const T* w, int row, int rows, int columns)
        : low(w + int64_t(row) * columns), high(low + int64_t(8) * columns), lows(min(rows - row, 8)),
          highs(min(rows - row - 8, 8)) {}
    DEVICE Tile(const T* one, const T* three, int row, int rows, int columns)
        : low(one + int64_t(row) * columns), high(three + int64_t(row) * columns), lows(min(rows - row, 8)), highs(lows) {}
};

struct Shared {
    float parts[(TENSOR ? WARPS : 1) * TOKENS * PITCH], mean[TOKENS], inverse[TOKENS];
    // The product of a row of the tile that is finished, the `high`th of those at hand.
    DEVICE float sum(int token, int row, int high = 0) const {
        float total = 0.f;
#pragma unroll
        for (int part = 0; part < (TENSOR ? WARPS : 1); ++part)
            total += parts[(part * TOKENS + token) * PITCH + high * ROWS + row];
        return total;
    }
};

// Products of tiles first, first + 1, ..., before end and every `step` blocks of HIGH tiles again, with x (tokens,
// columns). `source` gives the rows of a tile; `ready` is called once, before x is read, and returns its norm;
// `finish(tile, high)` finds the products in s.sum(., ., high).
template <class Source, class Ready, class Finish>
DEVICE void products(Shared& s, int block, int blocks, int end, const T* x, int tokens, int columns, Source source,
                     Ready ready, Finish finish) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = block * HIGH, step = blocks * HIGH;
    if constexpr (TENSOR) {
        extern __shared__ uint4 dynamic[];
        uint4* const ring = dynamic + threadIdx.x;  // (stage, piece, thread): every thread reads what it copied
        T* const staged = reinterpret_cast<T*>(dynamic + STAGES * PIECES * THREADS);
        const int g = lane / 4, t = lane % 4, pitch = columns + 32;  // rows half a line of banks apart
        const int steps = (columns + WARPS * DEPTH - 1) / (WARPS * DEPTH);
        const int total = first < end ? (end - first + step - 1) / step * steps : 0;
        int next = first, at = 0, stage = 0;  // of the copies
        auto copy = [&] {
            if (next < end) {
                const int k = (at * WARPS + warp) * DEPTH + 8 * t;
#pragma unroll
                for (int m = 0; m < HIGH; ++m) {
                    const Tile rows = source(min(next + m, end - 1));
                    const uint32_t to = shared_address(ring + (stage * PIECES + 4 * m) * THREADS);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int in = k + i % 2 * 32;
                        const bool inside = g < (i < 2 ? rows.lows : rows.highs) && in < columns && next + m < end;
                        const T* const from = (i < 2 ? rows.low : rows.high) + int64_t(g) * columns + in;
                        copy_async_16(to + i * THREADS * 16, inside ? from : rows.low, inside);
                    }
                }
                if (++at == steps) at = 0, next += step;
            }
            copy_async_commit();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        };
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) copy();
        auto norm = ready();
        if constexpr (STAGED) {
            for (int i = threadIdx.x; i < tokens * (columns / 8); i += THREADS) {
                const int token = i / (columns / 8), k = i % (columns / 8) * 8;
                *reinterpret_cast<uint4*>(staged + token * pitch + k) =
                    normalised(*reinterpret_cast<const uint4*>(x + int64_t(token) * columns + k), norm, token, k);
            }
            __syncthreads();
        }
        const uint4 zero = make_uint4(0, 0, 0, 0);
        uint4 v[2][TILES];  // x of a step, a step ahead where it comes from far
        auto fetch_x = [&](int place) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const int token = g + 8 * j, k = (place * WARPS + warp) * DEPTH + half * 32 + 8 * t;
                    const T* const from = STAGED ? staged + token * pitch + k : x + int64_t(token) * columns + k;
                    v[half][j] = token < tokens && k < columns ? *reinterpret_cast<const uint4*>(from) : zero;
                }
        };
        float c[HIGH][TILES][4] = {};
        int now = first, place = 0, slot = 0;
        if constexpr (!STAGED) fetch_x(0);
        for (int i = 0; i < total; ++i) {
            copy_async_wait<STAGES - 2>();
            uint4 w[PIECES];
#pragma unroll
            for (int n = 0; n < PIECES; ++n) w[n] = ring[(slot * PIECES + n) * THREADS];
            copy();
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            if constexpr (STAGED) fetch_x(place);
            else {
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        const int token = g + 8 * j, k = (place * WARPS + warp) * DEPTH + half * 32 + 8 * t;
                        if (token < tokens && k < columns) v[half][j] = normalised(v[half][j], norm, token, k);
                    }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int m = 0; m < HIGH; ++m) {
                    const uint4 low = w[4 * m + half], high = w[4 * m + 2 + half];
                    const uint32_t one[4] = {low.x, high.x, low.y, high.y}, two[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {  // columns in another order, the same for both operands
                        mma_bf16(c[m][j], one, v[half][j].x, v[half][j].y);
                        mma_bf16(c[m][j], two, v[half][j].z, v[half][j].w);
                    }
                }
            const bool done = ++place == steps;
            if (done) place = 0;
            if constexpr (!STAGED) fetch_x(place);
            if (done) {
#pragma unroll
                for (int m = 0; m < HIGH; ++m)
#pragma unroll
                    for (int j = 0; j < TILES; ++j)
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            const int row = m * ROWS + g + r / 2 * 8, token = 8 * j + 2 * t + r % 2;
                            s.parts[(warp * TOKENS + token) * PITCH + row] = c[m][j][r];
                            c[m][j][r] = 0.f;
                        }
                __syncthreads();
#pragma unroll
                for (int m = 0; m < HIGH; ++m)
                    if (now + m < end) finish(now + m, m);
                __syncthreads();
                now += step;
            }
        }
    } else {  // float32, and widths that tensor cores would not take: two rows a warp, eight tokens at a time
        auto norm = ready();
        constexpr int W = ALIGNED ? 4 : 1;
        for (int tile = first; tile < end; tile += step) {
            const Tile rows = source(tile);
            for (int token0 = 0; token0 < tokens; token0 += 8) {
                float c[2][8] = {};
                for (int k = lane * W; k < columns; k += 32 * W) {
                    float w[2][W];
                    load(rows.low + int64_t(min(warp, rows.lows - 1)) * columns + k, w[0]);
                    if (warp < rows.highs) load(rows.high + int64_t(warp) * columns + k, w[1]);
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
                            for (int i = 0; i < 2; ++i) c[i][j] = fmaf(w[i][n], v[n], c[i][j]);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float sum = warp_sum(c[i][j]);
                        if (lane == 0 && token0 + j < tokens) s.parts[(token0 + j) * PITCH + warp + 8 * i] = sum;
                    }
            }
            __syncthreads();
            finish(tile, 0);
            __syncthreads();
        }
    }
}

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

DEVICE int tiles(int rows) { return (rows + ROWS - 1) / ROWS; }

struct Group {
    int token, tokens;  // this block's, of the batch
    DEVICE Group(int batch) : token(blockIdx.y * TOKENS), tokens(min(batch - int(blockIdx.y) * TOKENS, TOKENS)) {}
};

struct Ready {
    DEVICE Plain operator()() const {
        wait_for_previous();
        return {};
    }
};

// v = silu(Wv a + bv), into its slot of the ring (B, slots, V); z, r, h = W rms(e) + b. The first `of_v` blocks share
// the rows of v, the others those of z, r, h.
__global__ void __launch_bounds__(THREADS)
    project_in(const T* a, const T* e, const float* squares, const float* scale, const float* shift, const T* wv,
               const T* wz, const T* wr, const T* wh, const float* bv, const float* bz, const float* br,
               const float* bh, T* ring, T* z, T* r, T* h, const int64_t* clock, float eps, int batch, int dim,
               int values, int keys, int groups, int slots, int of_v) {
    __shared__ Shared s;
    let_next_begin();
    Group at(batch);
    const int64_t begin = int64_t(at.token) * dim;
    if (blockIdx.x < of_v) {
        products(s, blockIdx.x, of_v, tiles(values), a + begin, at.tokens, dim,
                 [&](int tile) { return Tile(wv, tile * ROWS, values, dim); }, Ready(), [&](int tile, int high) {
                     for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
                         const int token = i / ROWS, n = i % ROWS, row = tile * ROWS + n;
                         if (row >= values) continue;
                         const float v = silu(rounded(s.sum(token, n, high) + bv[row]));
                         ring[(int64_t(at.token + token) * slots + *clock % slots) * values + row] = from_float<T>(v);
                     }
                 });
        return;
    }
    const int zs = tiles(keys), rs = zs + tiles(values), hs = rs + tiles(dim);
    products(s, blockIdx.x - of_v, gridDim.x - of_v, hs, e + begin, at.tokens, dim,
             [&](int tile) {
                 return tile < zs ? Tile(wz, tile * ROWS, keys, dim)
                        : tile < rs ? Tile(wr, (tile - zs) * ROWS, values, dim) : Tile(wh, (tile - rs) * ROWS, dim, dim);
             },
             [&] {
                 wait_for_previous();
                 return rms(s, squares + at.token * groups, groups, at.tokens, dim, scale, shift, eps);
             },
             [&](int tile, int high) {
                 const int height = tile < zs ? keys : tile < rs ? values : dim;
                 const int row0 = (tile - (tile < zs ? 0 : tile < rs ? zs : rs)) * ROWS;
                 const float* const bias = tile < zs ? bz : tile < rs ? br : bh;
                 T* const y = tile < zs ? z : tile < rs ? r : h;
                 for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
                     const int token = i / ROWS, n = i % ROWS, row = row0 + n;
                     if (row < height) y[int64_t(at.token + token) * height + row] = from_float<T>(s.sum(token, n, high) + bias[row]);
                 }
             });
}

// y = x + (h + Wu), and its moments (B, D / ROWS). W (D, V).
__global__ void __launch_bounds__(THREADS)
    project_out(const T* u, const T* w, const T* h, const T* x, T* y, float2* moments, int batch, int dim, int values) {
    __shared__ Shared s;
    let_next_begin();
    Group at(batch);
    products(s, blockIdx.x, gridDim.x, tiles(dim), u + int64_t(at.token) * values, at.tokens, values,
             [&](int tile) { return Tile(w, tile * ROWS, dim, values); }, Ready(), [&](int tile, int high) {
                 const uint32_t half = 0xffffu << (threadIdx.x & 16);  // the lanes of a token
                 const int count = min(dim - tile * ROWS, ROWS);
                 auto sum_of = [&](float v) {
#pragma unroll
                     for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(half, v, offset);
                     return v;
                 };
                 for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
                     const int token = i / ROWS, n = i % ROWS;
                     const int64_t to = int64_t(at.token + token) * dim + tile * ROWS + n;
                     float sum = 0.f;
                     if (n < count) {
                         sum = rounded(rounded(s.sum(token, n, high)) + to_float(h[to]));
                         sum = rounded(sum + to_float(x[to]));
                         y[to] = from_float<T>(sum);
                     }
                     const float mean = sum_of(sum) / count, away = n < count ? sum - mean : 0.f;
                     const float2 found = make_float2(mean, sum_of(away * away));
                     if (n == 0) moments[int64_t(at.token + token) * tiles(dim) + tile] = found;
                 }
             });
}

// f = silu(W1 n + b1) [* W3 n], n the norm of y. A tile has 8 rows of each matrix (GATED), or 16 of W1.
template <bool GATED>
__global__ void __launch_bounds__(THREADS)
    widen(const T* y, const float2* moments, const float* scale, const float* shift, const T* w1, const T* w3,
          const float* bias, T* f, float eps, int centred, int batch, int dim, int width) {
    constexpr int STEP = GATED ? ROWS / 2 : ROWS;
    __shared__ Shared s;
    let_next_begin();
    Group at(batch);
    products(s, blockIdx.x, gridDim.x, (width + STEP - 1) / STEP, y + int64_t(at.token) * dim, at.tokens, dim,
             [&](int tile) {
                 if constexpr (GATED) return Tile(w1, w3, tile * STEP, width, dim);
                 else return Tile(w1, tile * STEP, width, dim);
             },
             [&] {
                 wait_for_previous();
                 return layer(s, moments + int64_t(at.token) * tiles(dim), at.tokens, dim, centred, scale, shift, eps);
             },
             [&](int tile, int high) {
                 for (int i = threadIdx.x; i < at.tokens * STEP; i += THREADS) {
                     const int token = i / STEP, n = i % STEP, row = tile * STEP + n;
                     if (row >= width) continue;
                     float out = silu(rounded(s.sum(token, n, high) + (bias ? bias[row] : 0.f)));
                     if constexpr (GATED) out *= rounded(s.sum(token, STEP + n, high));
                     f[int64_t(at.token + token) * width + row] = from_float<T>(out);
                 }
             });
}

// x = base + alpha (W f + b). W (D, F).
__global__ void __launch_bounds__(THREADS)
    narrow(const T* f, const T* w, const float* bias, const float* alpha, const T* base, T* x, int batch, int dim,
           int width) {
    __shared__ Shared s;
    let_next_begin();
    Group at(batch);
    products(s, blockIdx.x, gridDim.x, tiles(dim), f + int64_t(at.token) * width, at.tokens, width,
             [&](int tile) { return Tile(w, tile * ROWS, dim, width); }, Ready(), [&](int tile, int high) {
                 for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
                     const int token = i / ROWS, n = i % ROWS, row = tile * ROWS + n;
                     if (row >= dim) continue;
                     float out = rounded(s.sum(token, n, high) + (bias ? bias[row] : 0.f));
                     if (alpha) out = rounded(alpha[row] * out);
                     const int64_t to = int64_t(at.token + token) * dim + row;
                     x[to] = from_float<T>(to_float(base[to]) + out);
                 }
             });
}

// logits = W x, float32; the step is over, so the clock moves on. W (vocabulary, D).
__global__ void __launch_bounds__(THREADS)
    head(const T* x, const T* w, float* logits, int64_t* clock, int batch, int dim, int vocabulary) {
    __shared__ Shared s;
    let_next_begin();
    Group at(batch);
    products(s, blockIdx.x, gridDim.x, tiles(vocabulary), x + int64_t(at.token) * dim, at.tokens, dim,
             [&](int tile) { return Tile(w, tile * ROWS, vocabulary, dim); }, Ready(), [&](int tile, int high) {
                 for (int i = threadIdx.x; i < at.tokens * ROWS; i += THREADS) {
                     const int token = i / ROWS, n = i % ROWS, row = tile * ROWS + n;
                     if (row < vocabulary) logits[int64_t(at.token + token) * vocabulary + row] = s.sum(token, n, high);
                 }
             });
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *clock += 1;
}
