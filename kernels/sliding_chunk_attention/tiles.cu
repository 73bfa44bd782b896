// The weights of attention and the gradient of its logits, a tile of 128 rows by 256 keys a block (sm_90a).
//
// S = Q K^T and dP = dY V^T go through the same pipeline: one warp copies operand slices of 64 features by tensor map
// into a ring of stages, two warpgroups of 64 rows multiply. Between the two products the accumulator becomes the
// weights P = exp(S - lse), written out and kept in shared memory in half precision (scaled, 11 bits), which leaves the
// registers to dP; at the end dS = P (dP - delta). Neither S nor dP meets memory.
#include "dropkey.cuh"
#include "hopper.cuh"

#define INFINITY __int_as_float(0x7f800000)

constexpr int STAGES = 3, ROWS = 128, KEYS = 256;
constexpr uint32_t A_BYTES = ROWS * 128, B_BYTES = KEYS * 128, STAGE = A_BYTES + B_BYTES;
constexpr float SCALE = 16384.f;  // of the weights in half precision

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

extern "C" __global__ void __launch_bounds__(384, 1)
    weights_and_gradient(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
                         const __grid_constant__ TensorMap grads, const __grid_constant__ TensorMap values,
                         bf16* __restrict__ weights, bf16* __restrict__ dscores, const float* __restrict__ lse,
                         const float* __restrict__ delta, const int* starts, const int64_t* seed, uint32_t threshold,
                         int64_t item, int first, int end, int base, int chunk, int strip, int features, int width,
                         int length, int total, int heads, int first_batch, int first_head, int all_heads) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const int t0 = (first / ROWS + blockIdx.y) * ROWS, c = t0 / chunk, window = max(c - 1, 0) * chunk;
    const int key0 = window + blockIdx.x * KEYS;
    // what the products over strips will read is written, zeros above the diagonal
    if (key0 >= min(c * chunk + ((t0 + ROWS - 1 - c * chunk) / strip + 1) * strip, end)) return;
    const int room = min((c + 1) * chunk, end) - key0;
    const int b = first_batch + blockIdx.z / heads, h = first_head + blockIdx.z % heads, offset = total - length;

    const uint32_t stages = (shared_address(memory) + 1023u) & ~1023u, full = shared_address(barriers);
    const uint32_t empty = full + 8 * STAGES;
    uint32_t* kept = reinterpret_cast<uint32_t*>(memory + (stages - shared_address(memory)) + STAGES * STAGE);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 2);
        barrier_init_fence();
    }
    __syncthreads();
    const int middle = features / 64, last = middle + width / 64;

    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            for (int i = 0; i < last; ++i) {
                const int s = i % STAGES;
                const uint32_t to = stages + s * STAGE, barrier = full + 8 * s;
                barrier_wait(empty + 8 * s, (i / STAGES & 1) ^ 1);
                barrier_expect(barrier, STAGE);
                const bool early = i < middle;
                const int column = early ? h * features + i * 64 : h * width + (i - middle) * 64;
                copy_box(to, early ? &queries : &grads, barrier, column, b * length + t0 - offset);
                copy_box(to + A_BYTES, early ? &keys : &values, barrier, column, b * total + key0);
            }
        }
    } else {
    more_registers<232>();
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int top = t0 + group * 64 + warp * 16 + lane / 4;
    float sum[128];
    auto multiply = [&](int from, int to) {
        for (int i = from; i < to; ++i) {
            const int s = i % STAGES;
            const uint32_t a = stages + s * STAGE + group * 64 * 128, k = stages + s * STAGE + A_BYTES;
            barrier_wait(full + 8 * s, i / STAGES & 1);
            products_fence();
#pragma unroll
            for (int part = 0; part < 4; ++part)
                product_64x256(sum, operand(a + part * 32), operand(k + part * 32), i > from || part > 0);
            products_commit();
            if (i > from) {
                products_wait<1>();
                if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((i - 1) % STAGES));
            }
        }
        products_wait<0>();
        if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((to - 1) % STAGES));
    };

    multiply(0, middle);
    uint32_t* held = kept + threadIdx.x % 256;
    const int64_t place = int64_t(b * all_heads + h) * length - offset;
    const int64_t corner = blockIdx.z * item + key0 - base;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = top + 8 * half;
        const bool inside = t >= first && t < end;
        const float norm = inside ? lse[place + t] : INFINITY;
        const int low = inside && starts ? starts[int64_t(b) * total + t] : 0;
        const int high = isinf(norm) ? -1 : t;  // a row that sees nothing has an infinite norm
#if DROPOUT
        const uint32_t key = row_key(uint64_t(*seed), b * all_heads + h, t);
#endif
        bf16* row = weights + corner + int64_t(t - first) * 2 * chunk;
#pragma unroll
        for (int j = 0; j < 32; j += 2) {
            uint32_t words[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float p[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = key0 + 8 * (j + n) + lane % 4 * 2 + i;
                    bool seen = at >= low && at <= high;
#if DROPOUT
                    seen = seen && !dropped(key, at - window, threshold);
#endif
                    p[i] = seen ? exp2f((sum[4 * (j + n) + 2 * half + i] - norm) * 1.4426950408889634f) : 0.f;
                }
                held[256 * (32 * half + j + n)] = pack_half(p[0] * SCALE, p[1] * SCALE);
                words[n] = pack_bf16(p[0], p[1]);
            }
            put(row, j, lane, room, words[0], words[1], inside);
        }
    }

    multiply(middle, last);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = top + 8 * half;
        const bool inside = t >= first && t < end;
        const float mean = inside ? delta[place + t] : 0.f;
        bf16* row = dscores + corner + int64_t(t - first) * 2 * chunk;
#pragma unroll
        for (int j = 0; j < 32; j += 2) {
            uint32_t words[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float* d = sum + 4 * (j + n) + 2 * half;
                float low, high;
                unpack_half(held[256 * (32 * half + j + n)], low, high);
                // a masked weight is an exact zero, and what it multiplies need not be finite
                words[n] = pack_bf16(low == 0.f ? 0.f : low * (1.f / SCALE) * (d[0] - mean),
                                     high == 0.f ? 0.f : high * (1.f / SCALE) * (d[1] - mean));
            }
            put(row, j, lane, room, words[0], words[1], inside);
        }
    }
    }
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
