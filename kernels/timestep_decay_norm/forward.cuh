#pragma once
#include "tile.cuh"

// x, y (rows, L, groups K); count0 (rows), mean0, var0 (rows, groups) or null, and the same after the last step; saved
// (2, rows, groups, L), the centre and the scale of every step, or null; `begin` (rows, L), from `prepare`, or null.
extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(const X* x_all, const P* weight, const P* bias, X* y_all, const int* begin, const int64_t* count0,
            const float* mean0, const float* var0, int64_t* count_out, float* mean_out, float* var_out, float* saved,
            uint64_t* all_slots, int rows, int L, int groups, int tiles, float beta1, float beta2, float keep1,
            float keep2, float log1, float log2, float eps) {
    constexpr Kind kind = DECAYED ? Decay : Merge;
    __shared__ float moments[2][GROUPS][TILE];  // mean and variance of a step; then its centre and scale
    auto &first = moments[0], &second = moments[1];
    const Rates rate = {beta1, beta2, keep1, keep2, log1, log2, eps};
    const Place place(L, groups, rows, tiles);
    const Share mine;
    const int start = place.order * TILE, group = place.group(mine.group), width = groups * K;
    const int64_t base = (int64_t(place.row) * L + start) * width + group * K;

    const SharedTile x_tile(memory);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int step = r * ACROSS + mine.step;
        const bool inside = group < groups && start + step < L;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const bool there = inside && mine.within(v);
            x_tile.fetch(r, v, there ? x_all + base + int64_t(step) * width + mine.column(v) : x_all, there);
        }
    }
    copy_async_commit();
    const Documents documents = {begin ? begin + int64_t(place.row) * L : nullptr, count0 ? count0[place.row] : 0};
    copy_async_wait<0>();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float mean = 0.f, square = 0.f;
        Vector<X, VECTOR> x[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            x[v] = x_tile(r, v);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) mean += x[v][i];
        }
        mean = warp_sum<LANES>(mean) * (1.f / K);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
            if (mine.within(v)) {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) square += (x[v][i] - mean) * (x[v][i] - mean);
            }
        square = warp_sum<LANES>(square) * (1.f / K);
        if (mine.lane == 0) {
            first[mine.group][r * ACROSS + mine.step] = mean;
            second[mine.group][r * ACROSS + mine.step] = square;
        }
    }
    __syncthreads();

    for_each_group(place, [&](int g) {
        const int lane = threadIdx.x % 32;
        Run own[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = 2 * lane + i, t = start + s;
            own[i] = identity<kind>();
            if (s < TILE && t < L) {
                const bool starts = documents.starts(t);
                const float mean = first[g][s], var = second[g][s];
                if constexpr (DECAYED)
                    own[i] = {starts ? 0.f : rate.beta1, starts ? 0.f : rate.beta2, rate.keep1 * mean,
                              rate.keep2 * var};
                else
                    own[i] = {1.f, starts ? 1.f : 0.f, mean, var};
            }
        }
        own[1] = compose<kind>(own[0], own[1]);
        const Run sum = warp_scan<kind>(own[1]);
        Run whole = from_lane(sum, 31), earlier = from_lane(sum, (lane - 1) & 31);
        if (lane == 0) earlier = identity<kind>();

        const int64_t chain = place.chain(g);
        Run state = {DECAYED ? 0.f : float(documents.carried), 0.f, 0.f, 0.f};
        if (mean0) state.a = mean0[chain], state.b = var0[chain];
        if (tiles > 1) {
            uint64_t* slots = place.slots(all_slots, g);
            if (lane == 0) publish(slots + place.order, whole);
            if constexpr (DECAYED) whole = exact_powers(whole, TILE, rate);
            state = arriving<kind>(
                slots, place.order, tiles, state,
                [&](int tile, float a, float b) -> Run {
                    const int end = (tile + 1) * TILE - 1, from = documents.at(end);
                    const bool forgets = from >= tile * TILE;
                    if constexpr (DECAYED)
                        return exact_powers({forgets ? 0.f : 1.f, forgets ? 0.f : 1.f, a, b}, TILE, rate);
                    else
                        return {float(forgets ? end - from + 1 : TILE), forgets ? 1.f : 0.f, a, b};
                },
                [&](int done, float a, float b) -> Run {
                    return {DECAYED ? 0.f : float(documents.count(done * TILE - 1)), 0.f, a, b};
                },
                [&](const Run& run, int before) { return DECAYED ? exact_powers(run, before * TILE, rate) : run; });
            if (lane == 0 && place.order % 32 == 31 && place.order < tiles - 1)
                publish(slots + tiles + place.order / 32, compose<kind>(state, whole));
        }

#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = 2 * lane + i, t = start + s;
            if (s >= TILE || t >= L) continue;
            const Run now = compose<kind>(state, compose<kind>(earlier, own[i]));
            float mean = now.a, var = now.b;
            if (t == L - 1) {
                mean_out[chain] = mean, var_out[chain] = var;
                if (place.group(g) == 0) count_out[place.row] = documents.count(t);
            }
            if constexpr (DECAYED) {
                const float n = float(documents.count(t));
                mean *= correction(rate.log1, n), var *= correction(rate.log2, n);
            }
            const float scale = rsqrtf(var + rate.eps);
            first[g][s] = mean, second[g][s] = scale;
            if (saved) {
                const int64_t pairs = int64_t(rows) * groups * L;
                saved[chain * L + t] = mean, saved[pairs + chain * L + t] = scale;
            }
        }
    });
    __syncthreads();

    if (group >= groups) return;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        if (!mine.within(v)) continue;
        float w[VECTOR], b[VECTOR];
        load(weight + int64_t(group) * K + mine.column(v), w);
        load(bias + int64_t(group) * K + mine.column(v), b);
#pragma unroll
        for (float& value : w) value += 1.f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int step = r * ACROSS + mine.step;
            if (start + step >= L) continue;
            const float mean = first[mine.group][step], scale = second[mine.group][step];
            const Vector<X, VECTOR> x = x_tile(r, v);
            float y[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) y[i] = fmaf((x[i] - mean) * scale, w[i], b[i]);
            write_global(y_all + base + int64_t(step) * width + mine.column(v), y);
        }
    }
}
