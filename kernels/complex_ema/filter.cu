// The moving average on tensor cores: bfloat16, D a multiple of 8, at most 16 modes, documents, both directions of time.
// Let a be the state entering a chunk of 32 steps. Then, with W, K, C made of the powers of q,
//   state leaving the chunk   q^32 a + x W      outputs of the chunk   x + x K + a C
// A state is h before its decay (forward: given as h0, returned as h) or after it (backward in time: given as dh,
// returned as dh0), which moves the exponents by one.
#include "tiles.cuh"

struct Shared {
    uint4 staged[2 * THREADS];                   // the next tile on its way
    uint32_t x[CHANNELS * WORDS];                // the tile, turned into the outputs in place
    uint4 output[CHANNELS][4][2][32];            // C: four modes, half a chunk
    uint4 taps[CHANNELS][2][2][32];              // K: from its own or the other half of the chunk, 8 steps of it
    float2 decays[CHANNELS][LEVELS][MODES];
    uint32_t flags[TILE / 32];
};

// The parameters of one channel.
struct Channel {
    const float* p;
    const float2 *q, *gamma;
    int modes;

    DEVICE float2 decay(int n) const { return n < modes ? q[n] : make_float2(0.f, 0.f); }
    DEVICE float2 input(int n, bool reverse) const {
        return n >= modes ? make_float2(0.f, 0.f) : reverse ? gamma[n] : make_float2(p[n], 0.f);
    }
    DEVICE float2 output(int n, bool reverse) const { return input(n, !reverse); }
};

// W for modes 4 j .. 4 j + 3 and half a chunk: input q^(31 - s), one exponent more backward in time.
template <bool REVERSE> DEVICE uint4 input_factor(const Channel& channel, int j, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, n = 4 * j + g / 2;
    const float2 q = channel.decay(n);
    const int exponent = CHUNK - 1 - (block * BLOCK + 2 * t + 9);  // of the last of the four steps s
    const float2 last = times(times(channel.input(n, REVERSE), power(q, REVERSE)), power(q, exponent));
    const float2 q8 = power(q, 8), last_q = times(last, q);
    const float2 first = times(last_q, q8), second = times(last, q8);
    return g % 2 ? factor(first.y, second.y, last_q.y, last.y) : factor(first.x, second.x, last_q.x, last.x);
}

// C for modes 4 j .. 4 j + 3 and half a chunk, in tf32: output q^(step + 1), one exponent less backward in time. Only
// outputs, which are rounded to bfloat16, depend on it.
template <bool REVERSE> DEVICE uint4 output_factor(const Channel& channel, int j, int block) {
    const int lane = threadIdx.x % 32, n = 4 * j + lane % 4;
    const float2 q = channel.decay(n);
    const float2 a = times(channel.output(n, REVERSE), power(q, block * BLOCK + lane / 4 + 1 - REVERSE));
    const float2 b = times(a, power(q, 8));
    return make_uint4(to_tf32(a.x), to_tf32(-a.y), to_tf32(b.x), to_tf32(-b.y));
}

// Tap tau = Re sum_n gamma p q^tau in lane tau. Lane n loads mode n: one wait for memory instead of one a mode.
DEVICE float make_tap(const Channel& channel) {
    const int lane = threadIdx.x % 32;
    const float2 q = channel.decay(lane), gain = times(channel.input(lane, false), channel.input(lane, true));
    float tap = 0.f;
#pragma unroll
    for (int n = 0; n < MODES; ++n) {
        const float2 mode = make_float2(__shfl_sync(ALL, q.x, n), __shfl_sync(ALL, q.y, n));
        const float2 scale = make_float2(__shfl_sync(ALL, gain.x, n), __shfl_sync(ALL, gain.y, n));
        tap += times(scale, power(mode, lane)).x;
    }
    return tap;
}

// K for steps 8 part .. 8 part + 7 of a block, from the steps s of the block `distance` before: tap (step - s), s <= step.
DEVICE uint4 tap_factor(float tap, int distance, int part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int lag = distance * BLOCK + 8 * part + g - (2 * t + i % 2 + i / 2 * 8);
        const float value = __shfl_sync(ALL, tap, lag & 31);
        values[i] = lag >= 0 ? value : 0.f;
    }
    return factor(values[0], values[1], values[2], values[3]);
}

// One warp: the outputs of steps begin .. end - 1 of a tile in place, from the state at `begin`, which becomes the
// state at the end of the tile. The steps outside count as zero. Lane (g, t) keeps modes 4 j + t.
template <bool WHOLE>
DEVICE void filter_tile(uint32_t* x, int warp, const uint4 (&input)[2][4], const Shared& shared, float2 (&state)[4],
                        int begin, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    uint32_t a[2][4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        const int word = lane % 8 * CHUNK + lane / 8 % 2 * (CHUNK / 2) + block * 8 + lane / 16 * 4;
        load_matrix_x4(a[block], shared_address(x + place(warp, word)));
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int step = 2 * g * CHUNK + i % 2 * CHUNK + block * BLOCK + i / 2 * 8 + 2 * t;
                a[block][i] &= within(step, step + 1, begin, end);
            }
    }
    if constexpr (!WHOLE) __syncwarp();

    float entering[4][4];  // the states that enter the two chunks of a lane
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 over_chunk = shared.decays[warp][0][4 * j + t];
        float sum[4] = {};  // what a chunk adds
        product(sum, a[0], input[0][j]);
        product(sum, a[1], input[1][j]);

        // States after each pair of chunks: a scan over the eight lanes of a mode.
        const float2 own = make_float2(sum[0], sum[1]);
        float2 after = g == 0 ? times_plus(over_chunk, state[j], own) : own;
        after = times_plus(over_chunk, after, make_float2(sum[2], sum[3]));
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            const float2 before = make_float2(__shfl_up_sync(ALL, after.x, 4 << level),
                                              __shfl_up_sync(ALL, after.y, 4 << level));
            if (g >= 1 << level) after = times_plus(shared.decays[warp][1 + level][4 * j + t], before, after);
        }
        float2 before = make_float2(__shfl_up_sync(ALL, after.x, 4), __shfl_up_sync(ALL, after.y, 4));
        if (g == 0) before = state[j];
        state[j] = make_float2(__shfl_sync(ALL, after.x, 28 + t), __shfl_sync(ALL, after.y, 28 + t));
        const float2 between = times_plus(over_chunk, before, own);
        entering[j][0] = before.x, entering[j][1] = before.y, entering[j][2] = between.x, entering[j][3] = between.y;
    }

#pragma unroll
    for (int block = 0; block < 2; ++block) {
        float y[2][4];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            y[part][0] = low_bf16(a[block][2 * part]), y[part][1] = high_bf16(a[block][2 * part]);
            y[part][2] = low_bf16(a[block][2 * part + 1]), y[part][3] = high_bf16(a[block][2 * part + 1]);
            product(y[part], a[block], shared.taps[warp][0][part][lane]);
            if (block == 1) product(y[part], a[0], shared.taps[warp][1][part][lane]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t states[4] = {to_tf32(entering[j][0]), to_tf32(entering[j][2]), to_tf32(entering[j][1]),
                                        to_tf32(entering[j][3])};
            const uint4 output = shared.output[warp][j][block][lane];
            mma_tf32(y[0], states, output.x, output.y);
            mma_tf32(y[1], states, output.z, output.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int part = i / 2, odd = i % 2;
            const int word = g * CHUNK + odd * (CHUNK / 2) + block * 8 + part * 4 + t;
            uint32_t& to = x[place(warp, word)];
            const uint32_t pair = pack_bf16(y[part][2 * odd], y[part][2 * odd + 1]);
            const uint32_t mask = WHOLE ? ALL : within(2 * word, 2 * word + 1, begin, end);
            to = WHOLE ? pair : (to & ~mask) | (pair & mask);
        }
    }
    __syncwarp();
}

// The state after `count` < TILE steps of a tile, step by step: lane n keeps mode n.
template <bool REVERSE>
DEVICE float2 state_after(const uint32_t* x, int warp, const uint32_t* flags, float2 state, float2 q, float2 input,
                          int count) {
    for (int step = 0; step < count; ++step) {
        const uint32_t word = x[place(warp, step / 2)];
        const float value = step % 2 ? high_bf16(word) : low_bf16(word);
        if (flags[step / 32] >> step % 32 & 1) state = make_float2(0.f, 0.f);
        const float2 added = make_float2(input.x * value, input.y * value);
        state = REVERSE ? times(q, make_float2(state.x + added.x, state.y + added.y)) : times_plus(q, state, added);
    }
    return state;
}

// x, y (B, L, D); bos (B, L) or null; p, q, gamma (D, modes); first (or null) and last (B, D, modes).
template <bool REVERSE>
__global__ void __launch_bounds__(THREADS, 1)
    filter(const bf16* x, const uint8_t* bos, const float* p, const float2* q, const float2* gamma, const float2* first,
           bf16* y, float2* last, int length, int width, int modes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel_index = blockIdx.x * CHANNELS + warp;
    const bool active = channel_index < width;
    const int64_t parameters = int64_t(active ? channel_index : 0) * modes;
    const Channel channel = {p + parameters, q + parameters, gamma + parameters, modes};
    const int64_t states = (int64_t(blockIdx.y) * width + (active ? channel_index : 0)) * modes;

    const Mover mover(length, width, REVERSE);
    mover.fetch(x, 0, shared.staged);
    copy_async_commit();
    uint32_t drops = drops_state(bos, length, 0, REVERSE);

    uint4 input[2][4];
    const float tap = make_tap(channel);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            input[block][j] = input_factor<REVERSE>(channel, j, block);
            shared.output[warp][j][block][lane] = output_factor<REVERSE>(channel, j, block);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) shared.taps[warp][block][part][lane] = tap_factor(tap, block, part);
    }
    make_decays(shared.decays[warp], channel.decay(lane));

    float2 state[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int n = 4 * j + lane % 4;
        state[j] = first && n < modes ? first[states + n] : make_float2(0.f, 0.f);
        if (REVERSE) state[j].y = -state[j].y;
    }

    const int tiles = (length + TILE - 1) / TILE;
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<0>();
        mover.put(shared.x, mover.fetched(shared.staged));
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (lane == 0) shared.flags[warp] = flags;
        __syncthreads();
        if (tile + 1 < tiles) {
            mover.fetch(x, tile + 1, shared.staged);
            copy_async_commit();
            drops = drops_state(bos, length, tile + 1, REVERSE);
        }
        if (active) {
            const int count = length - tile * TILE;
            float2 final_state = make_float2(0.f, 0.f);
            if (tile + 1 == tiles) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float re = __shfl_sync(ALL, state[j].x, lane % 4), im = __shfl_sync(ALL, state[j].y, lane % 4);
                    if (lane / 4 == j) final_state = make_float2(re, im);
                }
                if (count < TILE)
                    final_state = state_after<REVERSE>(shared.x, warp, shared.flags, final_state, channel.decay(lane),
                                                       channel.input(lane, REVERSE), count);
                __syncwarp();
            }
            for (int begin = 0, end = next_flag(shared.flags, 0);; end = next_flag(shared.flags, begin + 1)) {
                if (begin == 0 && end == TILE)
                    filter_tile<true>(shared.x, warp, input, shared, state, begin, end);
                else if (end > begin)
                    filter_tile<false>(shared.x, warp, input, shared, state, begin, end);
                if (end == TILE) break;
                begin = end;
#pragma unroll
                for (int j = 0; j < 4; ++j) state[j] = make_float2(0.f, 0.f);
            }
            if (tile + 1 == tiles) {
                if (count >= TILE)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float re = __shfl_sync(ALL, state[j].x, lane % 4);
                        const float im = __shfl_sync(ALL, state[j].y, lane % 4);
                        if (lane / 4 == j) final_state = make_float2(re, im);
                    }
                if (REVERSE && bos && bos[int64_t(blockIdx.y) * length]) final_state = make_float2(0.f, 0.f);
                if (lane < modes) last[states + lane] = REVERSE ? make_float2(final_state.x, -final_state.y) : final_state;
            }
        }
        __syncthreads();
        mover.store(y, tile, mover.get(shared.x));
    }
}
