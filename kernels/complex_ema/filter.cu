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
    float2 entering[CHANNELS][MODES];            // the states before the next batch row
    uint32_t flags[TILE / 32];
};

// The parameters of one channel, by mode, zeros beyond the last one. Backward in time gamma is the input and p the output.
struct Channel {
    float2 q[MODES], input[MODES], output[MODES];
};

// W for modes 4 j .. 4 j + 3 and both halves of a chunk: input q^(31 - s), one exponent more backward in time.
template <bool REVERSE> DEVICE void make_input(uint4 (&to)[2][4], const Channel& channel, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, n = 4 * j + g / 2;
    const Powers q(channel.q[n]);
    float2 last = q.raise(channel.input[n], 6 - 2 * t);  // of the last step, 2 t + 9, of the second half
    if (REVERSE) last = times(last, q.one);
    if (g % 2) last = minus_i_times(last);  // whose real parts are the imaginary parts
    const float2 nine = times(q.eight, q.one);
#pragma unroll
    for (int block = 1; block >= 0; --block) {
        to[block][j] = factor(real_of_product(last, nine), real_of_product(last, q.eight),
                              real_of_product(last, q.one), last.x);
        last = times(last, q.sixteen);
    }
}

// C for modes 4 j .. 4 j + 3 and both halves of a chunk, in tf32: output q^(step + 1), one exponent less backward in
// time. Only outputs, which are rounded to bfloat16, depend on it.
template <bool REVERSE> DEVICE void make_output(uint4 (&to)[2][32], const Channel& channel, int j) {
    const int lane = threadIdx.x % 32, n = 4 * j + lane % 4;
    const Powers q(channel.q[n]);
    float2 a = q.raise(channel.output[n], lane / 4);
    if (!REVERSE) a = times(a, q.one);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        const float2 b = times(a, q.eight);
        to[block][lane] = make_uint4(to_tf32(a.x), to_tf32(-a.y), to_tf32(b.x), to_tf32(-b.y));
        a = times(b, q.eight);
    }
}

// Tap tau = Re sum_n gamma p q^tau in lane tau. Lane n makes 16 taps of mode n, lane 16 + n the other 16.
DEVICE float make_tap(const Channel& channel) {
    const int lane = threadIdx.x % 32, n = lane % MODES;
    const Powers q(channel.q[n]);
    float2 term = times(channel.input[n], channel.output[n]);
    if (lane >= MODES) term = times(term, q.sixteen);
    float taps[MODES];
#pragma unroll
    for (int i = 0; i < MODES; ++i) {
        taps[i] = term.x;
        term = times(term, q.one);
    }
    sum_to_own_index<MODES / 2>(taps, lane);
    return taps[0];
}

// K for steps 8 part .. 8 part + 7 of a block, from the steps s of the block `distance` before: tap (step - s), s <= step.
DEVICE void make_taps(uint4 (&to)[2][2][32], float tap) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint2 pairs[5];  // from 8 steps ahead to 24 steps back
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        const int lag = 8 * (i - 1) + g - 2 * t;
        const float near = __shfl_sync(ALL, tap, lag & 31), far = __shfl_sync(ALL, tap, (lag - 1) & 31);
        pairs[i] = split(lag >= 0 ? near : 0.f, lag >= 1 ? far : 0.f);
    }
#pragma unroll
    for (int distance = 0; distance < 2; ++distance)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const uint2 first = pairs[2 * distance + part + 1], second = pairs[2 * distance + part];
            to[distance][part][lane] = make_uint4(first.x, second.x, first.y, second.y);
        }
}

// One warp: the outputs of steps begin .. end - 1 of a tile in place, from the state at `begin`, which becomes the
// state at the end of the tile. The steps outside count as zero. Lane (g, t) keeps modes 4 j + t. With KEEP the state that
// enters `chunk` goes to lane n of `entered` for mode n, unless the chunk begins before `begin`.
template <bool WHOLE, bool KEEP>
DEVICE void filter_tile(uint32_t* x, int warp, const uint4 (&input)[2][4], const Shared& shared, float2 (&state)[4],
                        int begin, int end, int chunk, float2& entered) {
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
        if constexpr (KEEP) {
            const float2 own_chunk = chunk % 2 ? between : before;
            const int from = chunk / 2 * 4 + t;
            const float re = __shfl_sync(ALL, own_chunk.x, from), im = __shfl_sync(ALL, own_chunk.y, from);
            if (begin <= chunk * CHUNK && g == j) entered = make_float2(re, im);
        }
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

// Lane n of a warp starts to copy the state of mode n before a batch row, zero where there is none.
DEVICE void fetch_states(float2 (&to)[MODES], const float2* from, bool there, const void* anywhere) {
    const int lane = threadIdx.x % 32;
    if (lane < MODES) copy_async_8(shared_address(&to[lane]), there ? from + lane : anywhere, there);
}

// x, y (B, L, D); bos (B, L) or null; p, q, gamma (D, modes); first (or null) and last (B, D, modes).
template <bool REVERSE>
__global__ void __launch_bounds__(THREADS, 1)
    filter(const bf16* x, const uint8_t* bos, const float* p, const float2* q, const float2* gamma, const float2* first,
           bf16* y, float2* last, int batch, int length, int width, int modes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_for_previous(), let_next_begin();  // in this order: the gradients' kernel counts on all that came before
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel_index = blockIdx.x * CHANNELS + warp;
    const bool active = channel_index < width;
    const int64_t parameters = int64_t(active ? channel_index : 0) * modes;
    auto states = [&](int row) { return int64_t(row) * width * modes + parameters; };
    const int tiles = (length + TILE - 1) / TILE;

    float2 decay = make_float2(0.f, 0.f), gain = decay;  // of mode `lane`
    float share = 0.f;
    if (lane < modes) decay = q[parameters + lane], gain = gamma[parameters + lane], share = p[parameters + lane];
    const Mover mover(length, width, REVERSE);
    uint32_t drops;
    auto fetch = [&](Item item) {
        mover.fetch(x, item, shared.staged);
        if (item.tile == 0)
            fetch_states(shared.entering[warp], first + states(item.row), first && lane < modes, q);
        copy_async_commit();
        drops = drops_state(bos, length, item, REVERSE);
    };
    auto keep = [&](int row, float2 own) {  // the state after a batch row
        if (REVERSE && bos && bos[int64_t(row) * length]) own = make_float2(0.f, 0.f);
        if (lane < modes) last[states(row) + lane] = REVERSE ? make_float2(own.x, -own.y) : own;
    };
    Item item = {int(blockIdx.y), 0};
    fetch(item);

    Channel& channel = *reinterpret_cast<Channel*>(shared.x + warp * WORDS);  // until the first tile comes
    if (lane < MODES) {
        channel.q[lane] = decay;
        channel.input[lane] = REVERSE ? gain : make_float2(share, 0.f);
        channel.output[lane] = REVERSE ? make_float2(share, 0.f) : gain;
    }
    __syncwarp();
    uint4 input[2][4];
    make_decays(shared.decays[warp], decay);
    make_taps(shared.taps[warp], make_tap(channel));
#pragma unroll 1
    for (int j = 0; j < 4; ++j) make_output<REVERSE>(shared.output[warp][j], channel, j);
#pragma unroll
    for (int j = 0; j < 4; ++j) make_input<REVERSE>(input, channel, j);
    __syncthreads();

    float2 state[4];
    while (item.row < batch) {
        copy_async_wait<0>();
        mover.put(shared.x, mover.fetched(shared.staged));
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (lane == 0) shared.flags[warp] = flags;
        __syncthreads();
        if (item.tile == 0) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                state[j] = shared.entering[warp][4 * j + lane % 4];
                if (REVERSE) state[j].y = -state[j].y;
            }
            __syncwarp();
        }
        const Item next = item.next(tiles);
        if (next.row < batch) fetch(next);
        const int count = length - item.tile * TILE;
        if (active && count >= TILE) {
            float2 none;
            for (int begin = 0, end = next_flag(shared.flags, 0);; end = next_flag(shared.flags, begin + 1)) {
                if (begin == 0 && end == TILE)
                    filter_tile<true, false>(shared.x, warp, input, shared, state, begin, end, 0, none);
                else if (end > begin)
                    filter_tile<false, false>(shared.x, warp, input, shared, state, begin, end, 0, none);
                if (end == TILE) break;
                begin = end;
#pragma unroll
                for (int j = 0; j < 4; ++j) state[j] = make_float2(0.f, 0.f);
            }
            if (count == TILE) {
                float2 own = state[0];  // lane n: of mode n; the states do not depend on lane / 4
#pragma unroll
                for (int j = 1; j < 4; ++j)
                    if (lane / 4 == j) own = state[j];
                keep(item.row, own);
            }
        } else if (active) {
            const int chunk = count / CHUNK;
            const uint32_t tail = shared.x[place(warp, chunk * (CHUNK / 2) + lane % (CHUNK / 2))];
            float2 own = make_float2(0.f, 0.f);
            for (int begin = 0, end = next_flag(shared.flags, 0);; end = next_flag(shared.flags, begin + 1)) {
                if (end > begin)
                    filter_tile<false, true>(shared.x, warp, input, shared, state, begin, end, chunk, own);
                if (end == TILE) break;
                begin = end;
#pragma unroll
                for (int j = 0; j < 4; ++j) state[j] = make_float2(0.f, 0.f);
            }
            const int64_t at = parameters + (lane < modes ? lane : 0);
            keep(item.row, state_after<REVERSE>(tail, shared.flags[chunk], own, q[at],
                                                REVERSE ? gamma[at] : make_float2(p[at], 0.f), count % CHUNK));
        }
        __syncthreads();
        mover.store(y, item, mover.get(shared.x));
        item = next;
    }
}
