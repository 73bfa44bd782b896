#pragma once
#include "piece.cuh"

// As the forward in norm.cu, without slots: x, y (rows, L, groups K), L <= UNITS STEPS; grid rows * groups * CLUSTER.
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
    forward(const X* x_all, const P* weight, const P* bias, X* y_all, const uint8_t* bos, int* begin,
            const int64_t* count0, const float* mean0, const float* var0, int64_t* count_out, float* mean_out,
            float* var_out, float* saved, int rows, int L, int groups, float beta1, float beta2, float keep1,
            float keep2, float log1, float log2, float eps) {
#if __CUDA_ARCH__ >= 900  // older GPUs are never given it
    constexpr uint32_t all = 0xffffffffu;
    constexpr Kind kind = DECAYED ? Decay : Merge;
    __shared__ __align__(16) Run runs[UNITS];  // of the warps before the end of this block
    __shared__ uint64_t arrived;
    const Place place(groups);
    const auto [lane, part, first, rank, order, chain, row, group, width] = place;
    const int start = order * STEPS, t = start + lane;  // the lane's own step; it loads a part of first + r
    const int64_t base = int64_t(row) * L * width + group * K;

    if (threadIdx.x == 0) {
        open_barrier(&arrived);
        expect_bytes(&arrived, (rank + 1) * WARPS * int(sizeof(Run)));
    }
    cluster_arrive();
    if (t < L) prefetch_row(x_all + base + int64_t(t) * width);
    wait_for_previous();
    let_next_begin();

    const int64_t own = base + int64_t(start + first) * width + part * VECTOR;
    Vector<X, VECTOR> x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        x[r].clear();
        if (start + first + r < L) x[r].read(x_all + own + r * width);
    }
    Run state = {0.f, 0.f, 0.f, 0.f};
    if (mean0) state.a = mean0[chain], state.b = var0[chain];
    const int64_t carried = count0 ? count0[row] : 0;
    float w[VECTOR], b[VECTOR];
    load(weight + group * K + part * VECTOR, w);
    load(bias + group * K + part * VECTOR, b);
    int latest = -1;  // the step of the last BOS at or before t
    if (bos) {
        const uint8_t* marks = bos + int64_t(row) * L;
        const int from = min(start, L);
        const int before = find_begins(marks, 0, from, -1, [](int, int) {});
        find_begins(marks, from, min(start + STEPS, L), before, [&](int, int found) { latest = found; });
        if (group == 0 && t < L) begin[int64_t(row) * L + t] = latest;
    }
    // While x is on its way:
    const int64_t count = latest >= 0 ? t - latest + 1 : carried + t + 1;
    float unbias1 = 1.f, unbias2 = 1.f;
    Run over_own, over_earlier;
    if constexpr (DECAYED) {
        unbias1 = correction(log1, float(count)), unbias2 = correction(log2, float(count));
        over_own = powers_of(log1, log2, STEPS), over_earlier = powers_of(log1, log2, start);
    } else {
        state.p = float(carried);
    }
    cluster_wait();

    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = 0.f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[r] += x[r][i];
    }
    sum_to_own_index<LANES / 2>(sums, part);
    const float mean = sums[0] * (1.f / K);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float middle = __shfl_sync(all, mean, first + r);
        sums[r] = 0.f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[r] = fmaf(x[r][i] - middle, x[r][i] - middle, sums[r]);
    }
    sum_to_own_index<LANES / 2>(sums, part);
    const float var = sums[0] * (1.f / K);

    Run run = identity<kind>();
    const bool starts = latest == t;
    if (t < L && DECAYED) run = {starts ? 0.f : beta1, starts ? 0.f : beta2, keep1 * mean, keep2 * var};
    if (t < L && !DECAYED) run = {1.f, starts ? 1.f : 0.f, mean, var};
    run = warp_scan<kind>(run);
    Run whole = from_lane(run, 31);
    if constexpr (DECAYED) whole = with_powers(whole, over_own);
    if (lane >= rank && lane < CLUSTER) send_run(&runs[order], &arrived, lane, whole);

    await_bytes(&arrived);  // a block must not end before
    Run before = all_before<kind>(runs, order);
    if constexpr (DECAYED) before = with_powers(before, over_earlier);
    run = compose<kind>(compose<kind>(state, before), run);
    if (t == L - 1) {
        mean_out[chain] = run.a, var_out[chain] = run.b;
        if (group == 0) count_out[row] = count;
    }
    const float center = run.a * unbias1, scale = rsqrtf(fmaf(run.b, unbias2, eps));
    if (saved && t < L) {
        const int64_t pairs = int64_t(rows) * groups * L;
        saved[int64_t(chain) * L + t] = center, saved[pairs + int64_t(chain) * L + t] = scale;
    }

#pragma unroll
    for (float& value : w) value += 1.f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float c = __shfl_sync(all, center, first + r), s = __shfl_sync(all, scale, first + r);
        if (start + first + r >= L) continue;
        float y[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            // In bfloat16 x is not known better than the rounding of c s.
            const float z = sizeof(X) == 2 ? fmaf(x[r][i], s, -c * s) : (x[r][i] - c) * s;
            y[i] = fmaf(z, w[i], b[i]);
        }
        write_global(y_all + own + r * width, y);
    }
#endif
}
