#pragma once
#include "tile.cuh"

// x, y (rows, L, groups K); count0 (rows), mean0, var0 (rows, groups) or null, and the same after the last step; saved
// (2, rows, groups, L), the centre and the scale of every step, or null. Documents: none when `begin` (rows, L) is
// null; it is given, or in a cluster found in `bos` (rows, L).
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(const X* x_all, const P* weight, const P* bias, X* y_all, const uint8_t* bos, int* begin,
            const int64_t* count0, const float* mean0, const float* var0, int64_t* count_out, float* mean_out,
            float* var_out, float* saved, uint64_t* all_slots, int rows, int L, int groups, int tiles, float beta1,
            float beta2, float keep1, float keep2, float log1, float log2, float eps) {
    constexpr Kind kind = DECAYED ? Decay : Merge;
    __shared__ float moments[2][GROUPS][TILE];  // mean and variance of a step; then its centre and scale
    auto &first = moments[0], &second = moments[1];
    __shared__ float before[2][GROUPS];  // in a cluster: the state before the first step, asked for beside the tile
    __shared__ __align__(16) float affine[2][EARLY ? GROUPS * K : 1];
    __shared__ Inbox<GROUPS> inbox;
    const Rates rate = {beta1, beta2, keep1, keep2, log1, log2, eps};
    const Place place(L, groups, rows, tiles);
    const Share mine;
    const int start = place.order * TILE, group = place.group(mine.group), width = groups * K;
    const int64_t row_base = int64_t(place.row) * L * width + group * K;
    if constexpr (IN_CLUSTER) {
        prefetch_tile(x_all, place, start);
        inbox.open();
        wait_for_previous();
    }

    const Tile x_tile(memory);
    const auto fetch = [&] {
        const int64_t base = row_base + int64_t(start) * width;
        const X* const nearest = x_all + base + (mine.step * width + mine.column(0));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int step = r * ACROSS + mine.step;
            const bool inside = group < groups && start + step < L;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                const bool there = inside && mine.within(v);
                const X* from = x_all;  // then soon after the wait, or in few registers
                if (there && IN_CLUSTER) from = nearest + (r * ACROSS * width + v * LANES * VECTOR);
                if (there && !IN_CLUSTER) from = x_all + base + int64_t(step) * width + mine.column(v);
                x_tile.fetch(r, v, from, there);
            }
        }
    };
    fetch();
    copy_async_commit();
    const Documents documents = {begin ? begin + int64_t(place.row) * L : nullptr, count0 ? count0[place.row] : 0};
    if constexpr (IN_CLUSTER) {
        float carried[2] = {};
        if (mean0 && threadIdx.x < GROUPS && place.group(threadIdx.x) < groups)
            carried[0] = mean0[place.chain(threadIdx.x)], carried[1] = var0[place.chain(threadIdx.x)];
        for (int i = threadIdx.x; EARLY && i < GROUPS * K; i += THREADS) {
            const int column = place.group(0) * K + i;
            affine[0][i] = column < groups * K ? 1.f + to_float(weight[column]) : 0.f;
            affine[1][i] = column < groups * K ? to_float(bias[column]) : 0.f;
        }
        if (threadIdx.x < GROUPS) before[0][threadIdx.x] = carried[0], before[1][threadIdx.x] = carried[1];
    }
    if constexpr (IN_CLUSTER)
        if (bos && threadIdx.x < 32) {  // every strip finds and writes the same
            int* to = begin + int64_t(place.row) * L;
            const uint8_t* marks = bos + int64_t(place.row) * L;
            const int from = min(start, L), end = min(from + TILE, L);
            const int before = find_begins(marks, 0, from, -1, [](int, int) {});
            find_begins(marks, from, end, before, [&](int t, int latest) { to[t] = latest; });
        }

    after_fetch([&] {
        const int64_t base = row_base + int64_t(start) * width;
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
        let_next_begin();
        inbox.ready();

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
            if (mean0 && IN_CLUSTER) state.a = before[0][g], state.b = before[1][g];
            if (mean0 && !IN_CLUSTER) state.a = mean0[chain], state.b = var0[chain];
            float unbias1[2], unbias2[2];
            if constexpr (IN_CLUSTER) {
                if constexpr (DECAYED) whole = exact_powers(whole, TILE, rate);
                inbox.send(g, whole);
#pragma unroll
                for (int i = 0; DECAYED && i < 2; ++i) {  // while the others' sums are on their way
                    const int t = start + 2 * lane + i;
                    const float n = t < L ? float(documents.count(t)) : 1.f;
                    unbias1[i] = correction(rate.log1, n), unbias2[i] = correction(rate.log2, n);
                }
                Run run = inbox.received<kind>(g);
                if constexpr (DECAYED) run = exact_powers(run, place.order * TILE, rate);
                state = compose<kind>(state, run);
            } else if (tiles > 1) {
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
                if constexpr (DECAYED && IN_CLUSTER) {
                    mean *= unbias1[i], var *= unbias2[i];
                } else if constexpr (DECAYED) {
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
            if constexpr (EARLY) {
                load(affine[0] + mine.group * K + mine.column(v), w);
                load(affine[1] + mine.group * K + mine.column(v), b);
            } else {
                load(weight + int64_t(group) * K + mine.column(v), w);
                load(bias + int64_t(group) * K + mine.column(v), b);
#pragma unroll
                for (float& value : w) value += 1.f;
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int step = r * ACROSS + mine.step;
                if (start + step >= L) continue;
                const float mean = first[mine.group][step], scale = second[mine.group][step];
                const Vector<X, VECTOR> x = x_tile(r, v);
                float y[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) y[i] = fmaf((x[i] - mean) * scale, w[i], b[i]);
                write(y_all + base + int64_t(step) * width + mine.column(v), y);
            }
        }
    });
}
