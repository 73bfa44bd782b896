#pragma once
#include "tile.cuh"

// x, dy, dx (rows, L, groups K); saved and begin as the forward left them; dmean_out, dvar_out (rows, groups) or null,
// of the state after the last step; partial (rows tiles, 2, groups K), gradients of weight and bias; dmean0, dvar0
// (rows, groups) or null.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    backward(const X* x_all, const X* dy_all, const P* weight, const float* saved, const int* begin,
             const int64_t* count0, const float* dmean_out, const float* dvar_out, X* dx_all, float* partial,
             float* dmean0, float* dvar0, uint64_t* all_slots, int rows, int L, int groups, int tiles, float beta1,
             float beta2, float keep1, float keep2, float log1, float log2) {
    constexpr Kind kind = DECAYED ? Decay : Drift;
    __shared__ float center[GROUPS][TILE], scale[GROUPS][TILE];  // of the normalisation
    // Of a step: the mean of its group; sum dy w and sum dy w (x - center), then the two coefficients of dx.
    __shared__ float sums_of_steps[3][GROUPS][TILE];
    auto &own_mean = sums_of_steps[0], &along = sums_of_steps[1], &across = sums_of_steps[2];
    // The last use of the tile is before that of the exchange when a thread holds one access a step.
    float* exchange = reinterpret_cast<float*>(memory + (VECTORS == 1 ? 0 : 2 * TILE_BYTES));
    const Rates rate = {beta1, beta2, keep1, keep2, log1, log2, 0.f};
    const Place place(L, groups, rows, tiles);
    const Share mine;
    const int tile = tiles - 1 - place.order, start = tile * TILE, group = place.group(mine.group);
    const int64_t base = (int64_t(place.row) * L + start) * groups * K + int64_t(group) * K;
    const int64_t pairs = int64_t(rows) * groups * L;

    const SharedTile x_tile(memory), dy_tile(memory + TILE_BYTES);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int step = r * ACROSS + mine.step;
        const bool inside = group < groups && start + step < L;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const bool there = inside && mine.within(v);
            const int64_t at = there ? base + int64_t(step) * groups * K + mine.column(v) : 0;
            x_tile.fetch(r, v, x_all + at, there), dy_tile.fetch(r, v, dy_all + at, there);
        }
    }
    copy_async_commit();
    for (int i = threadIdx.x; i < GROUPS * TILE; i += THREADS) {
        const int g = i / TILE, s = i % TILE;
        const bool inside = place.group(g) < groups && start + s < L;
        const int64_t at = place.chain(g) * L + start + s;
        center[g][s] = inside ? saved[at] : 0.f;
        scale[g][s] = inside ? saved[pairs + at] : 0.f;
    }
    const Documents documents = {begin ? begin + int64_t(place.row) * L : nullptr, count0 ? count0[place.row] : 0};
    __syncthreads();
    copy_async_wait<0>();

    float sums[3][ROWS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        float w[VECTOR] = {};
        if (group < groups && mine.within(v)) load(weight + int64_t(group) * K + mine.column(v), w);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float mean = center[mine.group][r * ACROSS + mine.step];
            const Vector<X, VECTOR> x = x_tile(r, v), dy = dy_tile(r, v);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float g = fmaf(dy[i], w[i], dy[i]);
                sums[0][r] += x[i], sums[1][r] += g, sums[2][r] = fmaf(g, x[i] - mean, sums[2][r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float mean = warp_sum<LANES>(sums[0][r]) * (1.f / K);
        const float shift = warp_sum<LANES>(sums[1][r]), stretch = warp_sum<LANES>(sums[2][r]);
        if (mine.lane == 0) {
            const int step = r * ACROSS + mine.step;
            own_mean[mine.group][step] = mean, along[mine.group][step] = shift, across[mine.group][step] = stretch;
        }
    }
    __syncthreads();

    // Backward in time: lane 0 holds the last two steps of the tile. a and b are the gradients of the mean's and
    // the variance's carry (Decay), or of the variance and the mean over the count (Drift).
    for_each_group(place, [&](int g) {
        const int lane = threadIdx.x % 32;
        const int64_t chain = place.chain(g);
        Run own[2];
        float to_mean[2], to_var[2];  // what the step's own output adds to the two gradients
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = TILE - 1 - 2 * lane - i, t = start + s;
            own[i] = identity<kind>();
            to_mean[i] = to_var[i] = 0.f;
            if (s >= 0 && t < L) {
                const bool starts = documents.starts(t);
                const float n = float(documents.count(t)), r = scale[g][s];
                to_mean[i] = -r * along[g][s], to_var[i] = -0.5f * r * r * r * across[g][s];
                if constexpr (DECAYED) {
                    to_mean[i] *= correction(rate.log1, n), to_var[i] *= correction(rate.log2, n);
                    if (starts)
                        own[i] = {0.f, 0.f, 0.f, 0.f};
                    else
                        own[i] = {rate.beta1, rate.beta2, rate.beta1 * to_mean[i], rate.beta2 * to_var[i]};
                } else {
                    to_mean[i] /= n, to_var[i] /= n;
                    const float drift = n > 1.f ? (own_mean[g][s] - center[g][s]) / (n - 1.f) : 0.f;
                    if (n <= 1.f)
                        own[i] = {0.f, 1.f, 0.f, 0.f};
                    else
                        own[i] = {drift, 0.f, to_var[i], to_mean[i] - 2.f * to_var[i] * drift};
                }
            }
        }
        const Run pair = compose<kind>(own[0], own[1]);
        const Run sum = warp_scan<kind>(pair);
        Run whole = from_lane(sum, 31), before = from_lane(sum, (lane - 1) & 31);
        if (lane == 0) before = identity<kind>();

        const float last = 1.f / float(documents.count(L - 1));
        const float to_last_mean = dmean_out ? dmean_out[chain] : 0.f;
        const float to_last_var = dvar_out ? dvar_out[chain] : 0.f;
        Run state = DECAYED ? Run{0.f, 0.f, to_last_mean, to_last_var}
                            : Run{0.f, 0.f, to_last_var * last, to_last_mean * last};
        // The last tile of time may be short: it is the first of the chain, so every power counts its true steps.
        const auto steps = [&](int done) { return float(max(0, L - (tiles - done) * TILE)); };
        if (tiles > 1) {
            uint64_t* slots = place.slots(all_slots, g);
            if (lane == 0) publish(slots + place.order, whole);
            if constexpr (DECAYED) whole = exact_powers(whole, steps(place.order + 1) - steps(place.order), rate);
            state = arriving<kind>(
                slots, place.order, tiles, state,
                [&](int order, float a, float b) -> Run {
                    const int from = (tiles - 1 - order) * TILE, end = min(from + TILE, L) - 1;
                    const bool forgets = documents.at(end) >= from;
                    if constexpr (DECAYED)
                        return exact_powers({forgets ? 0.f : 1.f, forgets ? 0.f : 1.f, a, b},
                                            steps(order + 1) - steps(order), rate);
                    else
                        return {saved[chain * L + end] - saved[chain * L + from - 1], forgets ? 1.f : 0.f, a, b};
                },
                [&](int, float a, float b) -> Run { return {0.f, 0.f, a, b}; },
                [&](const Run& run, int before) {
                    const float count = steps(place.order) - steps(place.order - before);
                    return DECAYED ? exact_powers(run, count, rate) : run;
                });
            if (lane == 0 && place.order % 32 == 31 && place.order < tiles - 1)
                publish(slots + tiles + place.order / 32, compose<kind>(state, whole));
        }

        Run here = compose<kind>(state, before);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = TILE - 1 - 2 * lane - i, t = start + s;
            if (s < 0 || t >= L) continue;
            if constexpr (DECAYED) {
                along[g][s] = rate.keep1 * (here.a + to_mean[i]) * (1.f / K);
                across[g][s] = rate.keep2 * (here.b + to_var[i]) * (2.f / K);
            } else {
                const float dvar = 2.f * (here.a + to_var[i]);
                along[g][s] = fmaf(dvar, own_mean[g][s] - center[g][s], here.b + to_mean[i]) * (1.f / K);
                across[g][s] = dvar * (1.f / K);
            }
            here = compose<kind>(here, own[i]);
            if (t == 0 && dmean0) {
                const float n = float(documents.carried);
                dmean0[chain] = DECAYED ? here.a : documents.starts(0) ? 0.f : n * here.b;
                dvar0[chain] = DECAYED ? here.b : documents.starts(0) ? 0.f : n * here.a;
            }
        }
    });
    __syncthreads();

#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        float gain[VECTOR] = {}, dweight[VECTOR] = {}, dbias[VECTOR] = {};
        if (group < groups && mine.within(v)) {
            load(weight + int64_t(group) * K + mine.column(v), gain);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) gain[i] += 1.f;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int step = r * ACROSS + mine.step;
                if (start + step >= L) continue;
                const float mean = center[mine.group][step], rs = scale[mine.group][step];
                const float at = own_mean[mine.group][step], shift = along[mine.group][step];
                const float stretch = across[mine.group][step];
                const Vector<X, VECTOR> x = x_tile(r, v), dy = dy_tile(r, v);
                float dx[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float value = x[i], g = dy[i];
                    dx[i] = fmaf(g * gain[i], rs, fmaf(stretch, value - at, shift));
                    dweight[i] = fmaf(g, (value - mean) * rs, dweight[i]);
                    dbias[i] += g;
                }
                write_global(dx_all + base + int64_t(step) * groups * K + mine.column(v), dx);
            }
        }
        __syncthreads();
        store(exchange + threadIdx.x * VECTOR, dweight);
        store(exchange + (THREADS + threadIdx.x) * VECTOR, dbias);
        __syncthreads();
        for (int c = threadIdx.x; c < 2 * SLOTS * VECTOR; c += THREADS) {
            const int which = c / (SLOTS * VECTOR), at = c % (SLOTS * VECTOR), slot = at / VECTOR;
            const int g = place.group(slot / LANES), column = (v * LANES + slot % LANES) * VECTOR + at % VECTOR;
            if (g >= groups || column >= K) continue;
            float sum = 0.f;
#pragma unroll
            for (int a = 0; a < ACROSS; ++a) sum += exchange[(which * THREADS + a * SLOTS) * VECTOR + at];
            partial[((int64_t(place.row) * tiles + tile) * 2 + which) * groups * K + int64_t(g) * K + column] = sum;
        }
    }
}
