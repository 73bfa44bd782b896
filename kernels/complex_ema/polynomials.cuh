// Polynomials in the modes' q and q times their derivatives, on tensor cores. The coefficient of q^(16 a + b) stands in
// row b and column a of a matrix: a product with q^(16 a) leaves a sum over the rows; every coefficient counts a times
// in another one.
#pragma once
#include "tiles.cuh"

struct Channel {
    float2 start[MODES][4];         // q^(32 t)
    float4 steps[MODES][2];         // q^16, q^128; q^256, q^384
    float2 near[4][BLOCK / 2 + 1][4];  // q^b of mode 4 j + t
    float2 eight[MODES];               // q^8; before that is made q
    float2 gamma[MODES], first[MODES], dlast[MODES];
    float p[MODES];
};
// Powers of q, for large exponents in double precision.
DEVICE void make_powers(Channel& channel, float2 q) {
    const int n = threadIdx.x % 32;
    LargePower large = {q.x, q.y};
    const float2 eight = large.squared(3), z = large.squared(1), z2 = large.squared(1), z4 = large.squared(1);
    const float2 z8 = large.squared(1), z16 = large.squared(1);
    if (n >= MODES) return;
    const float2 z6 = times(z2, z4), z24 = times(z8, z16);
    channel.eight[n] = eight;
    channel.start[n][0] = make_float2(1.f, 0.f), channel.start[n][1] = z2;
    channel.start[n][2] = z4, channel.start[n][3] = z6;
    channel.steps[n][0] = make_float4(z.x, z.y, z8.x, z8.y);
    channel.steps[n][1] = make_float4(z16.x, z16.y, z24.x, z24.y);
    float2 even = make_float2(1.f, 0.f);
    const float2 q2 = square(q);
#pragma unroll
    for (int b = 0; b < BLOCK / 2; b += 2) {
        channel.near[n / 4][b][n % 4] = even, channel.near[n / 4][b + 1][n % 4] = times(even, q);
        even = times(even, q2);
    }
}

// Columns 16 s + (2 t, 2 t + 1, 2 t + 8, 2 t + 9) of coefficients: bfloat16 numbers, and what these leave of others.
struct Operand {
    uint32_t upper[2][4], lower[2][4];
    DEVICE void set(const float (&of)[4][4]) {  // as in add_lags
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint2 parts = split(of[i / 2][i % 2 * 2], of[i / 2][i % 2 * 2 + 1]);
            upper[i / 4][i % 4] = parts.x, lower[i / 4][i % 4] = parts.y;
        }
    }
};

// The powers of q^16 of modes 4 j + g / 2, and the same times their exponents a.
struct Factors {
    uint4 once[2], by_a[2];
    DEVICE Factors(const Channel& channel, int j) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, n = 4 * j + g / 2;
        const float4 near = channel.steps[n][0], far = channel.steps[n][1];
        float2 even = channel.start[n][t];
        if (g % 2) even = minus_i_times(even);  // real parts are now the imaginary parts
        const float2 odd = times(even, make_float2(near.x, near.y));
        auto make = [&](int s, float a, float v0, float v1, float v8, float v9) {
            once[s] = factor(v0, v1, v8, v9);
            by_a[s] = factor(a * v0, (a + 1.f) * v1, (a + 8.f) * v8, (a + 9.f) * v9);
        };
        const float2 z8 = make_float2(near.z, near.w), z16 = make_float2(far.x, far.y), z24 = make_float2(far.z, far.w);
        make(0, 2 * t, even.x, odd.x, real_of_product(even, z8), real_of_product(odd, z8));
        make(1, 2 * t + 16, real_of_product(even, z16), real_of_product(odd, z16), real_of_product(even, z24),
             real_of_product(odd, z24));
    }
};

// Polynomials of modes 4 j .. 4 j + 3, from the sums over a at rows g and 8 + g; `by_a` are those times a.
DEVICE void finish(float4* to, const float (&once)[4], const float (&by_a)[4], const Channel& channel, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float2 q_g = channel.near[j][g][t], q_8 = channel.eight[4 * j + t];
    const float b = g, b8 = g + 8;
    const float2 low = make_float2(once[0], once[1]), high = make_float2(once[2], once[3]);
    const float2 low_k = make_float2(fmaf(16.f, by_a[0], b * low.x), fmaf(16.f, by_a[1], b * low.y));
    const float2 high_k = make_float2(fmaf(16.f, by_a[2], b8 * high.x), fmaf(16.f, by_a[3], b8 * high.y));
    const float2 value = times(q_g, times_plus(q_8, high, low)), by_k = times(q_g, times_plus(q_8, high_k, low_k));
    // Over the lanes of a mode: of the four numbers lane g is left with number g / 2.
    const bool second = lane & 16, imaginary = lane & 8;
    const float2 sent = second ? value : by_k;
    float2 own = second ? by_k : value;
    own.x += __shfl_xor_sync(ALL, sent.x, 16), own.y += __shfl_xor_sync(ALL, sent.y, 16);
    float number = (imaginary ? own.y : own.x) + __shfl_xor_sync(ALL, imaginary ? own.x : own.y, 8);
    number += __shfl_xor_sync(ALL, number, 4);
    if (g % 2 == 0) reinterpret_cast<float*>(&to[4 * j + t])[g / 2] = number;
}

// q^exponent
DEVICE float2 power(float2 q, int exponent) {
    double re = 1, im = 0, by_re = q.x, by_im = q.y;
    for (; exponent; exponent >>= 1) {
        double next = re * by_re - im * by_im;
        if (exponent & 1) im = re * by_im + im * by_re, re = next;
        next = by_re * by_re - by_im * by_im;
        by_im = 2 * by_re * by_im, by_re = next;
    }
    return make_float2(float(re), float(im));
}
