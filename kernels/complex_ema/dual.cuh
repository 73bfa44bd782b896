// Numbers with their derivatives by q, and the parameter gradients that are made of them.
#pragma once
#include "modes.cuh"

struct __align__(16) Dual {
    float2 value, slope;
};
DEVICE Dual times_plus(const Dual& a, const Dual& b, const Dual& c) {
    return {times_plus(a.value, b.value, c.value), times_plus(a.value, b.slope, times_plus(a.slope, b.value, c.slope))};
}
DEVICE Dual times(const Dual& a, const Dual& b) {
    return {times(a.value, b.value), times_plus(a.value, b.slope, times(a.slope, b.value))};
}
DEVICE Dual plus(const Dual& a, const Dual& b) {
    return {make_float2(a.value.x + b.value.x, a.value.y + b.value.y),
            make_float2(a.slope.x + b.slope.x, a.slope.y + b.slope.y)};
}
DEVICE Dual constant(float2 value) { return {value, make_float2(0.f, 0.f)}; }
DEVICE Dual zero_dual() { return constant(make_float2(0.f, 0.f)); }
DEVICE float size_of(const Dual& a) {
    return fabsf(a.value.x) + fabsf(a.value.y) + fabsf(a.slope.x) + fabsf(a.slope.y);
}
constexpr float NEGLIGIBLE = 1e-30f;  // of the weight of an entering state

DEVICE Dual shuffle_up(const Dual& a, int lanes) {
    return {make_float2(__shfl_up_sync(ALL, a.value.x, lanes), __shfl_up_sync(ALL, a.value.y, lanes)),
            make_float2(__shfl_up_sync(ALL, a.slope.x, lanes), __shfl_up_sync(ALL, a.slope.y, lanes))};
}
DEVICE Dual shuffle_down(const Dual& a, int lanes) {
    return {make_float2(__shfl_down_sync(ALL, a.value.x, lanes), __shfl_down_sync(ALL, a.value.y, lanes)),
            make_float2(__shfl_down_sync(ALL, a.slope.x, lanes), __shfl_down_sync(ALL, a.slope.y, lanes))};
}
DEVICE Dual shuffle(const Dual& a, int lane) {
    return {make_float2(__shfl_sync(ALL, a.value.x, lane), __shfl_sync(ALL, a.value.y, lane)),
            make_float2(__shfl_sync(ALL, a.slope.x, lane), __shfl_sync(ALL, a.slope.y, lane))};
}

// What the gradient of a final state adds to the gradients of p and q.
struct Leaving {
    float p;
    float2 q;

    // dh: that gradient; u: the final state for p = 1 without an entering one; passed: the derivative by q of the
    // entering state's share of the final one.
    DEVICE void add(float2 dh, const Dual& u, float share, float2 passed) {
        p += dh.x * u.value.x + dh.y * u.value.y;
        const float2 by_q = make_float2(fmaf(share, u.slope.x, passed.x), fmaf(share, u.slope.y, passed.y));
        q.x += dh.x * by_q.x + dh.y * by_q.y, q.y += dh.y * by_q.x - dh.x * by_q.y;
    }
};

// The gradients of one mode. Without a state h = p u and dh/dq = p v, where u is h for p = 1 and v = du/dq: `along`
// holds sum_t dy_t u_t and its derivative sum_t dy_t v_t; `passed` is the entering state's share of sum_t dy_t h_t.
struct Gradients {
    float* dp;
    float2 *dq, *dgamma;

    DEVICE void store(int64_t at, float p, float2 gamma, const Dual& along, const Dual& passed,
                      const Leaving& leaving) const {
        const float2 h = make_float2(fmaf(p, along.value.x, passed.value.x), fmaf(p, along.value.y, passed.value.y));
        const float2 by_q = times(gamma, make_float2(fmaf(p, along.slope.x, passed.slope.x),
                                                     fmaf(p, along.slope.y, passed.slope.y)));
        dp[at] = gamma.x * along.value.x - gamma.y * along.value.y + leaving.p;
        dq[at] = make_float2(by_q.x + leaving.q.x, leaving.q.y - by_q.y);
        dgamma[at] = make_float2(h.x, -h.y);
    }
};
