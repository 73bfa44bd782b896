// The sums behind the parameter gradients, for sequences of one tile at most. With all the lags r_k = sum_t dy_t x_{t-k}
// no state is needed: the sums are polynomials in q, whose derivatives count every term k times.
//   sum_t dy_t u_t = sum_k r_k q^k,   the entering state's share of it: sum_t dy_t q^(t+1),
//   the last state: sum_k x_{L-1-k} q^k
// Lags k = 16 a + b are one product, of x (row b: x_{m-b}) and dy (column a: dy_{16 a + m}); polynomials another one, of
// the coefficients (row b, column a) and q^(16 a) (row a, a column for the real or imaginary part of a mode).
#include "dual.cuh"
#include "polynomials.cuh"

constexpr int WARPS = 32, MOVERS = 32 * WARPS;  // a warp a channel
// Words of a channel: strides that are 4 more than a multiple of 32, so that eight channels touch every bank once.
constexpr int X_WORDS = 4 + WORDS;              // four zeros first
constexpr int HALF = 4 * (TILE / BLOCK + 8), DY_WORDS = 2 * HALF + 4;  // halves of 16 steps apart, zeros after each

union After {
    uint32_t odd[X_WORDS];     // x a step later: words of steps 2 w - 1 and 2 w
    float4 results[3][MODES];  // a polynomial and q times its derivative
};
struct Shared {
    union {
        uint4 staged[2][2 * MOVERS];  // x and dy on their way
        struct {
            uint32_t banks[16];       // apart from those of x
            After after[WARPS];
        };
    };
    uint32_t x[WARPS * X_WORDS], dy[WARPS * DY_WORDS];
    Channel channels[WARPS];
    uint32_t flags[TILE / 32];
};

// Steps begin .. end - 1 of one document: r[c] grows by the lags at rows b = g, 8 + g and columns a = 8 c + 2 t, + 1.
// `ahead`: where this lane's steps 2 t - g and the next stand. `rows`: of dy, for load_matrix_x4. `zero` is 0, which the
// compiler does not know: it wants the words of a matrix side by side, and of words that stand in two matrices it would
// copy a matrix for every product.
template <bool WHOLE>
DEVICE void add_lags(float (&r)[4][4], const uint32_t* ahead, uint32_t zero, uint32_t rows, int begin, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto early = [&](int h) {  // steps 8 h + 2 t - g and the next
        const uint32_t word = ahead[4 * h];
        return WHOLE ? word : word & within(8 * h + 2 * t - g, 8 * h + 2 * t - g + 1, begin, TILE);
    };
    uint32_t before[4] = {};  // eight steps before, of four blocks of 16 steps
#pragma unroll
    for (int d = 1; d < 4; ++d) before[d] = early(16 * d - 1);
#pragma unroll (WHOLE ? 8 : 1)
    for (int i = 0; i < 8; ++i) {
        uint32_t dy[2][4];  // blocks i, 8 + i; 16 + i, 24 + i
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            load_matrix_x4(dy[m], rows + i * 16 + m * 256);
            if constexpr (!WHOLE)
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int step = (i + 16 * m + k / 2 * 8 + g) * BLOCK + k % 2 * 8 + 2 * t;
                    dy[m][k] &= within(step, step + 1, 0, end);
                }
        }
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            const int block = i + 8 * d;
            const uint32_t near = early(2 * block), far = early(2 * block + 1);
            const uint32_t x[4] = {near, before[d], far, near ^ zero};
            before[d] = far ^ zero;
            if (WHOLE || (block >= begin / BLOCK && block * BLOCK < end))
#pragma unroll
                for (int c = 0; c + d < 4; ++c)
                    mma_bf16(r[c], x, dy[(c + d) / 2][(c + d) % 2 * 2], dy[(c + d) / 2][(c + d) % 2 * 2 + 1]);
        }
    }
}

// As correlate, a block a batch row and 32 channels; L <= TILE, fewer than 2^32 values each.
extern "C" __global__ void __launch_bounds__(MOVERS, 1)
    piece_correlate(const bf16* x, const bf16* dy, const uint8_t* bos, const float* p, const float2* q,
                    const float2* gamma, const float2* first, const float2* dlast, float* dp, float2* dq,
                    float2* dgamma, int length, int width, int modes) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const uint32_t thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32, n = lane % MODES, g = lane / 4, t = lane % 4;
    const int channel_index = blockIdx.x * WARPS + warp;
    const bool active = channel_index < width, there = active && n < modes;
    const uint32_t parameter = there ? channel_index * modes + n : 0;
    const uint32_t state_at = there ? blockIdx.y * width * modes + parameter : 0;
    Channel& channel = shared.channels[warp];

    // This thread moves steps `step` and step + 1 of eight channels.
    const int step = thread / 4 * 2, from_channel = blockIdx.x * WARPS + thread % 4 * 8;
    const bool even = from_channel < width && step < length, odd = from_channel < width && step + 1 < length;
    const uint32_t even_at = even ? (blockIdx.y * length + step) * width + from_channel : 0;
    const uint32_t odd_at = odd ? even_at + width : 0;

    // First what is needed first: all blocks ask at once, and the L2 cache takes more than a microsecond to give them x.
    if (lane < MODES) {
        copy_async_8(shared_address(&channel.eight[n]), q + parameter, there);
        copy_async_8(shared_address(&channel.gamma[n]), gamma + parameter, there);
        copy_async_8(shared_address(&channel.first[n]), first + state_at, there && first);
        copy_async_8(shared_address(&channel.dlast[n]), dlast + state_at, there && dlast);
        copy_async_4(shared_address(&channel.p[n]), p + parameter, there);
    }
    copy_async_commit();
    if (even) prefetch(x + even_at), prefetch(dy + even_at);
    if (odd) prefetch(x + odd_at), prefetch(dy + odd_at);
    copy_async_wait<0>();
    __syncwarp();
    float2 decay = channel.eight[n];
    __syncwarp();
    // The derivatives are divided by q: what is nearly zero is not told from zero.
    if (decay.x * decay.x + decay.y * decay.y < 1e-24f) decay = make_float2(1e-12f, 0.f);

    // Even and odd steps apart, in such an order that eight neighbouring steps of a row touch every bank once.
    const int even_place = thread ^ thread / 8 % 2, odd_place = MOVERS + (thread ^ thread / 8 % 2 ^ 2);
    copy_async_16(shared_address(shared.staged[0] + even_place), x + even_at, even);
    copy_async_16(shared_address(shared.staged[0] + odd_place), x + odd_at, odd);
    copy_async_16(shared_address(shared.staged[1] + even_place), dy + even_at, even);
    copy_async_16(shared_address(shared.staged[1] + odd_place), dy + odd_at, odd);
    copy_async_commit();
    uint32_t drops = 0;
    if (bos && thread < TILE) drops = drops_state(bos, length, Item{int(blockIdx.y), 0}, false);
    make_powers(channel, decay);
    uint32_t* const own_x = shared.x + warp * X_WORDS;
    uint32_t* const own_dy = shared.dy + warp * DY_WORDS;
    if (lane < 4) own_x[lane] = 0;
    own_dy[HALF - 32 + lane] = own_dy[2 * HALF - 32 + lane] = 0;

    // A warp turns its 16 steps of 32 channels, 8 x 8 at a time, as in piece.cu.
    const uint32_t pair = lane % 8 / 2, turn = pair / 2 ^ lane % 2 * 2;
    const uint32_t from = lane % 2 * MOVERS + warp * 32 + pair * 4 + (lane / 8 ^ turn);
    copy_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t block[2][4];
        load_matrix_x4_transposed(block[0], shared_address(shared.staged[0] + from + i * 16));
        load_matrix_x4_transposed(block[1], shared_address(shared.staged[1] + from + i * 16));
        store_matrix_x4(shared_address(shared.x + lane * X_WORDS + 4 + warp * 8 + i * 4), block[0]);
        store_matrix_x4(shared_address(shared.dy + lane * DY_WORDS + i * HALF + warp * 4), block[1]);
    }
    if (bos) {
        const uint32_t flags = __ballot_sync(ALL, drops != 0);
        if (thread < TILE && lane == 0) shared.flags[warp] = flags;
    }
    __syncthreads();
    if (active) {
        After& after = shared.after[warp];
        float r[4][4] = {};
        int begin = 0, crossing = TILE;  // of the last document; the steps that the entering state reaches
        {
            const uint4* const whole = reinterpret_cast<const uint4*>(own_x + 4);
            uint4* const later = reinterpret_cast<uint4*>(after.odd + 4);
            const uint4 a = whole[lane], b = whole[32 + lane];
            const uint32_t last_a = __shfl_sync(ALL, a.w, lane - 1 & 31), last_b = __shfl_sync(ALL, b.w, lane - 1 & 31);
            auto shifted = [](uint32_t before, uint4 v) {
                return make_uint4(__byte_perm(before, v.x, 0x5432), __byte_perm(v.x, v.y, 0x5432),
                                  __byte_perm(v.y, v.z, 0x5432), __byte_perm(v.z, v.w, 0x5432));
            };
            later[lane] = shifted(lane ? last_a : 0u, a), later[32 + lane] = shifted(lane ? last_b : last_a, b);
            if (lane < 4) after.odd[lane] = 0;
            __syncwarp();
        }
        const uint32_t* const ahead = (g % 2 ? after.odd : own_x) + 4 + t - g / 2;
        const uint32_t rows = shared_address(own_dy + lane / 8 % 2 * HALF + (lane / 16 * 8 + lane % 8) * 4);
        int end = bos ? next_flag(shared.flags, 0) : TILE;
        crossing = end;
        if (end == TILE) {
            add_lags<true>(r, ahead, own_x[0], rows, 0, TILE);
        } else {
            for (;; end = next_flag(shared.flags, begin + 1)) {
                if (end > begin) add_lags<false>(r, ahead, own_x[0], rows, begin, end);
                if (end == TILE) break;
                begin = end;
            }
        }
        __syncwarp();

        // The other polynomials' coefficients, in the place of what they are made of: dy before the first document that
        // begins, x of the last one, backward in time.
        uint4 *const of_first = reinterpret_cast<uint4*>(own_dy), *const of_last = reinterpret_cast<uint4*>(own_x);
        const bool crosses = first && crossing > 0;
        if (crosses) {
            uint32_t words[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                load_matrix_x4_transposed(words[m], rows + m * 256);
                if (crossing < TILE)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = (16 * m + i / 2 * 8 + 2 * t) * BLOCK + i % 2 * 8 + g;
                        words[m][i] &= within(at, at + BLOCK, 0, crossing);
                    }
            }
            __syncwarp();
#pragma unroll
            for (int m = 0; m < 2; ++m)
                of_first[m * 32 + lane] = make_uint4(words[m][0], words[m][1], words[m][2], words[m][3]);
        }
        if (dlast) {
            const unsigned short* const steps = reinterpret_cast<const unsigned short*>(own_x + 4);
            uint32_t words[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int at = length - 1 - ((i / 2 * 8 + 2 * t) * BLOCK + i % 2 * 8 + g);
                const uint32_t low = at >= begin ? steps[at] : 0, high = at - BLOCK >= begin ? steps[at - BLOCK] : 0;
                words[i / 4][i % 4] = low | high << 16;
            }
            __syncwarp();
#pragma unroll
            for (int m = 0; m < 2; ++m)
                of_last[m * 32 + lane] = make_uint4(words[m][0], words[m][1], words[m][2], words[m][3]);
        }
        Operand lags;
        lags.set(r);
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
            const Factors factors(channel, j);
            {
                float once[4] = {}, by_a[4] = {};
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    product(once, lags.upper[s], factors.once[s]), product(by_a, lags.upper[s], factors.by_a[s]);
                    mma_bf16(once, lags.lower[s], factors.once[s].x, factors.once[s].y);
                    mma_bf16(by_a, lags.lower[s], factors.by_a[s].x, factors.by_a[s].y);
                }
                finish(after.results[0], once, by_a, channel, j);
            }
            auto exact = [&](const uint4* from, float4* to) {
                float once[4] = {}, by_a[4] = {};
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    const uint4 of = from[s * 32 + lane];
                    const uint32_t words[4] = {of.x, of.y, of.z, of.w};
                    product(once, words, factors.once[s]), product(by_a, words, factors.by_a[s]);
                }
                finish(to, once, by_a, channel, j);
            };
            if (crosses) exact(of_first, after.results[1]);
            if (dlast) exact(of_last, after.results[2]);
        }
        __syncwarp();

        decay = channel.near[n / 4][1][n % 4];
        const float inverse = 1.f / (decay.x * decay.x + decay.y * decay.y);
        const float2 by_inverse = make_float2(decay.x * inverse, -decay.y * inverse);
        auto result = [&](int kind) {
            const float4 of = after.results[kind][n];
            return Dual{make_float2(of.x, of.y), make_float2(of.z, of.w)};
        };
        Dual along = result(0), across = zero_dual();
        along.slope = times(by_inverse, along.slope);
        const float share = channel.p[n];
        const float2 entering = channel.first[n];
        Leaving leaving = {};
        if (crosses) {
            const Dual sum = result(1);
            across.value = times(entering, times(decay, sum.value));
            across.slope = times(entering, make_float2(sum.value.x + sum.slope.x, sum.value.y + sum.slope.y));
        }
        if (dlast) {
            Dual u = result(2);
            u.slope = times(by_inverse, u.slope);
            float2 passed = make_float2(0.f, 0.f);
            if (first && crossing == TILE) {
                passed = times(entering, power(decay, length - 1));
                passed.x *= length, passed.y *= length;
            }
            leaving.add(channel.dlast[n], u, share, passed);
        }
        wait_for_previous();  // so that after this kernel that one has ended, too
        if (there && lane < MODES) {
            const Gradients to = {dp, dq, dgamma};
            to.store(state_at, share, channel.gamma[n], along, across, leaving);
        }
    } else {
        wait_for_previous();
    }
}
