// Elements kept in registers as they are stored, so that a tile of bf16 takes half the registers of its float32 values.
#pragma once
#include "ptx.cuh"

template <class T, int W> struct Vector {
    static constexpr int BYTES = W * int(sizeof(T));
    static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "one access");
    uint32_t words[(BYTES + 3) / 4];

    DEVICE void clear() {
#pragma unroll
        for (uint32_t& word : words) word = 0;
    }
    DEVICE void read(const T* from) {
        if constexpr (BYTES == 16) {
            const uint4 v = *reinterpret_cast<const uint4*>(from);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if constexpr (BYTES == 8) {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[1] = v.y;
        } else if constexpr (BYTES == 4) {
            words[0] = *reinterpret_cast<const uint32_t*>(from);
        } else {
            words[0] = *reinterpret_cast<const uint16_t*>(from);
        }
    }
    DEVICE float operator[](int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
        return i % 2 ? high_bf16(words[i / 2]) : low_bf16(words[i / 2]);
    }
};

// What the threads of a block hold in shared memory: `Vectors` accesses a row and thread. Every thread reads back what it
// fetched itself, so no barrier is needed.
template <class T, int W, int Vectors, int Threads> struct Tile {
    T* own;
    DEVICE Tile(char* memory) : own(reinterpret_cast<T*>(memory) + threadIdx.x * W) {}
    DEVICE T* at(int r, int v) const { return own + (r * Vectors + v) * Threads * W; }
    DEVICE void fetch(int r, int v, const T* from, bool inside) const {
        if constexpr (W * sizeof(T) == 16) {
            copy_async_16(shared_address(at(r, v)), from, inside);
        } else {
#pragma unroll
            for (int i = 0; i < W; ++i) at(r, v)[i] = inside ? from[i] : from_float<T>(0.f);
        }
    }
    DEVICE Vector<T, W> operator()(int r, int v) const {
        Vector<T, W> values;
        values.read(at(r, v));
        return values;
    }
};

template <int W> DEVICE void write(float* to, const float (&from)[W]) {
    if constexpr (W == 2)
        *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
    else
        store(to, from);
}
template <int W> DEVICE void write(bf16* to, const float (&from)[W]) {
    if constexpr (W == 4)
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]));
    else
        store(to, from);
}

// The same to global memory, 16 bytes at once by name: NVRTC splits such a store of the time-step norms into four.
DEVICE void write_16(void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
template <int W> DEVICE void write_global(float* to, const float (&from)[W]) {
    if constexpr (W == 4)
        write_16(to, __float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                 __float_as_uint(from[3]));
    else
        write(to, from);
}
template <int W> DEVICE void write_global(bf16* to, const float (&from)[W]) {
    if constexpr (W == 8)
        write_16(to, pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]), pack_bf16(from[4], from[5]),
                 pack_bf16(from[6], from[7]));
    else
        write(to, from);
}

// The sums over N rows of partial (N, 2, D), rounded to the parameters' type: a fixed order, so equal runs give equal
// bits. Block (32, 32), grid ceil(2 D / 32); `second` may be null, then partial is (N, 1, D).
template <class P> DEVICE void sum_partials(const float* partial, P* first, P* second, int N, int D) {
    __shared__ float tile[32][33];
    const int width = second ? 2 * D : D;
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.f;
    if (column < width) {
#pragma unroll 4
        for (int n = threadIdx.y; n < N; n += 32) sum += partial[int64_t(n) * width + column];
    }
    tile[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(tile[threadIdx.x][threadIdx.y]);
    const int out = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && out < width) {
        P* to = out < D ? first + out : second + (out - D);
        *to = from_float<P>(sum);
    }
}
