// The average of filter.cu for sequences of one tile at most, the pieces of a stream. Every factor serves one product
// only, so the time goes to making factors, to shared memory and to waiting. Hence chunks of 16 steps, with half the
// factors of chunks of 32, and all channels of 4096 at once. Lane (g, t) holds chunks 4 g .. 4 g + 3:
//   row g of product m: chunk 4 g + 2 m;  row 8 + g: chunk 4 g + 2 m + 1
#include "piece_factors.cuh"

// A warp a channel; 64 bytes of a step, because a line that is touched takes a cycle, however little of it is asked for.
constexpr int WARPS = 32, MOVERS = 32 * WARPS;

struct Shared {
    uint4 staged[2 * MOVERS];   // the tile on its way
    uint32_t x[WARPS * WORDS];  // the tile, turned into the outputs in place
    Channel channels[WARPS];
    uint32_t flags[TILE / 32];
};

// Where word `word` of a channel stands: a row of eight 16-byte units, eight steps each, whose order depends on row and
// channel. So one unit of eight channels, and one unit of eight rows, touch every bank once.
DEVICE int spot(int channel, int word) {
    const int line = word / 32, unit = word / 4;
    return channel * WORDS + line * 32 + ((unit ^ line ^ channel) & 7) * 4 + word % 4;
}

// sum += a b in place, if `here`: the compiler would copy the sum first.
DEVICE void add_product(float2& sum, float2 a, float2 b, bool here) {
    asm("{.reg .pred p;\n setp.ne.u32 p, %7, 0;\n @p fma.rn.f32 %0, %4, %6, %0;\n @p fma.rn.f32 %1, %3, %5, %1;\n"
        "@p fma.rn.f32 %0, %2, %5, %0;\n @p fma.rn.f32 %1, %2, %6, %1;}"
        : "+f"(sum.x), "+f"(sum.y)
        : "f"(a.x), "f"(a.y), "f"(-a.y), "f"(b.x), "f"(b.y), "r"(uint32_t(here)));
}

// One warp: the outputs of steps begin .. end - 1 in place, from the entering state if it is `carried`. The steps
// outside count as zero. Keeps the states at the end of the tile or, when only `count` steps belong to the sequence,
// before the chunk in which it ends, unless that begins before `begin`.
template <bool WHOLE, bool REVERSE>
DEVICE void filter_piece(uint32_t* x, int warp, Channel& channel, bool carried, int begin, int end, int count) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    // Lane l gives the row of l % 8: of the chunks 4 g + 2 m + l / 8 % 2, the half l / 16. m is a bit of the unit.
    const uint32_t rows = shared_address(x + spot(warp, lane % 8 * 32 + lane / 8 % 2 * 8 + lane / 16 * 4));
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        load_matrix_x4(a[m], rows ^ m * 64);
        if constexpr (!WHOLE)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int step = (4 * g + 2 * m + i % 2) * STEPS + i / 2 * 8 + 2 * t;
                a[m][i] &= within(step, step + 1, begin, end);
            }
    }
    if constexpr (!WHOLE) __syncwarp();

    float y[2][2][4] = {};  // product, half of the chunk
    {
        const float* at = channel.taps + 8 + g - 2 * t;  // tap (step - s), none where s > step
        const uint2 near = split(at[0], at[-1]), far = split(at[8], at[7]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            mma_bf16(y[m][0], a[m][0], a[m][1], near.x);
            mma_bf16(y[m][0], a[m][0], a[m][1], near.y);
            product(y[m][1], a[m], make_uint4(far.x, near.x, far.y, near.y));
        }
    }

    const uint32_t place = shared_address(channel.input[0] + (lane ^ lane / 8));
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
        const uint4* factors = shared_at(place ^ j % 2 * 64) + j * 32;
        float sum[2][4] = {};  // what the chunks add
        {
            const uint4 input = *factors;
            product(sum[0], a[0], input), product(sum[1], a[1], input);
        }
        Mode& mode = channel.modes[4 * j + t];
        float2 state = make_float2(0.f, 0.f);
        if (g == 0 && carried) state = mode.entering;
        if (REVERSE) state.y = -state.y;
        const float4 near = mode.decays[0], far = mode.decays[1];
        const float2 over_chunk = make_float2(near.x, near.y);
        auto own = [&](int i) { return make_float2(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]); };

        // States after every four chunks: a scan over the eight lanes of a mode.
        float2 after = times_plus(over_chunk, state, own(0));
#pragma unroll
        for (int i = 1; i < 4; ++i) after = times_plus(over_chunk, after, own(i));
        const float2 decays[3] = {make_float2(near.z, near.w), make_float2(far.x, far.y), make_float2(far.z, far.w)};
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            const float2 before = make_float2(__shfl_up_sync(ALL, after.x, 4 << level),
                                              __shfl_up_sync(ALL, after.y, 4 << level));
            add_product(after, decays[level], before, g >= 1 << level);
        }
        float2 entering[4];  // those of the lane's chunks
        entering[0] = make_float2(__shfl_up_sync(ALL, after.x, 4), __shfl_up_sync(ALL, after.y, 4));
        if (g == 0) entering[0] = state;
#pragma unroll
        for (int i = 1; i < 4; ++i) entering[i] = times_plus(over_chunk, entering[i - 1], own(i - 1));

        if (count >= TILE) {
            if (g == 7) mode.entering = after;
        } else if constexpr (!WHOLE) {
            const int chunk = count / STEPS;
            const float2 early = chunk % 2 ? entering[1] : entering[0], late = chunk % 2 ? entering[3] : entering[2];
            if (g == chunk / 4 && begin <= chunk * STEPS) mode.entering = chunk % 4 / 2 ? late : early;
        }
        const uint4 output = factors[4 * 32];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const float2 even = entering[2 * m], odd = entering[2 * m + 1];
            const uint32_t states[4] = {__float_as_uint(even.x), __float_as_uint(odd.x), __float_as_uint(even.y),
                                        __float_as_uint(odd.y)};
            mma_tf32(y[m][0], states, output.x, output.y);
            mma_tf32(y[m][1], states, output.z, output.w);
        }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
        uint32_t pairs[4];  // as in a[m]
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack_bf16(y[m][i / 2][i % 2 * 2], y[m][i / 2][i % 2 * 2 + 1]);
        if constexpr (WHOLE) {
            store_matrix_x4(rows ^ m * 64, pairs);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int word = g * 32 + m * 16 + i % 2 * 8 + i / 2 * 4 + t;
                uint32_t& to = x[spot(warp, word)];
                const uint32_t mask = within(2 * word, 2 * word + 1, begin, end);
                to = (to & ~mask) | (pairs[i] & mask);
            }
        }
    }
    __syncwarp();
}

// x, y (B, L, D), L <= TILE; bos (B, L) or null; p, q, gamma (D, modes); first (or null) and last (B, D, modes).
// Fewer than 2^32 values each.
template <bool REVERSE>
__global__ void __launch_bounds__(MOVERS, 1)
    piece(const bf16* x, const uint8_t* bos, const float* p, const float2* q, const float2* gamma, const float2* first,
          bf16* y, float2* last, int length, int width, int modes) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const uint32_t thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32, n = lane % MODES;
    const int channel_index = blockIdx.x * WARPS + warp;
    const bool active = channel_index < width, there = active && n < modes, resumed = there && first;
    const uint32_t parameter = channel_index * modes + n, state_at = blockIdx.y * width * modes + parameter;
    Channel& channel = shared.channels[warp];

    // This thread moves steps `step` and step + 1 of eight channels.
    const int step = thread / 4 * 2, from_channel = blockIdx.x * WARPS + thread % 4 * 8;
    const bool even = from_channel < width && step < length, odd = from_channel < width && step + 1 < length;
    const uint32_t even_at = (blockIdx.y * length + (REVERSE ? length - 1 - step : step)) * width + from_channel;
    const int to_odd = REVERSE ? -width : width;
    const bf16 *const even_from = x + even_at, *const odd_from = even_from + to_odd;

    if (there) prefetch(p + parameter), prefetch(q + parameter), prefetch(gamma + parameter);
    if (even) prefetch(even_from);
    if (odd) prefetch(odd_from);
    if (resumed) prefetch(first + state_at);
    wait_for_previous();  // first: the gradients' kernel, launched early after this one, counts on all that came before
    let_next_begin();

    // First what is needed first: all blocks ask at once, and the L2 cache takes more than a microsecond to give them x.
    Given& given = *reinterpret_cast<Given*>(channel.input);
    if (lane < MODES) {
        copy_async_8(shared_address(&given.q[n]), q + parameter, there);
        copy_async_8(shared_address(&given.gamma[n]), gamma + parameter, there);
        copy_async_4(shared_address(&given.p[n]), p + parameter, there);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    const float2 decay = given.q[n], gain = given.gamma[n];
    const float share = given.p[n];
    __syncwarp();

    // Even and odd steps apart, in such an order that eight neighbouring steps of a row touch every bank once.
    uint4* const even_staged = shared.staged + (thread ^ thread / 8 % 2);
    uint4* const odd_staged = shared.staged + MOVERS + (thread ^ thread / 8 % 2 ^ 2);
    copy_async_16(shared_address(even_staged), even_from, even);
    copy_async_16(shared_address(odd_staged), odd_from, odd);
    if (lane < MODES) copy_async_8(shared_address(&channel.modes[n].entering), first + state_at, resumed);
    copy_async_commit();
    uint32_t drops = 0;
    if (bos && thread < TILE) drops = drops_state(bos, length, Item{int(blockIdx.y), 0}, REVERSE);
    make_factors<REVERSE>(channel, decay, gain, share);

    // A warp turns its 16 steps of 32 channels, 8 x 8 at a time: lane l gives the row of channel l, and of step l % 8 of
    // eight and channels l / 8 * 8 and on, both of steps 8 i and on.
    const uint32_t pair = lane % 8 / 2, turn = pair / 2 ^ lane % 2 * 2;
    const uint32_t steps = shared_address(shared.staged + lane % 2 * MOVERS + warp * 32 + pair * 4 + (lane / 8 ^ turn));
    const uint32_t times = shared_address(shared.x + spot(lane, warp * 8));
    copy_async_wait<0>();
    __syncwarp();
    uint32_t block[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrix_x4_transposed(block[i], steps + i * 256);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_matrix_x4(times ^ i * 16, block[i]);
    if (bos) {
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (thread < TILE && lane == 0) shared.flags[warp] = flags;
    }
    __syncthreads();
    if (active) {
        int end = bos ? next_flag(shared.flags, 0) : TILE;
        if (end == TILE && length == TILE) {
            filter_piece<true, REVERSE>(shared.x, warp, channel, true, 0, TILE, TILE);
        } else {
            const uint32_t chunk = uint32_t(length) / STEPS, rest = uint32_t(length) % STEPS;
            const uint32_t tail = rest ? shared.x[spot(warp, chunk * (STEPS / 2) + lane % (STEPS / 2))] : 0;
            bool carried = true;
            for (int begin = 0;; end = next_flag(shared.flags, begin + 1)) {
                if (end > begin) filter_piece<false, REVERSE>(shared.x, warp, channel, carried, begin, end, length);
                if (end == TILE) break;
                begin = end, carried = false;
            }
            if (rest) {  // the last chunk is not whole
                const uint32_t from = n < modes ? parameter : 0;
                const float2 input = REVERSE ? gamma[from] : make_float2(p[from], 0.f);
                const uint32_t flags = bos ? shared.flags[chunk / 2] >> chunk % 2 * STEPS : 0;
                float2& state = channel.modes[n].entering;
                const float2 after = state_after<REVERSE>(tail, flags, state, q[from], input, rest);
                __syncwarp();
                if (lane < MODES) state = after;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrix_x4_transposed(block[i], times ^ i * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_matrix_x4(steps + i * 256, block[i]);
    __syncwarp();
    bf16* const to = y + even_at;
    if (even) *reinterpret_cast<uint4*>(to) = *even_staged;
    if (odd) *reinterpret_cast<uint4*>(to + to_odd) = *odd_staged;

    float2 own = channel.modes[n].entering;
    if (REVERSE) own.y = -own.y;
    if (REVERSE && bos && bos[blockIdx.y * length]) own = make_float2(0.f, 0.f);
    if (lane < MODES && there) last[state_at] = own;
}
