// The sums over time behind the parameter gradients, on tensor cores. With u_t = keep q u_{t-1} + x_t and v = du/dq:
//   along_u = sum_t dy_t u_t,   along_v = sum_t dy_t v_t = d along_u / dq
// In a block of 16 steps that the state a enters, with r_k = sum_t dy_t x_{t-k} and U = sum_t dy_t q^t (t in the block),
//   sum_t dy_t u_t = q a U + sum_k q^k r_k,
// so every number is carried with its derivative by q, and the r_k are summed over all blocks before q enters. The block
// of dy is stored backward in time: then U and the block's share of the state, sum_s x_s q^(15 - s), have one factor W.
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
    uint32_t x[CHANNELS * WORDS], dy[CHANNELS * WORDS];
    uint4 factor[CHANNELS][4][2][32];                // W and its derivative, four modes a product
    float2 decays[CHANNELS][2][LEVELS][MODES];       // and their derivatives
    uint32_t flags[TILE / 32];
};

// The factors q^(15 - s) and (15 - s) q^(14 - s) of modes 4 j .. 4 j + 3; `q` is that of mode 4 j + g / 2.
DEVICE void make_factors(uint4 (&to)[2][32], float2 q) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float value[4], slope[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int exponent = 15 - (2 * t + i % 2 + i / 2 * 8);
        const float2 power_below = power(q, exponent > 0 ? exponent - 1 : 0);
        const float2 full = exponent > 0 ? times(power_below, q) : power_below;
        value[i] = g % 2 ? full.y : full.x;
        slope[i] = exponent * (g % 2 ? power_below.y : power_below.x);
    }
    to[0][lane] = factor(value[0], value[1], value[2], value[3]);
    to[1][lane] = factor(slope[0], slope[1], slope[2], slope[3]);
}

DEVICE void make_slopes(float2 (&slopes)[LEVELS][MODES], float2 q) {
    const int lane = threadIdx.x % 32;
    double re = q.x, im = q.y, slope_re = 1, slope_im = 0;
    for (int level = -4; level < LEVELS; ++level) {
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
// `sums` grows by a U and its derivative of modes 4 j + t, `lags` by x_s dy_{15 - column} at row s.
template <bool WHOLE>
DEVICE void correlate_tile(const Shared& shared, int warp, Dual (&state)[4], Dual (&sums)[4], float (&lags)[2][4],
                           int begin, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    uint32_t x[2][4], dy[2][4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        // x and dy side by side for the sums over time: rows are s and columns are dy's steps, chunks are summed.
        const int across = place(warp, lane % 8 * CHUNK + lane / 16 * (CHUNK / 2) + block * 8 + lane / 8 % 2 * 4);
        load_matrix_x4_transposed(x[block], shared_address(shared.x + across));
        load_matrix_x4_transposed(dy[block], shared_address(shared.dy + across));
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int first = (4 * t + i / 2) * CHUNK + block * BLOCK, row = i % 2 * 8 + g;
                x[block][i] &= within(first + row, first + 2 * CHUNK + row, begin, end);
                dy[block][i] &= within(first + 15 - row, first + 2 * CHUNK + 15 - row, begin, end);
            }
        mma_bf16(lags[0], x[block], dy[block][0], dy[block][2]);
        mma_bf16(lags[1], x[block], dy[block][1], dy[block][3]);

        const int along = place(warp, lane % 8 * CHUNK + lane / 8 % 2 * (CHUNK / 2) + block * 8 + lane / 16 * 4);
        load_matrix_x4(x[block], shared_address(shared.x + along));
        load_matrix_x4(dy[block], shared_address(shared.dy + along));
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int first = 2 * g * CHUNK + i % 2 * CHUNK + block * BLOCK, column = i / 2 * 8 + 2 * t;
                x[block][i] &= within(first + column, first + column + 1, begin, end);
                dy[block][i] &= within(first + 15 - column, first + 14 - column, begin, end);
            }
    }

#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int n = 4 * j + t;
        auto decay = [&](int level) -> Dual {
            return {shared.decays[warp][0][level][n], shared.decays[warp][1][level][n]};
        };
        const uint4 input = shared.factor[warp][j][0][lane], slope_input = shared.factor[warp][j][1][lane];
        const Dual over_block = decay(0), over_chunk = decay(1);

        float first[4] = {}, first_slope[4] = {};  // what block 0 adds to the state
        product(first, x[0], input);
        product(first_slope, x[0], slope_input);
        const Dual carried_even = times_plus(over_block, even(first, first_slope), zero_dual());
        const Dual carried_odd = times_plus(over_block, odd(first, first_slope), zero_dual());
        float sum[4] = {carried_even.value.x, carried_even.value.y, carried_odd.value.x, carried_odd.value.y};
        float sum_slope[4] = {carried_even.slope.x, carried_even.slope.y, carried_odd.slope.x, carried_odd.slope.y};
        product(sum, x[1], input);
        product(sum_slope, x[1], slope_input);

        // States after each pair of chunks: a scan over the eight lanes of a mode.
        const Dual own = even(sum, sum_slope);
        Dual after = g == 0 ? times_plus(over_chunk, state[j], own) : own;
        after = times_plus(over_chunk, after, odd(sum, sum_slope));
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            const Dual before = shuffle_up(after, 4 << level);
            if (g >= 1 << level) after = times_plus(decay(2 + level), before, after);
        }
        Dual entering_even = shuffle_up(after, 4);
        if (g == 0) entering_even = state[j];
        state[j] = shuffle(after, 28 + t);
        Dual entering_odd = times_plus(over_chunk, entering_even, own);

#pragma unroll
        for (int block = 0; block < 2; ++block) {
            float along[4] = {}, along_slope[4] = {};
            product(along, dy[block], input);
            product(along_slope, dy[block], slope_input);
            sums[j] = times_plus(entering_even, even(along, along_slope), sums[j]);
            sums[j] = times_plus(entering_odd, odd(along, along_slope), sums[j]);
            if (block == 0) {
                entering_even = times_plus(over_block, entering_even, even(first, first_slope));
                entering_odd = times_plus(over_block, entering_odd, odd(first, first_slope));
            }
        }
    }
}

// x, dy (B, L, D); bos (B, L) or null; q (D, modes); along_u, along_v (B, D, modes).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    correlate(const bf16* x, const bf16* dy, const uint8_t* bos, const float2* q, float2* along_u, float2* along_v,
              int length, int width, int modes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int channel = blockIdx.x * CHANNELS + warp;
    const bool active = channel < width;
    auto decay = [&](int n) {
        return active && n < modes ? q[int64_t(channel) * modes + n] : make_float2(0.f, 0.f);
    };

    const Mover mover(length, width, false);
    Pair x_pair = mover.load(x, 0), dy_pair = mover.load(dy, 0);
    bool drops = drops_state(bos, length, 0, false);
    for (int j = 0; j < 4; ++j) make_factors(shared.factor[warp][j], decay(4 * j + g / 2));
    make_decays(shared.decays[warp][0], decay(lane));
    make_slopes(shared.decays[warp][1], decay(lane));

    Dual state[4], sums[4];
    float lags[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) state[j] = sums[j] = zero_dual();

    const int tiles = (length + TILE - 1) / TILE;
    for (int tile = 0; tile < tiles; ++tile) {
        mover.put(shared.x, x_pair);
        mover.put_reversed(shared.dy, dy_pair);
        const uint32_t flags = __ballot_sync(ALL, drops);
        if (lane == 0) shared.flags[warp] = flags;
        __syncthreads();
        if (tile + 1 < tiles) {
            x_pair = mover.load(x, tile + 1);
            dy_pair = mover.load(dy, tile + 1);
            drops = drops_state(bos, length, tile + 1, false);
        }
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

    float* by_steps = reinterpret_cast<float*>(shared.x + warp * WORDS);  // [s][15 - t]
#pragma unroll
    for (int i = 0; i < 8; ++i) by_steps[(i % 4 / 2 * 8 + g) * 16 + i / 4 * 8 + 2 * t + i % 2] = lags[i / 4][i % 4];
    __syncwarp();
    float lag = 0.f;  // lane k: r_k
    for (int s = 0; s + lane < BLOCK; ++s) lag += by_steps[s * 16 + 15 - (s + lane)];

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
    const Dual own_decay = {decay(lane), make_float2(1.f, 0.f)};
    Dual local = zero_dual();
    for (int k = BLOCK - 1; k >= 0; --k)
        local = times_plus(own_decay, local, Dual{make_float2(__shfl_sync(ALL, lag, k), 0.f), make_float2(0.f, 0.f)});
    total = times_plus(own_decay, total, local);
    if (active && lane < modes) {
        const int64_t at = (int64_t(blockIdx.y) * width + channel) * modes + lane;
        along_u[at] = total.value;
        along_v[at] = total.slope;
    }
}
