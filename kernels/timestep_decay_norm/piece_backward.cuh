#pragma once
#include "piece.cuh"

// As the backward in norm.cu, without slots: x, dy, dx (rows, L, groups K), L <= UNITS STEPS; grid rows * groups *
// CLUSTER. Gradients of weight and bias: straight to dweight and dbias for one row, else to partial (rows, 2, groups K).
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
    backward(const X* x_all, const X* dy_all, const P* weight, const float* saved, const int* begin,
             const int64_t* count0, const float* dmean_out, const float* dvar_out, X* dx_all, float* partial,
             P* dweight, P* dbias, float* dmean0, float* dvar0, int rows, int L, int groups, float beta1, float beta2,
             float keep1, float keep2, float log1, float log2) {
#if __CUDA_ARCH__ >= 900  // older GPUs are never given it
    constexpr uint32_t all = 0xffffffffu;
    constexpr Kind kind = DECAYED ? Decay : Drift;
    constexpr int SHARES = THREADS / LANES;  // threads with the same columns
    __shared__ __align__(16) Run runs[UNITS];  // of the warps before the end of this block
    __shared__ __align__(16) float shares[SHARES][2][K];
    __shared__ float sums_of_others[CLUSTER][2 * K];  // in the first block
    __shared__ uint64_t arrived, gathered;
    const Place place(groups);
    const auto [lane, part, first, rank, order, chain, row, group, width] = place;
    // Backward in time: lane 0 has a warp's last step, and a lane loads a part of step last - first - r.
    const int start = (UNITS - 1 - order) * STEPS, last = start + STEPS - 1, t = last - lane;
    const int64_t base = int64_t(row) * L * width + group * K;

    if (threadIdx.x == 0) {
        open_barrier(&arrived), open_barrier(&gathered);
        expect_bytes(&arrived, (rank + 1) * WARPS * int(sizeof(Run)));
        expect_bytes(&gathered, rank == 0 ? (CLUSTER - 1) * 2 * K * int(sizeof(float)) : 0);
    }
    cluster_arrive();
    if (t < L) prefetch_row(x_all + base + int64_t(t) * width), prefetch_row(dy_all + base + int64_t(t) * width);
    wait_for_previous();
    let_next_begin();

    const int64_t own = base + int64_t(last - first) * width + part * VECTOR;
    const Rows all_x(memory), all_dy(memory + TILE_BYTES);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const bool inside = last - first - r < L;
        const int64_t at = inside ? own - r * width : 0;
        all_x.fetch(r, 0, x_all + at, inside), all_dy.fetch(r, 0, dy_all + at, inside);
    }
    copy_async_commit();
    const int64_t pair = int64_t(chain) * L + t, pairs = int64_t(rows) * groups * L;
    const float center = t < L ? saved[pair] : 0.f, scale = t < L ? saved[pairs + pair] : 0.f;
    const int64_t carried = count0 ? count0[row] : 0;
    const auto count_at = [&](int latest, int t) { return float(latest >= 0 ? t - latest + 1 : carried + t + 1); };
    const int latest = begin && t < L ? begin[int64_t(row) * L + t] : -1;
    Run state = {0.f, 0.f, dmean_out ? dmean_out[chain] : 0.f, dvar_out ? dvar_out[chain] : 0.f};
    float gain[VECTOR];
    load(weight + group * K + part * VECTOR, gain);
    const float n = count_at(latest, t);
    float per_mean, per_var;  // of the normalising moments by the carried ones
    Run over_own, over_later;
    if constexpr (DECAYED) {
        per_mean = correction(log1, n), per_var = correction(log2, n);
        over_own = powers_of(log1, log2, min(max(L - start, 0), STEPS));
        over_later = powers_of(log1, log2, max(L - 1 - last, 0));
    } else {
        per_mean = per_var = 1.f / n;
        const float to_last = 1.f / count_at(begin ? begin[int64_t(row) * L + L - 1] : -1, L - 1);
        state = {0.f, 0.f, state.b * to_last, state.a * to_last};
    }
#pragma unroll
    for (float& value : gain) value += 1.f;
    cluster_wait();
    copy_async_wait<0>();

    // Of a step: the mean, sum dy w and sum dy w (x - center); of a column: the gradients of weight and bias.
    float means[ROWS], along[ROWS], across[ROWS], to_weight[VECTOR] = {}, to_bias[VECTOR] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float c = __shfl_sync(all, center, first + r), rs = __shfl_sync(all, scale, first + r);
        const Vector<X, VECTOR> x = all_x(r, 0), dy = all_dy(r, 0);
        means[r] = along[r] = across[r] = 0.f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float g = dy[i] * gain[i], z = x[i] - c;
            means[r] += x[i], along[r] += g, across[r] = fmaf(g, z, across[r]);
            to_weight[i] = fmaf(dy[i] * rs, z, to_weight[i]), to_bias[i] += dy[i];
        }
    }
    sum_to_own_index<LANES / 2>(means, part);
    sum_to_own_index<LANES / 2>(along, part);
    sum_to_own_index<LANES / 2>(across, part);
    const float mean = means[0] * (1.f / K);

    // a and b are the gradients of the mean's and the variance's carry (Decay), or of the variance and the mean over the
    // count (Drift).
    const float to_mean = -scale * along[0] * per_mean;
    const float to_var = -0.5f * scale * scale * scale * across[0] * per_var;
    const bool starts = latest == t;
    Run run = identity<kind>();
    if (t < L) {
        if constexpr (DECAYED) {
            if (starts) run = {0.f, 0.f, 0.f, 0.f};
            if (!starts) run = {beta1, beta2, beta1 * to_mean, beta2 * to_var};
        } else {
            const float drift = n > 1.f ? (mean - center) / (n - 1.f) : 0.f;
            if (n <= 1.f) run = {0.f, 1.f, 0.f, 0.f};
            if (n > 1.f) run = {drift, 0.f, to_var, to_mean - 2.f * to_var * drift};
        }
    }
    const Run sum = warp_scan<kind>(run);
    Run whole = from_lane(sum, 31), later = from_lane(sum, (lane - 1) & 31);
    if (lane == 0) later = identity<kind>();
    if constexpr (DECAYED) whole = with_powers(whole, over_own);
    if (lane >= rank && lane < CLUSTER) send_run(&runs[order], &arrived, lane, whole);

    // While the others' sums are on their way: the gradients of the parameters, always in the same order.
    store(&shares[threadIdx.x / LANES][0][part * VECTOR], to_weight);
    store(&shares[threadIdx.x / LANES][1][part * VECTOR], to_bias);
    __syncthreads();
    float gradient = 0.f;
    if (threadIdx.x < 2 * K) {
#pragma unroll 8
        for (int s = 0; s < SHARES; ++s) gradient += (&shares[s][0][0])[threadIdx.x];
        if (rank > 0) send_float(&sums_of_others[rank][threadIdx.x], &gathered, 0, gradient);
    }

    await_bytes(&arrived);  // a block must not end before
    Run before = all_before<kind>(runs, order);
    if constexpr (DECAYED) before = with_powers(before, over_later);
    const Run here = compose<kind>(compose<kind>(state, before), later);
    if (t == 0 && dmean0) {
        const Run end = compose<kind>(here, run);
        const float of_start = starts ? 0.f : float(carried);
        dmean0[chain] = DECAYED ? end.a : of_start * end.b;
        dvar0[chain] = DECAYED ? end.b : of_start * end.a;
    }
    float shift, stretch;  // dx = dy w scale + stretch (x - mean) + shift
    if constexpr (DECAYED) {
        shift = keep1 * (here.a + to_mean) * (1.f / K), stretch = keep2 * (here.b + to_var) * (2.f / K);
    } else {
        const float dvar = 2.f * (here.a + to_var);
        shift = fmaf(dvar, mean - center, here.b + to_mean) * (1.f / K), stretch = dvar * (1.f / K);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float middle = __shfl_sync(all, mean, first + r), up = __shfl_sync(all, shift, first + r);
        const float by = __shfl_sync(all, stretch, first + r), rs = __shfl_sync(all, scale, first + r);
        if (last - first - r >= L) continue;
        const Vector<X, VECTOR> x = all_x(r, 0), dy = all_dy(r, 0);
        float dx[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) dx[i] = fmaf(dy[i] * gain[i], rs, fmaf(by, x[i] - middle, up));
        write_global(dx_all + own - r * width, dx);
    }

    if (rank > 0 || threadIdx.x >= 2 * K) return;
    await_bytes(&gathered);
#pragma unroll
    for (int other = 1; other < CLUSTER; ++other) gradient += sums_of_others[other][threadIdx.x];
    const int which = threadIdx.x / K, column = group * K + threadIdx.x % K;
    if (partial)
        partial[(int64_t(row) * 2 + which) * width + column] = gradient;
    else
        (which ? dbias : dweight)[column] = from_float<P>(gradient);
#endif
}
