// The factors of piece.cu: the layout of a channel in shared memory, and how a warp makes them.
#pragma once
#include "tiles.cuh"

constexpr int STEPS = BLOCK;  // of a chunk

struct Mode {
    float4 decays[2];       // q^16, q^64; q^128, q^256
    float2 entering, pad;  // the state before the sequence, later the one after it
};
struct __align__(128) Channel {
    uint4 input[4][32], output[4][32];  // W and C, four modes each
    Mode modes[MODES];
    float taps[8 + STEPS];  // K, after eight zeros
};

// The parameters of a channel, in the place of W until that is made.
struct Given {
    float2 q[MODES], gamma[MODES];
    float p[MODES];
};

// Four modes' factors of lane l stand in place l ^ l / 8, for odd j with bit 2 inverted: those who make and those who
// read them touch every bank once. For mode n of half h these are the places
//   input:  8 (n % 4) + (3 ^ 2 h ^ n) % 8, for step i bit 0 inverted, for the imaginary part bit 2
//   output: 16 h + (2 h ^ n) % 8, for step i bit 2 inverted if i is odd, and bits 3 and 0 from i = 2 on
DEVICE uint4* shared_at(uint32_t address) { return static_cast<uint4*>(__cvta_shared_to_generic(address)); }

// Lane (half, n): z q^e, e = 4 half + i in low[i] and e + 8 in high[i], from z = start q^(-4 half).
struct Run {
    float2 low[5], high[5];
    DEVICE Run(float2 start, float2 q, float2 q2, float2 q8) {
        low[0] = start, low[1] = times(start, q);
#pragma unroll
        for (int i = 2; i < 5; ++i) low[i] = times(low[i - 2], q2);
#pragma unroll
        for (int i = 0; i < 5; ++i) high[i] = times(low[i], q8);
    }
};

// W: input q^(15 - s) for mode n, from `run`, whose exponents are `more` too small.
DEVICE void put_input(Channel& channel, const Run& run, int more) {
    const uint32_t lane = threadIdx.x % 32, n = lane % MODES;
    const uint32_t place = n % 4 * 8 + ((lane / 8 & 2 ^ 3 ^ n) & 7), to = shared_address(channel.input[n / 4] + place);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 odd = run.low[2 * i + more], even = run.low[2 * i + 1 + more];  // steps s
        const float2 early_odd = run.high[2 * i + more], early_even = run.high[2 * i + 1 + more];
        *shared_at(to ^ i * 16) = factor(early_even.x, early_odd.x, even.x, odd.x);
        *shared_at(to ^ i * 16 ^ 64) = factor(early_even.y, early_odd.y, even.y, odd.y);
    }
}

// C: output q^step for mode n in tf32, from `run`, its conjugate, whose exponents are `more` too small.
DEVICE void put_output(Channel& channel, const Run& run, int more) {
    const uint32_t lane = threadIdx.x % 32, n = lane % MODES;
    const uint32_t place = (lane & 16) + ((lane / 8 & 2 ^ n) & 7), to = shared_address(channel.output[n / 4] + place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 a = run.low[i + more], b = run.high[i + more];
        shared_at(to ^ i % 2 * 64 ^ i / 2 * 16)[i / 2 * 8] =
            make_uint4(to_tf32(a.x), to_tf32(a.y), to_tf32(b.x), to_tf32(b.y));
    }
}

// Tap tau = Re sum_n gamma p q^tau; the skip of x to its output is in tap 0.
DEVICE void put_taps(Channel& channel, const Run& run, float share) {
    const int lane = threadIdx.x % 32, half = lane / MODES, index = lane % 8;
    float taps[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i] = share * run.low[i].x, taps[4 + i] = share * run.high[i].x;
    sum_to_own_index<4>(taps, lane);
    float tap = taps[0] + __shfl_xor_sync(ALL, taps[0], 8);
    const int tau = 4 * half + index % 4 + index / 4 * 8;
    if (lane % 8 + half == 0) tap += 1.f;
    channel.taps[lane & 8 ? index : 8 + tau] = lane & 8 ? 0.f : tap;
}

// q^16, q^64, q^128 and q^256, in double precision as in make_decays.
DEVICE void put_decays(Channel& channel, float2 q) {
    LargePower power = {q.x, q.y};
    const float2 one = power.squared(4), four = power.squared(2);
    const float2 eight = power.squared(1), sixteen = power.squared(1);
    const int n = threadIdx.x % 32;
    if (n >= MODES) return;
    channel.modes[n].decays[0] = make_float4(one.x, one.y, four.x, four.y);
    channel.modes[n].decays[1] = make_float4(eight.x, eight.y, sixteen.x, sixteen.y);
}

DEVICE float2 conjugate(float2 z) { return make_float2(z.x, -z.y); }

// The tensor core cuts states to tf32. C makes up for what that takes away from a number on average, half a unit of the
// last place: 2^-11 over a mantissa between 1 and 2, whose inverse is 1 / (2 ln 2) on average. As exact as rounding.
constexpr float UNCUT = 1.f + 0.7213f / 2048;

template <bool REVERSE> DEVICE void make_factors(Channel& channel, float2 q, float2 gamma, float share) {
    const bool half = threadIdx.x % 32 >= MODES;
    const float2 q2 = square(q), q4 = square(q2), q8 = square(q4);
    auto powers = [&](float2 start, bool conjugated) {
        return conjugated ? Run(conjugate(start), conjugate(q), conjugate(q2), conjugate(q8)) : Run(start, q, q2, q8);
    };
    {
        const float2 start = REVERSE ? gamma : make_float2(gamma.x * UNCUT, gamma.y * UNCUT);
        const Run run = powers(half ? times(start, q4) : start, !REVERSE);
        put_taps(channel, run, REVERSE ? share : share * (1.f / UNCUT));
        if (REVERSE) put_input(channel, run, 1);
        if (!REVERSE) put_output(channel, run, 1);
    }
    if (REVERSE) share *= UNCUT;
    const Run run = powers(half ? make_float2(share * q4.x, share * q4.y) : make_float2(share, 0.f), REVERSE);
    if (REVERSE) put_output(channel, run, 0);
    if (!REVERSE) put_input(channel, run, 0);
    put_decays(channel, q);
}
