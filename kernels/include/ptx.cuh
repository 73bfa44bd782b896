// What the kernels need from PTX, without any CUDA header. Compiled by NVRTC only.
#pragma once

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

static_assert(sizeof(int64_t) == 8 && sizeof(void*) == 8, "64-bit only");

#define DEVICE __device__ __forceinline__

// ---- bfloat16: a storage type; all arithmetic is float32 ----

struct bf16 {
    uint16_t bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two bf16 in a register; `low` is the one at the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// float32 -> tf32, rounded; the tensor core drops the low 13 bits.
DEVICE uint32_t to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// ---- global memory: W consecutive elements as float32, in 16-byte accesses where W allows ----
// The address must be a multiple of W * sizeof(T), or of 16 when that is larger.

template <int W> DEVICE void load(const float* from, float (&to)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            float4 v = *reinterpret_cast<const float4*>(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = from[i];
    }
}

template <int W> DEVICE void load(const bf16* from, float (&to)[W]) {
    if constexpr (W % 8 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 8) {
            uint4 v = *reinterpret_cast<const uint4*>(from + i);
            to[i] = low_bf16(v.x), to[i + 1] = high_bf16(v.x), to[i + 2] = low_bf16(v.y), to[i + 3] = high_bf16(v.y);
            to[i + 4] = low_bf16(v.z), to[i + 5] = high_bf16(v.z), to[i + 6] = low_bf16(v.w), to[i + 7] = high_bf16(v.w);
        }
    } else if constexpr (W % 2 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 2) {
            uint32_t v = *reinterpret_cast<const uint32_t*>(from + i);
            to[i] = low_bf16(v), to[i + 1] = high_bf16(v);
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = to_float(from[i]);
    }
}

template <int W> DEVICE void store(float* to, const float (&from)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = from[i];
    }
}

template <int W> DEVICE void store(bf16* to, const float (&from)[W]) {
    if constexpr (W % 8 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 8)
            *reinterpret_cast<uint4*>(to + i) =
                make_uint4(pack_bf16(from[i], from[i + 1]), pack_bf16(from[i + 2], from[i + 3]),
                           pack_bf16(from[i + 4], from[i + 5]), pack_bf16(from[i + 6], from[i + 7]));
    } else if constexpr (W % 2 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 2) *reinterpret_cast<uint32_t*>(to + i) = pack_bf16(from[i], from[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = from_float<bf16>(from[i]);
    }
}

// 2^x to 2^-22, results below 2^-126 as zero; exp2f keeps those, at three more instructions.
DEVICE float exp2_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- reductions ----

// The sum over a group of `Width` neighbouring lanes, in every lane of it.
template <int Width = 32> DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = Width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
template <int Width = 32> DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = Width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Lane s of a group of 2 HALF = N lanes gets the sum over the group of the values at index s, as values[0].
template <int HALF, int N> DEVICE void sum_to_own_index(float (&values)[N], int lane) {
    if constexpr (HALF > 0) {
        const bool upper = lane & HALF;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float sent = upper ? values[i] : values[i + HALF];
            const float kept = upper ? values[i + HALF] : values[i];
            values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, HALF);
        }
        sum_to_own_index<HALF / 2>(values, lane);
    }
}

// The sum over a one-dimensional block of `Threads`, in every thread. `scratch` holds Threads / 32 floats of shared
// memory and may be reused at once.
template <int Threads> DEVICE float block_sum(float x, float* scratch) {
    constexpr int warps = Threads / 32;
    static_assert(Threads % 32 == 0 && warps <= 32, "whole warps");
    x = warp_sum(x);
    if constexpr (warps == 1) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// ---- shared memory and asynchronous copies (sm_80 and newer) ----

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copy 16 bytes to shared memory; zeros when `inside` is false (the source is then not read).
DEVICE void copy_async_16(uint32_t to, const void* from, bool inside = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `Pending` committed groups are still on their way.
template <int Pending> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

// ---- tensor cores through mma.sync (sm_80 and newer) ----
// Fragments of lane l, with g = l / 4 and t = l % 4; C (16 x 8): c[0], c[1] at (g, 2t), (g, 2t + 1); c[2], c[3] at
// row g + 8.

DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The inverse of load_matrix_x4: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = __shfl_sync(0xffffffffu, address, i * 8 + threadIdx.x % 32 / 4);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + threadIdx.x % 4 * 4), "r"(r[i]) : "memory");
    }
#endif
}

// c (16 x 8) += a (16 x 16) b (16 x 8). a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), pairs along k;
// b: (2t.., g), (2t + 8.., g).
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 8) b (8 x 8): the first half of the k above.
DEVICE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// c (16 x 8) += a (16 x 8) b (8 x 8). a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g).
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- ordering between blocks ----

DEVICE uint32_t load_acquire(const uint32_t* p) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
DEVICE void store_release(uint32_t* p, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// ---- beside other kernels ----

// Programmatic dependent launch. A kernel launched early may begin before the one before it has ended, once all blocks
// of that one let it: it waits before it reads what that one writes or writes what that one reads. A kernel that waits
// first and then lets the next begin has at most that one beside it. On older GPUs no kernel is launched early.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Ask the L2 cache for a line. It holds no old copy of what another block writes, so this may come before the wait.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
