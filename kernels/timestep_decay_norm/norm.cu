// Time-step norms (spec sections 1.1 and 1.2), forward and backward, one pass over memory each: a block holds a tile of
// steps and whole groups in shared memory, forms the moments, publishes what the tile does to the running pair, looks back
// for what arrives, and finishes the tile.
// Defines: DECAYED 0/1; INPUT, PARAMETER types of x and of the parameters; FEATURES a group; VECTOR elements an access; LANES
// lanes a group; VECTORS accesses a lane, group and step; GROUPS groups a block; ROWS steps a thread; THREADS a block.
#include "ptx.cuh"
#include "scan.cuh"
#include "vectors.cuh"

using X = INPUT;
using P = PARAMETER;
constexpr int K = FEATURES;
constexpr int SLOTS = LANES * GROUPS, ACROSS = THREADS / SLOTS, TILE = ACROSS * ROWS, WARPS = THREADS / 32;
constexpr bool WHOLE = LANES * VECTORS * VECTOR == K;
constexpr int FORWARD_BLOCKS = (VECTORS > 4 ? 512 : 1024) / THREADS, BACKWARD_BLOCKS = 768 / THREADS;  // a multiprocessor
static_assert(TILE <= 64 && THREADS % SLOTS == 0, "a warp scans two steps a lane");

struct Rates {
    float beta1, beta2, keep1, keep2, log1, log2, eps;  // keep = 1 - beta, log = ln beta
};

// Where a block works. `order` is its tile's place in the chain: time order forward, the reverse backward.
struct Place {
    int order, row, strip, groups, L, tiles;
    DEVICE Place(int L, int groups, int rows, int tiles) : groups(groups), L(L), tiles(tiles) {
        const int strips = (groups + GROUPS - 1) / GROUPS;
        strip = blockIdx.x % strips;
        row = blockIdx.x / strips % rows;
        order = blockIdx.x / strips / rows;
    }
    DEVICE int group(int g) const { return strip * GROUPS + g; }
    DEVICE int64_t chain(int g) const { return int64_t(row) * groups + group(g); }
    DEVICE uint64_t* slots(uint64_t* all, int g) const { return all + chain(g) * (tiles + (tiles - 1) / 32); }
};

// The thread's share of a tile: LANES lanes a group, GROUPS groups side by side, ACROSS steps at once.
struct Share {
    int lane, group, step;
    DEVICE Share() {
        lane = threadIdx.x % LANES;
        group = threadIdx.x / LANES % GROUPS;
        step = threadIdx.x / SLOTS;
    }
    DEVICE int column(int v) const { return (v * LANES + lane) * VECTOR; }
    DEVICE bool within(int v) const { return WHOLE || column(v) < K; }
};

// A tile in shared memory. Every thread reads back what it fetched itself, so no barrier is needed; registers instead
// would let fewer blocks live on a multiprocessor, and it is they that hide each other's waits.
constexpr int TILE_BYTES = ROWS * VECTORS * VECTOR * THREADS * int(sizeof(X));
struct Tile {
    X* own;
    DEVICE Tile(char* memory) : own(reinterpret_cast<X*>(memory) + threadIdx.x * VECTOR) {}
    DEVICE X* at(int r, int v) const { return own + (r * VECTORS + v) * THREADS * VECTOR; }
    DEVICE void fetch(int r, int v, const X* from, bool inside) const {
        if constexpr (VECTOR * sizeof(X) == 16) {
            copy_async_16(shared_address(at(r, v)), from, inside);
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) at(r, v)[i] = inside ? from[i] : from_float<X>(0.f);
        }
    }
    DEVICE Vector<X, VECTOR> operator()(int r, int v) const {
        Vector<X, VECTOR> values;
        values.read(at(r, v));
        return values;
    }
};
extern __shared__ __align__(16) char memory[];

// Documents of one row: begin[t] is the step of the latest BOS at or before t, -1 when there is none in this call.
struct Documents {
    const int* begin;
    int64_t carried;
    DEVICE int at(int t) const { return begin ? begin[t] : -1; }
    DEVICE int64_t count(int t) const {
        const int from = at(t);
        return from >= 0 ? t - from + 1 : carried + t + 1;
    }
    DEVICE bool starts(int t) const { return begin && begin[t] == t; }
};

template <class Use> DEVICE void for_each_group(const Place& place, Use use) {
    for (int g = threadIdx.x / 32; g < GROUPS; g += WARPS)
        if (place.group(g) < place.groups) use(g);
}

DEVICE float correction(float log_beta, float n) { return -1.f / expm1f(n * log_beta); }

// The powers of a run without a BOS, straight from the logarithm: products of rounded betas drift.
DEVICE Run exact_powers(Run run, float steps, const Rates& rate) {
    if (run.p != 0.f) run.p = expf(steps * rate.log1);
    if (run.q != 0.f) run.q = expf(steps * rate.log2);
    return run;
}

extern "C" __global__ void __launch_bounds__(1024) prepare(const uint8_t* bos, int* begin, uint64_t* slots, int64_t count,
                                                           int rows, int L) {
    if (int(blockIdx.x) >= rows) {
        const int64_t stride = int64_t(gridDim.x - rows) * 1024;
        for (int64_t i = int64_t(blockIdx.x - rows) * 1024 + threadIdx.x; i < count; i += stride) slots[i] = ~0ull;
        return;
    }
    __shared__ int latest[32];
    constexpr uint32_t all = 0xffffffffu;
    bos += int64_t(blockIdx.x) * L, begin += int64_t(blockIdx.x) * L;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, span = (L + 1023) / 1024 * 32;
    const int from = min(warp * span, L), to = min(from + span, L);
    int last = -1;
#pragma unroll 8
    for (int t = from; t < to; t += 32) {
        const uint32_t marks = __ballot_sync(all, t + lane < to && bos[t + lane]);
        if (marks) last = t + 31 - __clz(marks);
    }
    if (lane == 0) latest[warp] = last;
    __syncthreads();
    int before = -1;
    for (int w = 0; w < warp; ++w) before = max(before, latest[w]);
#pragma unroll 8
    for (int t = from; t < to; t += 32) {
        const uint32_t marks = __ballot_sync(all, t + lane < to && bos[t + lane]), upto = marks & (all >> (31 - lane));
        if (t + lane < to) begin[t + lane] = upto ? t + 31 - __clz(upto) : before;
        if (marks) before = t + 31 - __clz(marks);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(const X* x_all, const P* weight, const P* bias, X* y_all, const int* begin, const int64_t* count0,
            const float* mean0, const float* var0, int64_t* count_out, float* mean_out, float* var_out, float* saved,
            uint64_t* all_slots, int rows, int L, int groups, int tiles, float beta1, float beta2, float keep1,
            float keep2, float log1, float log2, float eps) {
    constexpr Kind kind = DECAYED ? Decay : Merge;
    __shared__ float first[GROUPS][TILE], second[GROUPS][TILE];
    const Rates rate = {beta1, beta2, keep1, keep2, log1, log2, eps};
    const Place place(L, groups, rows, tiles);
    const Share mine;
    const int start = place.order * TILE, group = place.group(mine.group);
    const int64_t base = (int64_t(place.row) * L + start) * groups * K + int64_t(group) * K;

    const Tile x_tile(memory);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int step = r * ACROSS + mine.step;
        const bool inside = group < groups && start + step < L;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const bool there = inside && mine.within(v);
            const X* from = there ? x_all + base + int64_t(step) * groups * K + mine.column(v) : x_all;
            x_tile.fetch(r, v, from, there);
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
                    own[i] = {starts ? 0.f : rate.beta1, starts ? 0.f : rate.beta2, rate.keep1 * mean, rate.keep2 * var};
                else
                    own[i] = {1.f, starts ? 1.f : 0.f, mean, var};
            }
        }
        own[1] = compose<kind>(own[0], own[1]);
        const Run sum = warp_scan<kind>(own[1]);
        Run whole = from_lane(sum, 31), before = from_lane(sum, (lane - 1) & 31);
        if (lane == 0) before = identity<kind>();

        const int64_t chain = place.chain(g);
        Run state = {DECAYED ? 0.f : float(documents.carried), 0.f, mean0 ? mean0[chain] : 0.f, var0 ? var0[chain] : 0.f};
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
            const Run now = compose<kind>(state, compose<kind>(before, own[i]));
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
            write(y_all + base + int64_t(step) * groups * K + mine.column(v), y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    backward(const X* x_all, const X* dy_all, const P* weight, const float* saved, const int* begin, const int64_t* count0,
             const float* dmean_out, const float* dvar_out, X* dx_all, float* partial, float* dmean0, float* dvar0,
             uint64_t* all_slots, int rows, int L, int groups, int tiles, float beta1, float beta2, float keep1,
             float keep2, float log1, float log2) {
    constexpr Kind kind = DECAYED ? Decay : Drift;
    __shared__ float center[GROUPS][TILE], scale[GROUPS][TILE];      // of the normalisation
    __shared__ float own_mean[GROUPS][TILE];                        // of the step's group
    __shared__ float along[GROUPS][TILE], across[GROUPS][TILE];     // sum dy w, sum dy w (x - center); then the two
                                                                    // coefficients of dx
    // The last use of the tile is before that of the exchange when a thread holds one access a step.
    float* exchange = reinterpret_cast<float*>(memory + (VECTORS == 1 ? 0 : 2 * TILE_BYTES));
    const Rates rate = {beta1, beta2, keep1, keep2, log1, log2, 0.f};
    const Place place(L, groups, rows, tiles);
    const Share mine;
    const int tile = tiles - 1 - place.order, start = tile * TILE, group = place.group(mine.group);
    const int64_t base = (int64_t(place.row) * L + start) * groups * K + int64_t(group) * K;
    const int64_t pairs = int64_t(rows) * groups * L;

    const Tile x_tile(memory), dy_tile(memory + TILE_BYTES);
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

    // Backward in time: lane 0 holds the last two steps of the tile. a and b are the gradients of the mean's and the
    // variance's carry (Decay), or of the variance and the mean over the count (Drift).
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
        Run state = DECAYED ? Run{0.f, 0.f, dmean_out[chain], dvar_out[chain]}
                            : Run{0.f, 0.f, dvar_out[chain] * last, dmean_out[chain] * last};
        if (tiles > 1) {
            uint64_t* slots = place.slots(all_slots, g);
            if (lane == 0) publish(slots + place.order, whole);
            // The last tile of time may be short: it is the first of the chain, so every power counts its true steps.
            const auto steps = [&](int done) { return float(max(0, L - (tiles - done) * TILE)); };
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
                    return DECAYED ? exact_powers(run, steps(place.order) - steps(place.order - before), rate) : run;
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
        float w[VECTOR] = {}, dweight[VECTOR] = {}, dbias[VECTOR] = {};
        if (group < groups && mine.within(v)) {
            load(weight + int64_t(group) * K + mine.column(v), w);
#pragma unroll
            for (float& value : w) value += 1.f;
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
                    dx[i] = fmaf(g * w[i], rs, fmaf(stretch, value - at, shift));
                    dweight[i] = fmaf(g, (value - mean) * rs, dweight[i]);
                    dbias[i] += g;
                }
                write(dx_all + base + int64_t(step) * groups * K + mine.column(v), dx);
            }
        }
        __syncthreads();
        write(exchange + threadIdx.x * VECTOR, dweight);
        write(exchange + (THREADS + threadIdx.x) * VECTOR, dbias);
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

extern "C" __global__ void __launch_bounds__(1024) parameters(const float* partial, P* dweight, P* dbias, int N, int D) {
    sum_partials(partial, dweight, dbias, N, D);
}
