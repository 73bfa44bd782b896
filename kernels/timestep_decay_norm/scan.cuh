// Scans over time: within a tile by one warp a group, between tiles by looking back at what earlier blocks published.
#pragma once
#include "ptx.cuh"

// What a run of consecutive steps does to the pair (a, b) that travels through time. p and q depend on the kind:
//   Decay  a <- p a' + a, b <- q b' + b          both decayed sums, and both gradients of theirs backward in time
//   Merge  (a, b) are mean and variance of p steps; q = 1: the run begins a document and forgets what was before
//   Drift  a <- a' + a, b <- b' + b - 2 a' p     the gradients of Merge, divided by the count; q = 1 forgets
enum Kind { Decay, Merge, Drift };

struct Run {
    float p, q, a, b;
};

template <Kind kind> DEVICE Run identity() { return kind == Decay ? Run{1.f, 1.f, 0.f, 0.f} : Run{0.f, 0.f, 0.f, 0.f}; }

// First `l`, then `r`.
template <Kind kind> DEVICE Run compose(const Run& l, const Run& r) {
    if constexpr (kind == Decay) {
        return {l.p * r.p, l.q * r.q, fmaf(r.p, l.a, r.a), fmaf(r.q, l.b, r.b)};
    } else if constexpr (kind == Merge) {
        const float n = l.p + r.p, c = n > 0.f ? r.p / n : 0.f, d = r.a - l.a;
        const Run both = {n, l.q, fmaf(c, d, l.a), fmaf(c, r.b - l.b + (1.f - c) * d * d, l.b)};
        return r.q != 0.f ? r : both;
    } else {
        const Run both = {l.p + r.p, l.q, l.a + r.a, l.b + r.b - 2.f * l.a * r.p};
        return r.q != 0.f ? r : both;
    }
}

DEVICE Run from_lane(const Run& x, int lane) {
    constexpr uint32_t all = 0xffffffffu;
    return {__shfl_sync(all, x.p, lane), __shfl_sync(all, x.q, lane), __shfl_sync(all, x.a, lane),
            __shfl_sync(all, x.b, lane)};
}

// Inclusive, over the lanes of a warp, of which the first `Lanes` count.
template <Kind kind, int Lanes = 32> DEVICE Run warp_scan(Run x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < Lanes; offset *= 2) {
        const Run before = from_lane(x, (lane - offset) & 31);
        if (lane >= offset) x = compose<kind>(before, x);
    }
    return x;
}

// A published pair is its own flag: 8 bytes move at once, and all ones (a NaN that no arithmetic gives) is "not yet".
DEVICE void publish(uint64_t* to, const Run& x) {
    uint64_t pair = uint64_t(__float_as_uint(x.b)) << 32 | __float_as_uint(x.a);
    if (pair == ~0ull) pair = 0x7fffffff7fffffffull;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
DEVICE void await(const uint64_t* from, float& a, float& b) {
    uint64_t pair;
    for (;;) {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(pair) : "l"(from) : "memory");
        if (pair != ~0ull) break;
        __nanosleep(32);
    }
    a = __uint_as_float(uint32_t(pair));
    b = __uint_as_float(uint32_t(pair >> 32));
}

// What arrives at tile `tile` of a chain, by one warp. A chain has a slot a tile, then one a span of 32 tiles: the pair
// after the span. Always the same 32 + 1 terms in the same order, so equal runs give equal bits. `run_of(tile, a, b)`
// completes a tile's published pair, `state_after(tiles, a, b)` a span's; `start` is what arrives at the first tile.
// Blocks wait for blocks of lower index only, which the hardware starts first.
template <Kind kind, class RunOf, class StateAfter, class Exact>
DEVICE Run arriving(const uint64_t* slots, int tile, int tiles, const Run& start, RunOf run_of, StateAfter state_after,
                    Exact exact) {
    const int lane = threadIdx.x % 32, span = tile / 32, before = tile % 32;
    float a, b;
    Run run = identity<kind>();
    if (lane < before) {
        await(slots + span * 32 + lane, a, b);
        run = run_of(span * 32 + lane, a, b);
    }
    run = exact(from_lane(warp_scan<kind>(run), 31), before);
    Run state = start;
    if (span > 0) {
        await(slots + tiles + span - 1, a, b);
        state = state_after(span * 32, a, b);
    }
    return compose<kind>(state, run);
}
