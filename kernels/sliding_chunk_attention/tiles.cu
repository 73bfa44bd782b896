// Attention on tiles of 128 rows by 256 keys, as pairs of blocks (sm_90a; ring.cuh multiplies): the log-sum-exp of the
// rows, the weights, and the weights together with the gradient of the logits.
//
// For the last S = Q K^T and dP = dY V^T go through the same ring. Between the two the accumulator becomes the weights
// P = exp(S - lse), written out and kept in half precision (scaled, 11 bits), half of it in shared memory: more
// registers dP does not leave; at the end dS = P (dP - delta). Neither S nor dP meets memory.
#include "dropkey.cuh"
#include "ring.cuh"

#define INFINITY __int_as_float(0x7f800000)

constexpr float SCALE = 16384.f;  // of the weights in half precision
constexpr float LOG2E = 1.4426950408889634f;

DEVICE uint32_t pack_half(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE void unpack_half(uint32_t pair, float& low, float& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}

// Two neighbouring 8-column blocks of a row, two columns a lane each, as four columns a lane: 8-byte stores.
DEVICE void put(bf16* row, int block, int lane, int room, uint32_t near, uint32_t far, bool inside) {
    bool odd = lane & 1;
    uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? near : far, 1);
    uint2 v = odd ? make_uint2(got, far) : make_uint2(near, got);
    int column = (block + odd) * 8 + (lane & 2) * 2;
    if (!inside || column >= room) return;
    if (column + 4 <= room) {
        *reinterpret_cast<uint2*>(row + column) = v;
        return;
    }
    uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (column + i < room) row[column + i].bits = uint16_t(words[i / 2] >> (i % 2 * 16));
}

// What a group's kernels share: its rows [first, end) of the timeline, the band's base and a batch row's extent in it,
// the rows that a product with the weights takes at a time, and where its batch rows and heads begin.
struct Group {
    int64_t item;
    int first, end, base, chunk, strip, features, width, length, total, heads, items, first_batch, first_head,
        all_heads;
};

// The tiles of which some row sees some key, pair of rows by pair of rows; a cluster takes every gridDim.x / 2 -th. Equal
// in both blocks and all threads.
struct Walk {
    int pair, c, window, item, b, h, low, high;  // the pair's rows and the tiles [low, high) that are seen
    int left, pairs, x;

    DEVICE Walk(const Group& g, const int* starts) : left(-1), x(blockIdx.x / 2) {
        pairs = (g.end + PAIR - 1) / PAIR - g.first / PAIR;
        enter(g, starts);
    }
    DEVICE void enter(const Group& g, const int* starts) {
        item = ++left / pairs, pair = (g.first / PAIR + left % pairs) * PAIR;
        b = g.first_batch + item / g.heads, h = g.first_head + item % g.heads;
        c = pair / g.chunk, window = max(c - 1, 0) * g.chunk, low = 0, high = (pair - window) / KEYS + 1;
        if (starts && item < g.items)
            low = max(starts[int64_t(b) * g.total + max(pair, g.first)] - window, 0) / KEYS;
    }
    // Whether there is a tile to do: x counts from `low`.
    DEVICE bool settle(const Group& g, const int* starts) {
        while (x >= high - low) {
            x -= high - low;
            enter(g, starts);
            if (item >= g.items) return false;
        }
        return item < g.items;
    }
    DEVICE void advance() { x += gridDim.x / 2; }
    DEVICE int key() const { return window + (low + x) * KEYS; }
};

// -infinity where a row, the first or second of a thread's, does not see a key: k in [low, high] and not dropped, with k
// counted from the lane's first key, which is the `first`-th of the row's window.
DEVICE void mask(float (&sum)[128], int half, int low, int high, uint32_t key = 0, int first = 0,
                 uint32_t threshold = 0) {
#pragma unroll
    for (int j = 0; j < 32; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            bool seen = 8 * j + i >= low && 8 * j + i <= high;
#if DROPOUT
            seen = seen && !dropped(key, first + 8 * j + i, threshold);
#endif
            if (!seen) sum[4 * j + 2 * half + i] = -INFINITY;
        }
}

// Zeros in the columns [0, room) of a tile, by both warpgroups.
DEVICE void blank(bf16* to, int t0, int room, const Group& g) {
    for (int i = threadIdx.x - 128; i < ROWS * (KEYS / 8); i += 256) {
        const int t = t0 + i / (KEYS / 8), column = i % (KEYS / 8) * 8;
        if (t < g.first || t >= g.end) continue;
        bf16* row = to + int64_t(t - g.first) * 2 * g.chunk + column;
        if (column + 8 <= room) {
            *reinterpret_cast<uint4*>(row) = make_uint4(0, 0, 0, 0);
        } else {
            for (int k = 0; k < 8 && column + k < room; ++k) row[k].bits = 0;
        }
    }
}

template <bool GRADIENT>
DEVICE void tiles_of_weights(const TensorMap& queries, const TensorMap& keys, const TensorMap& grads,
                             const TensorMap& values, bf16* weights, bf16* dscores, const float* lse,
                             const float* delta, const int* starts, const int64_t* seed, uint32_t threshold,
                             const Group& g) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    Ring ring;
    ring.open(memory, barriers);
    const int middle = g.features / 64, last = middle + (GRADIENT ? g.width / 64 : 0), offset = g.total - g.length;
    const int rank = int(ring.rank) * ROWS;
    int slice = 0;

    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0)
            for (Walk at(g, starts); at.settle(g, starts); at.advance(), slice += last) {
                const int row = at.b * g.length + at.pair + rank - offset, key = at.b * g.total + at.key();
                for (int i = 0; i < last; ++i) {
                    const bool early = i < middle;
                    const int column = early ? at.h * g.features + i * 64 : at.h * g.width + (i - middle) * 64;
                    ring.fill(slice + i, early ? &queries : &grads, row, column, early ? &keys : &values, key, column);
                }
            }
        __syncwarp();
    } else {
        more_registers<232>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        uint32_t held[32], *kept = reinterpret_cast<uint32_t*>(ring.rest(memory)) + threadIdx.x % 256;
        for (Walk at(g, starts); at.settle(g, starts); at.advance(), slice += last) {
            const int t0 = at.pair + rank, top = t0 + group * 64 + warp * 16 + lane / 4;
            const int key0 = at.key(), close = min((at.c + 1) * g.chunk, g.end), room = close - key0;
            const int64_t origin = at.item * g.item - g.base, corner = origin + key0;
            const int64_t place = int64_t(at.b * g.all_heads + at.h) * g.length - offset;
            // The products also read tiles that no row sees: zeros, which the pair's tiles share between them.
            const int strip = at.c * g.chunk, until = strip + ((at.pair + PAIR - 1 - strip) / g.strip + 1) * g.strip;
            for (int k = at.x; k < (close - at.window + KEYS - 1) / KEYS - (at.high - at.low); k += at.high - at.low) {
                const int from = at.window + (k < at.low ? k : at.high + k - at.low) * KEYS;
                if (from < until) blank(weights + origin + from, t0, close - from, g);
                if (GRADIENT) blank(dscores + origin + from, t0, close - from, g);
            }
            float sum[128];
            ring.multiply(sum, group, slice, slice + middle);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int t = top + 8 * half;
                const bool inside = t >= g.first && t < g.end;
                const float norm = inside ? lse[place + t] * LOG2E : INFINITY;
                // what the row sees, counted from the lane's first key; a row that sees nothing has an infinite norm
                const int lane0 = key0 + lane % 4 * 2;
                const int low = (inside && starts ? starts[int64_t(at.b) * g.total + t] : 0) - lane0;
                const int high = (isinf(norm) ? -1 : t) - lane0;
#if DROPOUT
                const uint32_t key = row_key(uint64_t(*seed), at.b * g.all_heads + at.h, t);
                mask(sum, half, low, high, key, lane0 - at.window, threshold);
#else
                if (__any_sync(0xffffffffu, low > 0 || high < KEYS)) mask(sum, half, low, high);
#endif
                bf16* row = weights + corner + int64_t(t - g.first) * 2 * g.chunk;
#pragma unroll
                for (int j = 0; j < 32; j += 2) {
                    uint32_t words[2];
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        float p[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) p[i] = exp2_ftz(sum[4 * (j + n) + 2 * half + i] * LOG2E - norm);
                        const uint32_t pair = pack_half(p[0] * SCALE, p[1] * SCALE);
                        if (GRADIENT && half == 0) held[j + n] = pair;
                        if (GRADIENT && half == 1) kept[256 * (j + n)] = pair;
                        words[n] = pack_bf16(p[0], p[1]);
                    }
                    put(row, j, lane, room, words[0], words[1], inside);
                    asm volatile("" ::: "memory");  // in this order: registers are short
                }
            }

            if (GRADIENT) {
                ring.multiply(sum, group, slice + middle, slice + last);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int t = top + 8 * half;
                    const bool inside = t >= g.first && t < g.end;
                    const float mean = inside ? delta[place + t] : 0.f;
                    bf16* row = dscores + corner + int64_t(t - g.first) * 2 * g.chunk;
#pragma unroll
                    for (int j = 0; j < 32; j += 2) {
                        uint32_t words[2];
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            const float* d = sum + 4 * (j + n) + 2 * half;
                            float low, high;
                            unpack_half(half ? kept[256 * (j + n)] : held[j + n], low, high);
                            // a masked weight is an exact zero, and what it multiplies need not be finite
                            words[n] = pack_bf16(low == 0.f ? 0.f : low * (1.f / SCALE) * (d[0] - mean),
                                                 high == 0.f ? 0.f : high * (1.f / SCALE) * (d[1] - mean));
                        }
                        put(row, j, lane, room, words[0], words[1], inside);
                    }
                }
            }
        }
    }
    ring.close();
}

// weights (a band of the group) = exp(S - lse), and zeros up to the strip's last row. Blocks: as many as run at once.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    weights(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, bf16* weights,
            const float* lse, const int* starts, const int64_t* seed, uint32_t threshold, int64_t item, int first,
            int end, int base, int chunk, int strip, int features, int width, int length, int total, int heads,
            int items, int first_batch, int first_head, int all_heads) {
    const Group g{item,   first, end,   base,  chunk,       strip,      features, width,
                  length, total, heads, items, first_batch, first_head, all_heads};
    tiles_of_weights<false>(queries, keys, queries, keys, weights, weights, lse, lse, starts, seed, threshold, g);
}

// The same, and dscores = weights * (dP - delta), and zeros up to the chunk's last row.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    weights_and_gradient(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
                         const __grid_constant__ TensorMap grads, const __grid_constant__ TensorMap values,
                         bf16* weights, bf16* dscores, const float* lse, const float* delta, const int* starts,
                         const int64_t* seed, uint32_t threshold, int64_t item, int first, int end, int base,
                         int chunk, int strip, int features, int width, int length, int total, int heads,
                         int items, int first_batch, int first_head, int all_heads) {
    const Group g{item,   first, end,   base,  chunk,       strip,      features, width,
                  length, total, heads, items, first_batch, first_head, all_heads};
    tiles_of_weights<true>(queries, keys, grads, values, weights, dscores, lse, delta, starts, seed, threshold, g);
}

// lse (B, H, L) = log of the sum of exp(S) over the keys that a row sees; infinite where it sees nothing, or where its
// largest logit is infinite. Blocks: the rows in pairs, by (batch row, head).
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    row_norms(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
              float* __restrict__ lse, const int* starts, const int64_t* seed, uint32_t threshold, int chunk,
              int features, int length, int total, int heads) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const int offset = total - length, pair = (offset / PAIR + blockIdx.x / 2) * PAIR;
    const int t0 = pair + blockIdx.x % 2 * ROWS, b = blockIdx.y / heads, h = blockIdx.y % heads;
    const int window = max(pair / chunk - 1, 0) * chunk, end = min(pair + PAIR, total);
    const int low0 = starts ? starts[int64_t(b) * total + max(pair, offset)] : 0;  // the least of the pair's rows
    const int first = window + max(low0 - window, 0) / KEYS * KEYS, tiles = (end - first + KEYS - 1) / KEYS;
    const int slices = features / 64;
    Ring ring;
    ring.open(memory, barriers);
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0)
            for (int i = 0; i < tiles * slices; ++i) {
                const int column = h * features + i % slices * 64;
                ring.fill(i, &queries, b * length + t0 - offset, column, &keys,
                          b * total + first + i / slices * KEYS, column);
            }
        __syncwarp();
    } else {
        more_registers<232>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int top = t0 + group * 64 + warp * 16 + lane / 4;
        float most[2] = {-INFINITY, -INFINITY}, all[2] = {0.f, 0.f};
        int low[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = top + 8 * half;
            low[half] = starts && t >= offset && t < total ? starts[int64_t(b) * total + t] : 0;
        }
        for (int tile = 0; tile < tiles; ++tile) {
            float sum[128];
            ring.multiply(sum, group, tile * slices, (tile + 1) * slices);
            const int lane0 = first + tile * KEYS + lane % 4 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int t = top + 8 * half, before = low[half] - lane0, last = t - lane0;
#if DROPOUT
                mask(sum, half, before, last, row_key(uint64_t(*seed), b * heads + h, t), lane0 - window, threshold);
#else
                if (__any_sync(0xffffffffu, before > 0 || last < KEYS)) mask(sum, half, before, last);
#endif
                float more = most[half];
#pragma unroll
                for (int j = 0; j < 32; ++j)
                    more = fmaxf(more, fmaxf(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]));
                if (more == -INFINITY) continue;
                float part = 0.f;
                const float shift = more * LOG2E;
#pragma unroll
                for (int j = 0; j < 32; ++j) {
                    part += exp2_ftz(sum[4 * j + 2 * half] * LOG2E - shift);
                    part += exp2_ftz(sum[4 * j + 2 * half + 1] * LOG2E - shift);
                }
                all[half] = all[half] * exp2_ftz(most[half] * LOG2E - shift) + part;
                most[half] = more;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = top + 8 * half;
            const float more = warp_max<4>(most[half]);
            const float part = most[half] == -INFINITY ? 0.f : all[half] * exp2_ftz((most[half] - more) * LOG2E);
            const float sum = warp_sum<4>(part);
            if (t >= offset && t < total && lane % 4 == 0)
                lse[int64_t(b * heads + h) * length + t - offset] =
                    isinf(more) ? INFINITY : more + logf(sum);
        }
    }
    ring.close();
}

// out (B, H, L) = sum over the E features of a * b, both (B, L, H, E) dense, E a multiple of 8. A warp a row.
extern "C" __global__ void __launch_bounds__(384)
    row_products(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ out, int rows, int length,
                 int heads, int width) {
    int row = blockIdx.x * 12 + threadIdx.x / 32;
    if (row >= rows) return;
    a += int64_t(row) * width, b += int64_t(row) * width;
    float sum = 0.f;
    for (int i = threadIdx.x % 32 * 8; i < width; i += 256) {
        float x[8], y[8];
        load(a + i, x), load(b + i, y);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += x[k] * y[k];
    }
    sum = warp_sum(sum);
    int h = row % heads, at = row / heads;
    if (threadIdx.x % 32 == 0) out[(int64_t(at / length) * heads + h) * length + at % length] = sum;
}
