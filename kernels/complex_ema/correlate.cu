// The sums over time behind the parameter gradients, on tensor cores. With u_t = keep q u_{t-1} + x_t and v = du/dq:
//   along_u = sum_t dy_t u_t,   along_v = sum_t dy_t v_t = d along_u / dq
// In a chunk of 32 steps that the state a enters, with r_k = sum_t dy_t x_{t-k} and U = sum_t dy_t q^t (t in the chunk),
//   sum_t dy_t u_t = q a U + sum_k q^k r_k,
// so every number is carried with its derivative by q, and the r_k are summed over all chunks before q enters. The chunk
// of dy is stored backward in time: then U and the chunk's share of the state, sum_s x_s q^(31 - s), have one factor W.
#include "dual.cuh"
#include "tiles.cuh"

struct Shared {
    uint4 staged_x[2 * THREADS], staged_dy[2 * THREADS];  // the next tile on its way
    uint32_t x[CHANNELS * WORDS], dy[CHANNELS * WORDS];
    uint4 factor[CHANNELS][4][2][2][32];             // four modes, W or its derivative, half a chunk
    Dual decays[CHANNELS][LEVELS][MODES];
    Dual state[CHANNELS][MODES];                     // u, from zero, before the next steps
    Dual weight[CHANNELS][MODES];                    // the entering state's share of h before the next tile
    Dual before_last[CHANNELS][MODES];               // u before the chunk in which the sequence ends
    float2 entering[CHANNELS][MODES];                // the states before the next batch row
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

// As make_decays, with derivatives.
DEVICE void make_dual_decays(Dual (&decays)[LEVELS][MODES], float2 q) {
    const int lane = threadIdx.x % 32;
    double re = q.x, im = q.y, slope_re = 1, slope_im = 0;
    for (int level = FIRST_LEVEL; level < LEVELS; ++level) {
        if (level >= 0 && lane < MODES)
            decays[level][lane] = {make_float2(float(re), float(im)), make_float2(float(slope_re), float(slope_im))};
        const double twice_re = 2 * re, twice_im = 2 * im, next = twice_re * slope_re - twice_im * slope_im;
        slope_im = twice_re * slope_im + twice_im * slope_re, slope_re = next;
        const double square = re * re - im * im;
        im = twice_re * im, re = square;
    }
}

DEVICE Dual even(const float (&value)[4], const float (&slope)[4]) {
    return {make_float2(value[0], value[1]), make_float2(slope[0], slope[1])};
}
DEVICE Dual odd(const float (&value)[4], const float (&slope)[4]) {
    return {make_float2(value[2], value[3]), make_float2(slope[2], slope[3])};
}

// One warp: steps begin .. end - 1 of a tile from the state at `begin`, which becomes the state at the end of the tile.
// `sums` grows by a U and its derivative of modes 4 j + t, with CROSSES `passed` by the same of the entering state, still
// to be weighted by the pair of chunks; `lags` by x_s dy_t at row s and column 15 - t, both within their blocks: in
// lags[0] of the same block, in lags[1] with dy a block later. The state before `chunk` is kept unless that is -1.
template <bool WHOLE>
DEVICE void correlate_tile(Shared& shared, int warp, Dual (&sums)[4], Dual (&passed)[4], float (&lags)[2][2][4],
                           int begin, int end, bool crosses, int chunk) {
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
        const Dual over_chunk = shared.decays[warp][0][n];

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
        if (crosses) {
            const Dual pair = times_plus(over_chunk, odd(along, along_slope), even(along, along_slope));
            passed[j] = times_plus(shared.weight[warp][n], pair, passed[j]);
        }

        // States after each pair of chunks: a scan over the eight lanes of a mode.
        const Dual own = even(added, added_slope), state = shared.state[warp][n];
        Dual after = g == 0 ? times_plus(over_chunk, state, own) : own;
        after = times_plus(over_chunk, after, odd(added, added_slope));
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            const Dual before = shuffle_up(after, 4 << level);
            if (g >= 1 << level) after = times_plus(shared.decays[warp][1 + level][n], before, after);
        }
        Dual entering = shuffle_up(after, 4);
        if (g == 0) entering = state;
        __syncwarp();
        if (g == 7) shared.state[warp][n] = after;
        const Dual between = times_plus(over_chunk, entering, own);
        if constexpr (!WHOLE)
            if (g == chunk / 2 && begin <= chunk * CHUNK) shared.before_last[warp][n] = chunk % 2 ? between : entering;
        sums[j] = times_plus(entering, even(along, along_slope), sums[j]);
        sums[j] = times_plus(between, odd(along, along_slope), sums[j]);
    }
    __syncwarp();
}

// The entering state's share w of h after `chunks` chunks more; lane n: of mode n.
DEVICE Dual carried(Dual w, const Dual (&decays)[LEVELS][MODES], int chunks) {
    const int n = threadIdx.x % MODES;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
        if (chunks >> level & 1) w = times(decays[level][n], w);
    return chunks == ROWS ? times(decays[LEVELS - 1][n], times(decays[LEVELS - 1][n], w)) : w;
}

// The sum over the pairs of chunks of a tile, each weighted by its distance from the first: in lane t of mode n.
DEVICE Dual weighted_sum(Dual sum, const Dual (&decays)[LEVELS][MODES], int n) {
#pragma unroll
    for (int level = 0; level < 3; ++level) sum = times_plus(decays[1 + level][n], shuffle_down(sum, 4 << level), sum);
    return sum;
}

// x, dy (B, L, D); bos (B, L) or null; p, q, gamma (D, modes); first, dlast (or null) (B, D, modes); dp, dq, dgamma
// (gridDim.y, D, modes), to be summed over the first axis. May run beside the kernel before it: it reads nothing of it.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    correlate(const bf16* x, const bf16* dy, const uint8_t* bos, const float* p, const float2* q, const float2* gamma,
              const float2* first, const float2* dlast, float* dp, float2* dq, float2* dgamma, int batch, int length,
              int width, int modes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int channel = blockIdx.x * CHANNELS + warp;
    const bool active = channel < width, has_mode = active && lane < modes;
    const int64_t parameter = has_mode ? int64_t(channel) * modes + lane : 0;  // of mode `lane`
    auto state_of = [&](int row) { return int64_t(row) * width * modes + parameter; };
    auto to_next = [&] { return Dual{has_mode ? q[parameter] : make_float2(0.f, 0.f), make_float2(1.f, 0.f)}; };
    const float2 decay = to_next().value;

    const int tiles = (length + TILE - 1) / TILE;
    const Mover mover(length, width, false);
    uint32_t drops;
    auto fetch = [&](Item item) {
        mover.fetch(x, item, shared.staged_x);
        mover.fetch(dy, item, shared.staged_dy);
        if (item.tile == 0 && lane < MODES)
            copy_async_8(shared_address(&shared.entering[warp][lane]),
                         first && has_mode ? first + state_of(item.row) : q, first && has_mode);
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
    make_dual_decays(shared.decays[warp], decay);

    Dual sums[4], passed[4];
    float lags[2][2][4] = {};
    Leaving leaving = {};  // of mode `lane`
    bool crosses = false;  // the entering state still reaches the next step
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = passed[j] = zero_dual();

    while (item.row < batch) {
        copy_async_wait<0>();
        mover.put(shared.x, mover.fetched(shared.staged_x));
        mover.put_reversed(shared.dy, mover.fetched(shared.staged_dy));
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (lane == 0) shared.flags[warp] = flags;
        if (item.tile == 0) {
            crosses = first != nullptr;
            if (lane < MODES) {
                shared.state[warp][lane] = zero_dual();
                shared.weight[warp][lane] = constant(shared.entering[warp][lane]);
            }
        }
        __syncthreads();
        const Item now = item;
        item = item.next(tiles);
        if (item.row < batch) fetch(item);
        const int left = length - now.tile * TILE, chunks = left < TILE ? left / CHUNK : ROWS;
        if (active) {
            const int chunk = dlast && left < TILE ? chunks : -1;
            for (int begin = 0, end = next_flag(shared.flags, 0);; end = next_flag(shared.flags, begin + 1)) {
                if (begin == 0 && end == TILE && chunk < 0)
                    correlate_tile<true>(shared, warp, sums, passed, lags, begin, end, crosses, chunk);
                else if (end > begin)
                    correlate_tile<false>(shared, warp, sums, passed, lags, begin, end, crosses, chunk);
                if (end == TILE) break;
                begin = end, crosses = false;
                if (lane < MODES) shared.state[warp][lane] = zero_dual();
                __syncwarp();
            }
            Dual w = zero_dual();
            if (crosses) {
                w = carried(shared.weight[warp][lane % MODES], shared.decays[warp], chunks);
                __syncwarp();
                if (lane < MODES) shared.weight[warp][lane] = w;
                crosses = __any_sync(ALL, size_of(w) > NEGLIGIBLE);
            }
            if (dlast && left <= TILE) {
                Dual u = (left == TILE ? shared.state : shared.before_last)[warp][lane % MODES];
                const Dual by_one = to_next();
                for (int step = 0; step < left % CHUNK; ++step) {
                    const uint32_t pair = shared.x[place(warp, chunks * (CHUNK / 2) + step / 2)];
                    if (shared.flags[chunks] >> step & 1) u = zero_dual();
                    u = times_plus(by_one, u, constant(make_float2(step % 2 ? high_bf16(pair) : low_bf16(pair), 0.f)));
                    w = times(by_one, w);
                }
                if (has_mode) leaving.add(dlast[state_of(now.row)], u, p[parameter], w.slope);
            }
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

    Dual along = zero_dual(), across = zero_dual();  // lane n: of mode n
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Dual sum = sums[j];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum = plus(sum, shuffle_down(sum, lanes));
        const Dual weighted = weighted_sum(passed[j], shared.decays[warp], 4 * j + t);
        const Dual own = shuffle(sum, t), own_weighted = shuffle(weighted, t);
        if (g == j) along = own, across = own_weighted;
    }
    wait_for_previous();  // so that after this kernel that one has ended, too
    const Dual by_one = to_next();
    Dual local = zero_dual();
    for (int k = CHUNK - 1; k >= 0; --k) local = times_plus(by_one, local, constant({__shfl_sync(ALL, lag, k), 0.f}));
    if (has_mode) {
        const Gradients to = {dp, dq, dgamma};
        to.store(int64_t(blockIdx.y) * width * modes + parameter, p[parameter], gamma[parameter],
                 times_plus(by_one, along, local), times(by_one, across), leaving);
    }
}
