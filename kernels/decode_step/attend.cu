// Attention of one token over the ring of keys and values, and its read of the memory's table.
// Defines: ALIGNED_KEYS, ALIGNED_VALUES: rows of S keys or E values in multiples of 16 bytes.
#include "step.cuh"

constexpr int KW = ALIGNED_KEYS ? 16 / sizeof(T) : 1;    // elements of an access to keys
constexpr int VW = ALIGNED_VALUES ? 16 / sizeof(T) : 1;  // and to values
constexpr int FW = ALIGNED_VALUES ? 4 : 1;               // and to rows of the table, float32
constexpr int BANDS = 8, UNROLL = 8;
constexpr int AHEAD = 16;  // keys that a block brings into L2 before it may begin; all blocks' must fit there

// A view i of this head of z: normalised, scaled, shifted, turned where there are angles. zs: the head's S features.
DEVICE float view(const float* zs, const float* scale, const float* shift, const float* cosine, const float* sine, int s,
                  bool turned) {
    const float x = fmaf(zs[s], scale[s], shift[s]);
    if (!turned) return rounded(x);
    const float other = fmaf(zs[s ^ 1], scale[s ^ 1], shift[s ^ 1]), c = cosine[s / 2], n = sine[s / 2];
    return rounded(s & 1 ? fmaf(other, n, x * c) : fmaf(x, c, -other * n));
}

// Sums over `count` rows weighted by `weights` of columns [column, column + W): rows a `pitch` apart, a ring of `slots`.
template <int W, class X>
DEVICE void weighted(const X* from, int64_t pitch, int slot, int slots, const float* weights, int first, int count,
                     int step, float (&sum)[W]) {
    for (int i = first; i < count; i += step * UNROLL) {
        float v[UNROLL][W], p[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int at = i + u * step;
            p[u] = at < count ? weights[at] : 0.f;
            int row = slot + min(at, count - 1);
            if (row >= slots) row -= slots;
            load(from + row * pitch, v[u]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int w = 0; w < W; ++w) sum[w] = fmaf(p[u], v[u][w], sum[w]);
    }
}

// The keys of one split: `count` of them from position `begin` on.
struct Part {
    int64_t begin;
    int count;
    DEVICE Part(int64_t position, int64_t visible, int split, int splits) {
        const int total = int(position + 1 - visible), each = (total + splits - 1) / splits;
        begin = visible + int64_t(split) * each;
        count = max(min(each, total - split * each), 0);
    }
};

// Grid (splits x tiles + far tiles, H, B). Split i of the visible keys leaves its unnormalised sum in near (B, H, splits,
// E) and (largest score, sum of exponentials) in shares (B, H, splits, 2). The far tiles read the table (B, H, S, E),
// for rows whose document owns it, into far (B, H, E), and put the key of the memory into its ring (B, chunk, H, S).
// Dynamic shared memory: 4 S + the keys of a split, in floats.
__global__ void __launch_bounds__(THREADS)
    attend(const T* z, const float* scale, const float* shift, const float* cosine, const float* sine, T* keys,
           const T* values, T* memory_keys, const float* table, const int64_t* owner, const int64_t* segment,
           const int64_t* start, const int64_t* clock, float* near, float2* shares, float* far, float eps, int width,
           int columns, int turned_heads, int chunk, int window, int slots, int splits, int tiles) {
    extern __shared__ float dynamic[];
    __shared__ float scratch[WARPS];
    __shared__ float sums[THREADS * 8];
    float *const zs = dynamic, *const query = dynamic + width, *const fresh = dynamic + 2 * width;
    float* const weights = dynamic + 3 * width;
    const int h = blockIdx.y, heads = gridDim.y, b = blockIdx.z, cell = b * heads + h;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_begin();
    const int64_t position = *clock;
    const int64_t line = int64_t(heads) * width, row = int64_t(heads) * columns;  // from a key, a value to the next
    const int64_t oldest = position / chunk >= window ? (position / chunk - window + 1) * chunk : 0;
    const bool reads_table = blockIdx.x >= splits * tiles;
    const int split = blockIdx.x % splits, tile = blockIdx.x / splits;
    if (!reads_table && tile == 0) {  // start[b] is of the step before: good enough to bring what is needed nearer
        const Part part(position, start[b] > oldest ? start[b] : oldest, split, splits);
        const int lines = (columns * int(sizeof(T)) + 127) / 128, key_lines = (width * int(sizeof(T)) + 127) / 128;
        for (int i = threadIdx.x; i < min(part.count, AHEAD) * (lines + key_lines); i += THREADS) {
            const int64_t slot = int64_t(b) * slots + (part.begin + i / (lines + key_lines)) % slots;
            const int n = i % (lines + key_lines), piece = 128 / sizeof(T);
            if (n < lines) prefetch(values + slot * row + h * columns + n * piece);
            else prefetch(keys + slot * line + h * width + (n - lines) * piece);
        }
    }
    wait_for_previous();
    float square = 0.f;
    for (int s = threadIdx.x; s < width; s += THREADS) {
        const float x = to_float(z[int64_t(cell) * width + s]);
        zs[s] = x;
        square += x * x;
    }
    const float inverse = rsqrtf(block_sum<THREADS>(square, scratch) / width + eps);
    for (int s = threadIdx.x; s < width; s += THREADS) zs[s] *= inverse;
    __syncthreads();
    const int64_t all = heads * width;
    const float *const scales = scale + h * width, *const shifts = shift + h * width;

    if (reads_table) {
        const int tile = blockIdx.x - splits * tiles;
        const bool live = owner[b] == segment[b];
        float top = -INFINITY;
        for (int s = threadIdx.x; s < width; s += THREADS) {
            query[s] = view(zs, scales + 2 * all, shifts + 2 * all, cosine, sine, s, false);
            top = fmaxf(top, query[s]);
            if (tile == 0)
                memory_keys[(int64_t(b) * chunk + position % chunk) * line + h * width + s] =
                    from_float<T>(view(zs, scales + 3 * all, shifts + 3 * all, cosine, sine, s, false));
        }
        top = block_max(top, scratch);
        float sum = 0.f;
        for (int s = threadIdx.x; s < width; s += THREADS) {
            weights[s] = live ? __expf(query[s] - top) : 0.f;
            sum += weights[s];
        }
        sum = block_sum<THREADS>(sum, scratch);
        const int band = warp, column = (tile * 32 + lane) * FW;
        float out[FW] = {};
        if (column < columns && live)
            weighted<FW>(table + int64_t(cell) * width * columns + column, columns, 0, width, weights, band, width, BANDS, out);
#pragma unroll
        for (int w = 0; w < FW; ++w) sums[(band * 32 + lane) * FW + w] = out[w];
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * FW; i += THREADS) {
            float total = 0.f;
#pragma unroll
            for (int part = 0; part < BANDS; ++part) total += sums[part * 32 * FW + i];
            if (tile * 32 * FW + i < columns) far[int64_t(cell) * columns + tile * 32 * FW + i] = live ? total / sum : 0.f;
        }
        return;
    }

    const Part part(position, start[b] > oldest ? start[b] : oldest, split, splits);
    const int count = part.count;
    const int64_t begin = part.begin;
    const bool turned = h < turned_heads, holds_new = count > 0 && begin + count == position + 1;
    const int slot = int(begin % slots);
    for (int s = threadIdx.x; s < width; s += THREADS) {
        query[s] = view(zs, scales, shifts, cosine, sine, s, turned);
        if (holds_new) {
            fresh[s] = view(zs, scales + all, shifts + all, cosine, sine, s, turned);
            if (tile == 0)
                keys[(int64_t(b) * slots + position % slots) * line + h * width + s] = from_float<T>(fresh[s]);
        }
    }
    __syncthreads();
    const T* const mine = keys + int64_t(b) * slots * line + h * width;
    const int old = count - holds_new;
    float top = -INFINITY;
    for (int i = warp; i < old; i += 4 * WARPS) {
        float dot[4] = {};
        for (int s = lane * KW; s < width; s += 32 * KW) {
            float k[4][KW];
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                int at = slot + min(i + u * WARPS, old - 1);
                if (at >= slots) at -= slots;
                load(mine + at * line + s, k[u]);
            }
#pragma unroll
            for (int u = 0; u < 4; ++u)
#pragma unroll
                for (int w = 0; w < KW; ++w) dot[u] = fmaf(query[s + w], k[u][w], dot[u]);
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            dot[u] = warp_sum(dot[u]);
            if (i + u * WARPS < old) {
                top = fmaxf(top, dot[u]);
                if (lane == 0) weights[i + u * WARPS] = dot[u];
            }
        }
    }
    if (holds_new && warp == 0) {
        float dot = 0.f;
        for (int s = lane; s < width; s += 32) dot = fmaf(query[s], fresh[s], dot);
        dot = warp_sum(dot);
        top = fmaxf(top, dot);
        if (lane == 0) weights[old] = dot;
    }
    top = block_max(top, scratch);
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        weights[i] = __expf(weights[i] - top);
        sum += weights[i];
    }
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0 && tile == 0) shares[int64_t(cell) * splits + split] = make_float2(top, sum);
    if (count == 0) return;

    // As many accesses as a row has, up to a block's; where a row is short, several rows at once.
    const int accesses = min((columns + VW - 1) / VW, THREADS);
    int lanes = THREADS;
    while (lanes / 2 >= accesses) lanes /= 2;
    const int bands = THREADS / lanes, band = threadIdx.x / lanes, column = (tile * lanes + threadIdx.x % lanes) * VW;
    float out[VW] = {};
    if (column < columns)
        weighted<VW>(values + int64_t(b) * slots * row + h * columns + column, row, slot, slots, weights, band, count, bands, out);
#pragma unroll
    for (int w = 0; w < VW; ++w) sums[threadIdx.x * VW + w] = out[w];
    __syncthreads();
    float* const to = near + (int64_t(cell) * splits + split) * columns;
    for (int i = threadIdx.x; i < lanes * VW; i += THREADS) {
        float total = 0.f;
        for (int part = 0; part < bands; ++part) total += sums[part * lanes * VW + i];
        if (tile * lanes * VW + i < columns) to[tile * lanes * VW + i] = total;
    }
}

// u = near silu(r) [+ far], near from its splits (at most 64). Four warps share the splits of 32 FW columns. Grid
// (E / (32 FW), H, B).
__global__ void __launch_bounds__(128)
    gate(const float* near, const float2* shares, const float* far, const T* r, T* u, int columns, int splits) {
    __shared__ float weights[64], sums[4][32 * FW];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t cell = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
    let_next_begin();
    wait_for_previous();
    if (warp == 0) {
        float2 share[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            share[i] = lane + 32 * i < splits ? shares[cell * splits + lane + 32 * i] : make_float2(-INFINITY, 0.f);
        const float top = warp_max(fmaxf(share[0].x, share[1].x));
        const float one = __expf(share[0].x - top), two = __expf(share[1].x - top);
        const float total = warp_sum(one * share[0].y + two * share[1].y);
        weights[lane] = one / total, weights[lane + 32] = two / total;
    }
    __syncthreads();
    const int column = (blockIdx.x * 32 + lane) * FW;
    float sum[FW] = {};
    if (column < columns) {
#pragma unroll 8
        for (int i = warp; i < splits; i += 4) {
            float v[FW];
            load(near + (cell * splits + i) * columns + column, v);
#pragma unroll
            for (int w = 0; w < FW; ++w) sum[w] = fmaf(weights[i], v[w], sum[w]);
        }
    }
#pragma unroll
    for (int w = 0; w < FW; ++w) sums[warp][lane * FW + w] = sum[w];
    __syncthreads();
    const int mine = blockIdx.x * 32 * FW + threadIdx.x;
    if (threadIdx.x >= 32 * FW || mine >= columns) return;
    const int64_t at = cell * columns + mine;
    const int i = threadIdx.x;
    const float total = sums[0][i] + sums[1][i] + sums[2][i] + sums[3][i];
    u[at] = from_float<T>(rounded(total) * silu(to_float(r[at])) + (far ? rounded(far[at]) : 0.f));
}
