// How the tensor-core kernels cut their work. A warp owns one channel and a block CHANNELS neighbouring ones; time runs
// in tiles of ROWS chunks of CHUNK steps, and a matrix product takes BLOCK of these steps from every chunk at once:
//
//   row of the product    g = 0..7: chunk 2 g;  8 + g: chunk 2 g + 1   (so that a lane holds two neighbouring chunks)
//   column of the states  2 n, 2 n + 1: real and imaginary part of mode n
//
// x is exact in bfloat16; every float32 factor is split into two bfloat16, which leaves a relative error of 2^-17.
#pragma once
#include "modes.cuh"

constexpr int CHANNELS = 16, THREADS = 32 * CHANNELS;
constexpr int ROWS = 16, BLOCK = 16, CHUNK = 32, TILE = ROWS * CHUNK;
constexpr int WORDS = TILE / 2;  // two steps in a 32-bit word
constexpr int MODES = 16;
static_assert(THREADS == TILE, "a thread loads the document flag of one step");

// Where a word (steps 2 word, 2 word + 1 of the tile) of a channel stands: 16-byte units are permuted so that reads
// along chunks and writes along time both touch every bank once.
DEVICE int place(int channel, int word) {
    const int line = word / 32, unit = word / 4 % 8;
    return channel * WORDS + line * 32 + ((unit ^ line ^ (channel / 8 * 4)) & 7) * 4 + word % 4;
}

// Two steps of eight channels in registers, on their way between global and shared memory.
struct Pair {
    uint4 even, odd;
};

// Copy 4 or 8 bytes to shared memory; zeros when `inside` is false (the source is then not read).
DEVICE void copy_async_4(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
DEVICE void copy_async_8(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(inside ? 8 : 0) : "memory");
}

DEVICE void swap_halves(uint32_t& a, uint32_t& b) {
    const uint32_t low = __byte_perm(a, b, 0x5410);
    b = __byte_perm(a, b, 0x7632);
    a = low;
}

// A tile of a batch row. A block takes rows blockIdx.y, blockIdx.y + gridDim.y, ..., one after the other, tile by tile:
// what it makes of the parameters serves all of them.
struct Item {
    int row, tile;
    DEVICE Item next(int tiles) const { return tile + 1 < tiles ? Item{row, tile + 1} : Item{row + int(gridDim.y), 0}; }
};

// A thread's part of a tile: steps 2 word, 2 word + 1 of channels channel .. channel + 7.
struct Mover {
    int64_t start;  // of this thread's channels in a batch row
    int length, width, channel, word;
    bool inside, reverse;

    DEVICE Mover(int length, int width, bool reverse) : length(length), width(width), reverse(reverse) {
        word = threadIdx.x / 2;
        channel = threadIdx.x % 2 * 8;
        const int global_channel = blockIdx.x * CHANNELS + channel;
        inside = global_channel < width;
        start = global_channel;
    }
    DEVICE int64_t offset(int row, int step) const {
        return start + (int64_t(row) * length + (reverse ? length - 1 - step : step)) * width;
    }

    // Starts to copy the thread's part of a tile to its own 32 bytes of shared memory; zeros stand beyond the sequence.
    DEVICE void fetch(const bf16* from, Item item, uint4* staged) const {
        const int step = item.tile * TILE + 2 * word;
        const bool first = inside && step < length, second = inside && step + 1 < length;
        copy_async_16(shared_address(staged + threadIdx.x), from + (first ? offset(item.row, step) : 0), first);
        copy_async_16(shared_address(staged + THREADS + threadIdx.x), from + (second ? offset(item.row, step + 1) : 0),
                      second);
    }
    DEVICE Pair fetched(const uint4* staged) const { return {staged[threadIdx.x], staged[THREADS + threadIdx.x]}; }
    DEVICE void store(bf16* to, Item item, const Pair& pair) const {
        const int step = item.tile * TILE + 2 * word;
        if (inside && step < length) *reinterpret_cast<uint4*>(to + offset(item.row, step)) = pair.even;
        if (inside && step + 1 < length) *reinterpret_cast<uint4*>(to + offset(item.row, step + 1)) = pair.odd;
    }
    DEVICE void put(uint32_t* shared, Pair pair) const { put(shared, pair, word); }
    // With time running backward inside every chunk.
    DEVICE void put_reversed(uint32_t* shared, const Pair& pair) const {
        put(shared, Pair{pair.odd, pair.even}, word ^ (CHUNK / 2 - 1));
    }
    DEVICE void put(uint32_t* shared, Pair pair, int word) const {
        swap_halves(pair.even.x, pair.odd.x), swap_halves(pair.even.y, pair.odd.y);
        swap_halves(pair.even.z, pair.odd.z), swap_halves(pair.even.w, pair.odd.w);
        uint32_t* at = shared + place(channel, word);
        at[0] = pair.even.x, at[WORDS] = pair.odd.x, at[2 * WORDS] = pair.even.y, at[3 * WORDS] = pair.odd.y;
        at[4 * WORDS] = pair.even.z, at[5 * WORDS] = pair.odd.z, at[6 * WORDS] = pair.even.w, at[7 * WORDS] = pair.odd.w;
    }
    DEVICE Pair get(const uint32_t* shared) const {
        const uint32_t* at = shared + place(channel, word);
        Pair pair = {make_uint4(at[0], at[2 * WORDS], at[4 * WORDS], at[6 * WORDS]),
                     make_uint4(at[WORDS], at[3 * WORDS], at[5 * WORDS], at[7 * WORDS])};
        swap_halves(pair.even.x, pair.odd.x), swap_halves(pair.even.y, pair.odd.y);
        swap_halves(pair.even.z, pair.odd.z), swap_halves(pair.even.w, pair.odd.w);
        return pair;
    }
};

// Not 0 when the state is dropped before this thread's step of a tile. Backward in time that is after step t of the
// sequence when t is a BOS. The byte itself, so that nothing waits for it before it is used.
DEVICE uint32_t drops_state(const uint8_t* bos, int length, Item item, bool reverse) {
    const int step = item.tile * TILE + threadIdx.x;
    const bool read = bos && step < length && !(reverse && step == 0);
    return read ? bos[int64_t(item.row) * length + (reverse ? length - step : step)] : 0u;
}

// The first flagged step of the tile at or after `from`, or TILE. `flags`: a bit a step.
DEVICE int next_flag(const uint32_t* flags, int from) {
    const int lane = threadIdx.x % 32;
    uint32_t word = lane < TILE / 32 ? flags[lane] : 0u;
    if (from > 32 * lane) word = from >= 32 * lane + 32 ? 0u : word & (ALL << (from - 32 * lane));
    return __reduce_min_sync(ALL, word ? 32 * lane + __ffs(word) - 1 : TILE);
}

// The mask of a word of two values at steps `first` and `second` for the steps begin <= step < end.
DEVICE uint32_t within(int first, int second, int begin, int end) {
    return (first >= begin && first < end ? 0xffffu : 0u) | (second >= begin && second < end ? 0xffff0000u : 0u);
}

// The state after the first `count` steps of a chunk, step by step: lane n keeps mode n and, of x, steps 2 n and 2 n + 1.
template <bool REVERSE>
DEVICE float2 state_after(uint32_t x, uint32_t drops, float2 state, float2 q, float2 input, int count) {
    for (int step = 0; step < count; ++step) {
        const uint32_t word = __shfl_sync(ALL, x, step / 2);
        const float value = step % 2 ? high_bf16(word) : low_bf16(word);
        if (drops >> step & 1) state = make_float2(0.f, 0.f);
        const float2 added = make_float2(input.x * value, input.y * value);
        state = REVERSE ? times(q, make_float2(state.x + added.x, state.y + added.y)) : times_plus(q, state, added);
    }
    return state;
}

// ---- factors of the products ----

// q^1, q^2, ..., q^16
struct Powers {
    float2 one, two, four, eight, sixteen;
    DEVICE Powers(float2 q)
        : one(q), two(square(one)), four(square(two)), eight(square(four)), sixteen(square(eight)) {}
    // z q^exponent, 0 <= exponent < 8
    DEVICE float2 raise(float2 z, int exponent) const {
        if (exponent & 1) z = times(z, one);
        if (exponent & 2) z = times(z, two);
        if (exponent & 4) z = times(z, four);
        return z;
    }
};
DEVICE float real_of_product(float2 a, float2 b) { return a.x * b.x - a.y * b.y; }
DEVICE float2 minus_i_times(float2 z) { return make_float2(z.y, -z.x); }

// A fragment of a float32 factor: (x, y) the upper halves of b0 and b1, (z, w) the lower ones.
DEVICE uint2 split(float low, float high) {
    const uint32_t upper = pack_bf16(low, high);
    return make_uint2(upper, pack_bf16(low - low_bf16(upper), high - high_bf16(upper)));
}
DEVICE uint4 factor(float b0_low, float b0_high, float b1_low, float b1_high) {
    const uint2 b0 = split(b0_low, b0_high), b1 = split(b1_low, b1_high);
    return make_uint4(b0.x, b1.x, b0.y, b1.y);
}
// c += a b for an exact a
DEVICE void product(float (&c)[4], const uint32_t (&a)[4], uint4 b) {
    mma_bf16(c, a, b.x, b.y);
    mma_bf16(c, a, b.z, b.w);
}

// A power of q that goes on from square to square, in double precision: errors of large powers add up over the whole
// memory of a slow mode.
struct LargePower {
    double re, im;
    DEVICE float2 squared(int times) {
        for (int i = 0; i < times; ++i) {
            const double next = re * re - im * im;
            im = 2 * re * im, re = next;
        }
        return make_float2(float(re), float(im));
    }
};

// Over how many steps a state is carried at once: 32, 64, 128 and 256. These powers are made in double precision,
// because their errors add up over the whole memory of a slow mode.
constexpr int LEVELS = 4, FIRST_LEVEL = -5;  // level l: over CHUNK << l steps
DEVICE void make_decays(float2 (&decays)[LEVELS][MODES], float2 q) {
    const int lane = threadIdx.x % 32;
    double re = q.x, im = q.y;
    for (int level = FIRST_LEVEL; level < LEVELS; ++level) {
        if (level >= 0 && lane < MODES) decays[level][lane] = make_float2(float(re), float(im));
        const double next = re * re - im * im;
        im = 2 * re * im, re = next;
    }
}
