// The sums over time behind the parameter gradients, on tensor cores. With u_t = keep q u_{t-1} + x_t and v = du/dq:
//   along_u = sum_t dy_t u_t,   along_v = sum_t dy_t v_t = d along_u / dq
// In a chunk of 32 steps that the state a enters, with r_k = sum_t dy_t x_{t-k} and U = sum_t dy_t q^t (t in the chunk),
//   sum_t dy_t u_t = q a U + sum_k q^k r_k,
// so every number is carried with its derivative by q, and the r_k are summed over all chunks before q enters. The chunk
// of dy is stored backward in time: then U and the chunk's share of the state, sum_s x_s q^(31 - s), have one factor W.
#include "tiles.cuh"

// A number and its derivative with respect to q.
struct Dual {
    float2 value, slope;
};
DEVICE Dual times_plus(const Dual& a, const Dual& b, const Dual& c) {
    return {times_plus(a.value, b.value, c.value), times_plus(a.value, b.slope, times_plus(a.slope, b.value, c.slope))};
}
DEVICE Dual zero_dual() { return {make_float2(0.f, 0.f), make_float2(0.f, 0.f)}; }
DEVICE Dual shuffle_up(const Dual& a, int lanes) {
    return {make_float2(__shfl_up_sync(ALL, a.value.x, lanes), __shfl_up_sync(ALL, a.value.y, lanes)),
            make_float2(__shfl_up_sync(ALL, a.slope.x, lanes), __shfl_up_sync(ALL, a.slope.y, lanes))};
}
DEVICE Dual shuffle(const Dual& a, int lane) {
    return {make_float2(__shfl_sync(ALL, a.value.x, lane), __shfl_sync(ALL, a.value.y, lane)),
            make_float2(__shfl_sync(ALL, a.slope.x, lane), __shfl_sync(ALL, a.slope.y, lane))};
}

struct Shared {
    uint4 staged_x[2 * THREADS], staged_dy[2 * THREADS];  // the next tile on its way
    uint32_t x[CHANNELS * WORDS], dy[CHANNELS * WORDS];
    uint4 factor[CHANNELS][4][2][2][32];             // four modes, W or its derivative, half a chunk
    float2 decays[CHANNELS][2][LEVELS][MODES];       // and their derivatives
    uint32_t flags[TILE / 32];
};

// The factors q^(31 - s) and (31 - s) q^(30 - s) of modes 4 j .. 4 j + 3; `decay` is that of mode 4 j + g / 2.
DEVICE void make_factors(uint4 (&to)[2][2][32], float2 decay) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Powers q(decay);
    const float2 seven = times(times(q.four, q.two), q.one), nine = times(q.eight, q.one);
    // Of the last step, 2 t + 9, of the second half; `below` has an exponent less, and does not count where that is -1.
    float2 last = q.raise(make_float2(1.f, 0.f), 6 - 2 * t);
    float2 below = q.raise(q.one, t < 3 ? 4 - 2 * t : 0);
    if (g % 2) last = minus_i_times(last), below = minus_i_times(below);  // real parts are now the imaginary parts
#pragma unroll
    for (int block = 1; block >= 0; --block) {
        const float exponent = 6 - 2 * t + (1 - block) * BLOCK;
        const float one = real_of_product(last, q.one), eight = real_of_product(last, q.eight);
        to[0][block][lane] = factor(real_of_product(last, nine), eight, one, last.x);
        to[1][block][lane] = factor((exponent + 9.f) * eight, (exponent + 8.f) * real_of_product(last, seven),
                                    (exponent + 1.f) * last.x, exponent * below.x);
        below.x = real_of_product(last, times(q.eight, seven));
        last = times(last, q.sixteen);
    }
}

DEVICE void make_slopes(float2 (&slopes)[LEVELS][MODES], float2 q) {
    const int lane = threadIdx.x % 32;
    double re = q.x, im = q.y, slope_re = 1, slope_im = 0;
    for (int level = FIRST_LEVEL; level < LEVELS; ++level) {
        if (level >= 0 && lane < MODES) slopes[level][lane] = make_float2(float(slope_re), float(slope_im));
        const double next = 2 * (re * slope_re - im * slope_im);
        slope_im = 2 * (re * slope_im + im * slope_re), slope_re = next;
        const double square = re * re - im * im;
        im = 2 * re * im, re = square;
    }
}

DEVICE Dual even(const float (&value)[4], const float (&slope)[4]) {
    return {make_float2(value[0], value[1]), make_float2(slope[0], slope[1])};
}
DEVICE Dual odd(const float (&value)[4], const float (&slope)[4]) {
    return {make_float2(value[2], value[3]), make_float2(slope[2], slope[3])};
}

// One warp: steps begin .. end - 1 of a tile from the state at `begin`, which becomes the state at the end of the tile.
// `sums` grows by a U and its derivative of modes 4 j + t, `lags` by x_s dy_t at row s and column 15 - t, both within
// their blocks: in lags[0] of the same block, in lags[1] with dy a block later.
template <bool WHOLE>
DEVICE void correlate_tile(const Shared& shared, int warp, Dual (&state)[4], Dual (&sums)[4], float (&lags)[2][2][4],
                           int begin, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    uint32_t x[2][4], dy[2][4];  // in the order of memory, which for dy is backward in time
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        // x and dy side by side for the sums over time: rows are s and columns are dy's steps, chunks are summed.
        const int across = place(warp, lane % 8 * CHUNK + lane / 16 * (CHUNK / 2) + block * 8 + lane / 8 % 2 * 4);
        load_matrix_x4_transposed(x[block], shared_address(shared.x + across));
        load_matrix_x4_transposed(dy[block], shared_address(shared.dy + across));
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int first = (4 * t + i / 2) * CHUNK, step = block * BLOCK + i % 2 * 8 + g;
                const int back = CHUNK - 1 - step;
                x[block][i] &= within(first + step, first + 2 * CHUNK + step, begin, end);
                dy[block][i] &= within(first + back, first + 2 * CHUNK + back, begin, end);
            }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        mma_bf16(lags[0][part], x[0], dy[1][part], dy[1][2 + part]);
        mma_bf16(lags[1][part], x[0], dy[0][part], dy[0][2 + part]);
        mma_bf16(lags[0][part], x[1], dy[0][part], dy[0][2 + part]);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        const int along = place(warp, lane % 8 * CHUNK + lane / 8 % 2 * (CHUNK / 2) + block * 8 + lane / 16 * 4);
        load_matrix_x4(x[block], shared_address(shared.x + along));
        load_matrix_x4(dy[block], shared_address(shared.dy + along));
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int first = (2 * g + i % 2) * CHUNK, step = block * BLOCK + i / 2 * 8 + 2 * t;
                const int back = CHUNK - 1 - step;
                x[block][i] &= within(first + step, first + step + 1, begin, end);
                dy[block][i] &= within(first + back, first + back - 1, begin, end);
            }
    }

#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int n = 4 * j + t;
        auto decay = [&](int level) -> Dual {
            return {shared.decays[warp][0][level][n], shared.decays[warp][1][level][n]};
        };
        const Dual over_chunk = decay(0);

        float added[4] = {}, added_slope[4] = {}, along[4] = {}, along_slope[4] = {};
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            const uint4 input = shared.factor[warp][j][0][block][lane];
            const uint4 slope_input = shared.factor[warp][j][1][block][lane];
            product(added, x[block], input);
            product(added_slope, x[block], slope_input);
            product(along, dy[block], input);
            product(along_slope, dy[block], slope_input);
        }

        // States after each pair of chunks: a scan over the eight lanes of a mode.
        const Dual own = even(added, added_slope);
        Dual after = g == 0 ? times_plus(over_chunk, state[j], own) : own;
        after = times_plus(over_chunk, after, odd(added, added_slope));
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            const Dual before = shuffle_up(after, 4 << level);
            if (g >= 1 << level) after = times_plus(decay(1 + level), before, after);
        }
        Dual entering = shuffle_up(after, 4);
        if (g == 0) entering = state[j];
        state[j] = shuffle(after, 28 + t);
        sums[j] = times_plus(entering, even(along, along_slope), sums[j]);
        sums[j] = times_plus(times_plus(over_chunk, entering, own), odd(along, along_slope), sums[j]);
    }
}

// x, dy (B, L, D); bos (B, L) or null; q (D, modes); along_u, along_v (gridDim.y, D, modes), whose sums over the first axis
// are those over all batch rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    correlate(const bf16* x, const bf16* dy, const uint8_t* bos, const float2* q, float2* along_u, float2* along_v,
              int batch, int length, int width, int modes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int channel = blockIdx.x * CHANNELS + warp;
    const bool active = channel < width;
    auto own_decay = [&] {  // of mode `lane`
        return active && lane < modes ? q[int64_t(channel) * modes + lane] : make_float2(0.f, 0.f);
    };
    const float2 decay = own_decay();

    const int tiles = (length + TILE - 1) / TILE;
    const Mover mover(length, width, false);
    uint32_t drops;
    auto fetch = [&](Item item) {
        mover.fetch(x, item, shared.staged_x);
        mover.fetch(dy, item, shared.staged_dy);
        copy_async_commit();
        drops = drops_state(bos, length, item, false);
    };
    Item item = {int(blockIdx.y), 0};
    fetch(item);
    for (int j = 0; j < 4; ++j) {
        const int n = 4 * j + g / 2;
        const float2 q_n = make_float2(__shfl_sync(ALL, decay.x, n), __shfl_sync(ALL, decay.y, n));
        make_factors(shared.factor[warp][j], q_n);
    }
    make_decays(shared.decays[warp][0], decay);
    make_slopes(shared.decays[warp][1], decay);

    Dual state[4], sums[4];
    float lags[2][2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = zero_dual();

    while (item.row < batch) {
        copy_async_wait<0>();
        mover.put(shared.x, mover.fetched(shared.staged_x));
        mover.put_reversed(shared.dy, mover.fetched(shared.staged_dy));
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (lane == 0) shared.flags[warp] = flags;
        __syncthreads();
        if (item.tile == 0)
#pragma unroll
            for (int j = 0; j < 4; ++j) state[j] = zero_dual();
        item = item.next(tiles);
        if (item.row < batch) fetch(item);
        if (active)
            for (int begin = 0, end = next_flag(shared.flags, 0);; end = next_flag(shared.flags, begin + 1)) {
                if (begin == 0 && end == TILE)
                    correlate_tile<true>(shared, warp, state, sums, lags, begin, end);
                else if (end > begin)
                    correlate_tile<false>(shared, warp, state, sums, lags, begin, end);
                if (end == TILE) break;
                begin = end;
#pragma unroll
                for (int j = 0; j < 4; ++j) state[j] = zero_dual();
            }
        __syncthreads();
    }

    // Lane k: r_k, from row s and column 15 - (s + k) of the same block or 15 - (s + k - 16) of the next.
    float* by_steps = reinterpret_cast<float*>(shared.x + warp * WORDS);
    float lag = 0.f;
#pragma unroll
    for (int distance = 0; distance < 2; ++distance) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i)
            by_steps[(i % 4 / 2 * 8 + g) * 16 + i / 4 * 8 + 2 * t + i % 2] = lags[distance][i / 4][i % 4];
        __syncwarp();
        for (int s = 0; s < BLOCK; ++s) {
            const int column = 15 - (s + lane - distance * BLOCK);
            if (column >= 0 && column < 16) lag += by_steps[s * 16 + column];
        }
    }

    Dual total = zero_dual();  // lane n: mode n
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Dual sum = sums[j];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            sum.value.x += __shfl_xor_sync(ALL, sum.value.x, lanes), sum.value.y += __shfl_xor_sync(ALL, sum.value.y, lanes);
            sum.slope.x += __shfl_xor_sync(ALL, sum.slope.x, lanes), sum.slope.y += __shfl_xor_sync(ALL, sum.slope.y, lanes);
        }
        sum = shuffle(sum, t);
        if (lane / 4 == j) total = sum;
    }
    const Dual to_next = {own_decay(), make_float2(1.f, 0.f)};
    Dual local = zero_dual();
    for (int k = CHUNK - 1; k >= 0; --k)
        local = times_plus(to_next, local, Dual{make_float2(__shfl_sync(ALL, lag, k), 0.f), make_float2(0.f, 0.f)});
    total = times_plus(to_next, total, local);
    if (active && lane < modes) {
        const int64_t at = (int64_t(blockIdx.y) * width + channel) * modes + lane;
        along_u[at] = total.value;
        along_v[at] = total.slope;
    }
}
