// The decays of the time-step norms, and where documents begin.
#pragma once
#include "scan.cuh"

struct Rates {
    float beta1, beta2, keep1, keep2, log1, log2, eps;  // keep = 1 - beta, log = ln beta
};

// The begin of steps from .. to - 1 of a row, by one warp that has seen `before`; returns the last.
template <class Use> DEVICE int find_begins(const uint8_t* bos, int from, int to, int before, Use use) {
    constexpr uint32_t all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
#pragma unroll 8
    for (int t = from; t < to; t += 32) {
        const uint32_t marks = __ballot_sync(all, t + lane < to && bos[t + lane]), upto = marks & (all >> (31 - lane));
        if (t + lane < to) use(t + lane, upto ? t + 31 - __clz(upto) : before);
        if (marks) before = t + 31 - __clz(marks);
    }
    return before;
}

DEVICE float correction(float log_beta, float n) { return -1.f / expm1f(n * log_beta); }

// The powers of a run without a BOS, straight from the logarithm: products of rounded betas drift.
DEVICE Run exact_powers(Run run, float steps, const Rates& rate) {
    if (run.p != 0.f) run.p = expf(steps * rate.log1);
    if (run.q != 0.f) run.q = expf(steps * rate.log2);
    return run;
}
