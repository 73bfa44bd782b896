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

// What a group's kernels share: its rows [first, end) of the timeline, the band's base and the batch row's extent in it,
// the rows that a product over it takes at a time, and where its batch rows and heads begin.
struct Group {
    int64_t item;
    int first, end, base, chunk, strip, features, width, length, total, heads, first_batch, first_head, all_heads;
};

// A pair of blocks' rows and a block's keys: whether the products over strips read the tile at all, and whether a row
// of the pair sees a key of it. Equal in both blocks.
struct Tile {
    int pair, t0, c, window, key0, b, h;
    bool read, seen;
    DEVICE Tile(const Group& g, const int* starts) {
        pair = (g.first / PAIR + blockIdx.y / 2) * PAIR, t0 = pair + blockIdx.y % 2 * ROWS;
        c = pair / g.chunk, window = max(c - 1, 0) * g.chunk, key0 = window + blockIdx.x * KEYS;
        b = g.first_batch + blockIdx.z / g.heads, h = g.first_head + blockIdx.z % g.heads;
        const int top = c * g.chunk;
        read = key0 < min(top + ((pair + PAIR - 1 - top) / g.strip + 1) * g.strip, g.end);
        seen = key0 < pair + PAIR && !(starts && key0 + KEYS <= starts[int64_t(b) * g.total + max(pair, g.first)]);
    }
};

// Zeros where no row sees a key.
DEVICE void blank(bf16* to, const Tile& tile, const Group& g, int room) {
    for (int i = threadIdx.x; i < ROWS * (KEYS / 8); i += 384) {
        const int t = tile.t0 + i / (KEYS / 8), column = i % (KEYS / 8) * 8;
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
DEVICE void tile_of_weights(const TensorMap& queries, const TensorMap& keys, const TensorMap& grads,
                            const TensorMap& values, bf16* weights, bf16* dscores, const float* lse,
                            const float* delta, const int* starts, const int64_t* seed, uint32_t threshold,
                            const Group& g) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const Tile tile(g, starts);
    if (!tile.read) return;
    const int key0 = tile.key0, room = min((tile.c + 1) * g.chunk, g.end) - key0, offset = g.total - g.length;
    const int64_t corner = blockIdx.z * g.item + key0 - g.base;
    if (!tile.seen) {
        blank(weights + corner, tile, g, room);
        if (GRADIENT) blank(dscores + corner, tile, g, room);
        return;
    }
    Ring ring;
    ring.open(memory, barriers);
    const int middle = g.features / 64, last = middle + (GRADIENT ? g.width / 64 : 0);

    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            const int row = tile.b * g.length + tile.t0 - offset, key = tile.b * g.total + key0;
            for (int i = 0; i < last; ++i) {
                const bool early = i < middle;
                const int column = early ? tile.h * g.features + i * 64 : tile.h * g.width + (i - middle) * 64;
                ring.fill(i, early ? &queries : &grads, row, column, early ? &keys : &values, key, column);
            }
        }
        __syncwarp();
    } else {
        more_registers<232>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int top = tile.t0 + group * 64 + warp * 16 + lane / 4;
        float sum[128];
        ring.multiply(sum, group, 0, middle);
        uint32_t held[32], *kept = reinterpret_cast<uint32_t*>(ring.rest(memory)) + threadIdx.x % 256;
        const int64_t place = int64_t(tile.b * g.all_heads + tile.h) * g.length - offset;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = top + 8 * half;
            const bool inside = t >= g.first && t < g.end;
            const float norm = inside ? lse[place + t] * LOG2E : INFINITY;
            // what the row sees, counted from the lane's first key; a row that sees nothing has an infinite norm
            const int lane0 = key0 + lane % 4 * 2;
            const int low = (inside && starts ? starts[int64_t(tile.b) * g.total + t] : 0) - lane0;
            const int high = (isinf(norm) ? -1 : t) - lane0;
#if DROPOUT
            const uint32_t key = row_key(uint64_t(*seed), tile.b * g.all_heads + tile.h, t);
#endif
            bf16* row = weights + corner + int64_t(t - g.first) * 2 * g.chunk;
#pragma unroll
            for (int j = 0; j < 32; j += 2) {
                uint32_t words[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    float p[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int at = 8 * (j + n) + i;
                        bool seen = at >= low && at <= high;
#if DROPOUT
                        seen = seen && !dropped(key, at + lane0 - tile.window, threshold);
#endif
                        p[i] = seen ? exp2_ftz(sum[4 * (j + n) + 2 * half + i] * LOG2E - norm) : 0.f;
                    }
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
            ring.multiply(sum, group, middle, last);
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
    ring.close();
}

// weights (a band of the group) = exp(S - lse), zeros elsewhere.
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384, 1)
    weights(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, bf16* weights,
            const float* lse, const int* starts, const int64_t* seed, uint32_t threshold, int64_t item, int first,
            int end, int base, int chunk, int strip, int features, int width, int length, int total, int heads,
            int first_batch, int first_head, int all_heads) {
    const Group g{item,  first,  end,   base,  chunk,       strip,      features,
                  width, length, total, heads, first_batch, first_head, all_heads};
    tile_of_weights<false>(queries, keys, queries, keys, weights, weights, lse, lse, starts, seed, threshold, g);
}

// The same, and dscores = weights * (dP - delta).
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384, 1)
    weights_and_gradient(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
                         const __grid_constant__ TensorMap grads, const __grid_constant__ TensorMap values,
                         bf16* weights, bf16* dscores, const float* lse, const float* delta, const int* starts,
                         const int64_t* seed, uint32_t threshold, int64_t item, int first, int end, int base,
                         int chunk, int strip, int features, int width, int length, int total, int heads,
                         int first_batch, int first_head, int all_heads) {
    const Group g{item,  first,  end,   base,  chunk,       strip,      features,
                  width, length, total, heads, first_batch, first_head, all_heads};
    tile_of_weights<true>(queries, keys, grads, values, weights, dscores, lse, delta, starts, seed, threshold, g);
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
                const uint32_t key = row_key(uint64_t(*seed), b * heads + h, t);
#endif
                float more = most[half];
#pragma unroll
                for (int j = 0; j < 32; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& x = sum[4 * j + 2 * half + i];
                        bool seen = 8 * j + i >= before && 8 * j + i <= last;
#if DROPOUT
                        seen = seen && !dropped(key, 8 * j + i + lane0 - window, threshold);
#endif
                        x = seen ? x * LOG2E : -INFINITY;
                        more = fmaxf(more, x);
                    }
                if (more == -INFINITY) continue;
                float part = 0.f;
#pragma unroll
                for (int j = 0; j < 32; ++j) part += exp2_ftz(sum[4 * j + 2 * half] - more) + exp2_ftz(sum[4 * j + 2 * half + 1] - more);
                all[half] = all[half] * exp2_ftz(most[half] - more) + part;
                most[half] = more;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = top + 8 * half;
            const float more = warp_max<4>(most[half]);
            const float sum = warp_sum<4>(most[half] == -INFINITY ? 0.f : all[half] * exp2_ftz(most[half] - more));
            if (t >= offset && t < total && lane % 4 == 0)
                lse[int64_t(b * heads + h) * length + t - offset] =
                    isinf(more) ? INFINITY : (more + log2f(sum)) * (1.f / LOG2E);
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
