// The gradients of the memory's softmaxes on tiles of 128 rows by all 256 features, as pairs of blocks (sm_90a;
// ring.cuh multiplies): what cuBLAS would write in float32 for a row kernel to read stays in registers.
//
// Rows x (B, L, H, 256) are dense with the heads side by side; rows and chunks begin on multiples of 256.
#include "ring.cuh"

constexpr int S = KEYS;
constexpr float LOG2E = 1.4426950408889634f;

// A row's two columns 8 j + 2 (lane % 4) of each j, as product_64x256 lays them out.
DEVICE void read_row(const bf16* row, int lane, uint32_t (&x)[32]) {
#pragma unroll
    for (int j = 0; j < 32; ++j) x[j] = *reinterpret_cast<const uint32_t*>(row + 8 * j + lane % 4 * 2);
}
DEVICE void write_pair(bf16* row, int lane, int j, float low, float high) {
    *reinterpret_cast<uint32_t*>(row + 8 * j + lane % 4 * 2) = pack_bf16(low, high);
}

// d <- the derivative of a softmax over features, e (d - sum e d / sum e) / sum e with e = exp(x), in the first or second
// of a thread's rows.
DEVICE void softmax_derivative(const uint32_t (&x)[32], float (&d)[128], int half) {
    float top = low_bf16(x[0]);
#pragma unroll
    for (int j = 0; j < 32; ++j) top = fmaxf(top, fmaxf(low_bf16(x[j]), high_bf16(x[j])));
    top = warp_max<4>(top) * LOG2E;
    float sum = 0.f, dot = 0.f;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        float low = exp2_ftz(low_bf16(x[j]) * LOG2E - top), high = exp2_ftz(high_bf16(x[j]) * LOG2E - top);
        sum += low + high;
        dot += low * d[4 * j + 2 * half] + high * d[4 * j + 2 * half + 1];
    }
    sum = 1.f / warp_sum<4>(sum), dot = warp_sum<4>(dot) * sum;
    asm volatile("" : "+f"(top));  // the exponentials are computed again: registers are short
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        float& low = d[4 * j + 2 * half];
        float& high = d[4 * j + 2 * half + 1];
        low = exp2_ftz(low_bf16(x[j]) * LOG2E - top) * sum * (low - dot);
        high = exp2_ftz(high_bf16(x[j]) * LOG2E - top) * sum * (high - dot);
    }
}

// dx (B, L, H, S) = the derivative of the softmax over features of x, whose gradient is dy (B, L, H, E) times the
// transpose of the table (S, E) that the row reads: table (row + offset) / chunk - skip of `tables` of the head. Zero
// where that is below `least` or live (B, L) is given and false. Blocks: as many as run at once.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    query_gradient(const __grid_constant__ TensorMap grads, const __grid_constant__ TensorMap tables,
                   const bf16* __restrict__ x, bf16* __restrict__ dx, const uint8_t* live, int64_t xb, int64_t xt,
                   int items, int length, int heads, int width, int chunk, int offset, int skip, int least, int count) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    Ring ring;
    ring.open(memory, barriers);
    const int slices = width / 64, pairs = (length + PAIR - 1) / PAIR;
    int slice = 0;
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0)
            for (int work = blockIdx.x / 2; work < pairs * items; work += gridDim.x / 2) {
                const int item = work / pairs, t0 = work % pairs * PAIR, at = (t0 + offset) / chunk - skip;
                if (at < least) continue;
                for (int i = 0; i < slices; ++i)
                    ring.fill(slice + i, &grads, item / heads * length + t0 + int(ring.rank) * ROWS,
                              item % heads * width + i * 64, &tables, (item * count + at) * S, i * 64);
                slice += slices;
            }
        __syncwarp();
    } else {
        more_registers<232>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        for (int work = blockIdx.x / 2; work < pairs * items; work += gridDim.x / 2) {
            const int item = work / pairs, b = item / heads, h = item % heads, t0 = work % pairs * PAIR;
            const int top = t0 + int(ring.rank) * ROWS + group * 64 + warp * 16 + lane / 4;
            const bool reads = (t0 + offset) / chunk - skip >= least;
            float sum[128];
            if (reads) {
                ring.multiply(sum, group, slice, slice + slices);
                slice += slices;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int t = top + 8 * half, from = min(t, length - 1);  // all lanes shuffle
                const bool use = reads && (!live || live[int64_t(b) * length + from]);
                uint32_t row[32];
                read_row(x + b * xb + from * xt + h * S, lane, row);
                softmax_derivative(row, sum, half);
                if (t >= length) continue;
                bf16* to = dx + ((int64_t(b) * length + t) * heads + h) * S;
#pragma unroll
                for (int j = 0; j < 32; ++j)
                    write_pair(to, lane, j, use ? sum[4 * j + 2 * half] : 0.f, use ? sum[4 * j + 2 * half + 1] : 0.f);
            }
        }
    }
    ring.close();
}

// dx (B, L, H, S) of both softmaxes of a chunk's keys x: the derivative of that over features, whose gradient is
// weights dmix, plus w (answers dmix^T + v dtarget^T + column) with w = exp(x - lam). weights and answers are (B, H, L,
// S); dmix (S, S), its transpose and dtarget (S, E) those of the chunk and head; lam and column (B, H, N, S). The rows
// of a chunk before first (B, N) get zero. Blocks: as many as run at once.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    key_gradient(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap turned,
                 const __grid_constant__ TensorMap answers, const __grid_constant__ TensorMap dmix,
                 const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap dtarget,
                 const bf16* x, const float* lam, const float* column, bf16* dx, const int* first, int64_t xb,
                 int64_t xt, int items, int length, int heads, int width, int chunk) {
    extern __shared__ uint8_t memory[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    Ring ring;
    ring.open(memory, barriers);
    constexpr int SLICES = S / 64;
    const int last = 2 * SLICES + width / 64, pairs = length / PAIR, chunks = length / chunk;
    int slice = 0;
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0)
            for (int work = blockIdx.x / 2; work < pairs * items; work += gridDim.x / 2, slice += last) {
                const int item = work / pairs, h = item % heads, t0 = work % pairs * PAIR;
                const int row = item / heads * length + t0 + int(ring.rank) * ROWS, of = item * chunks + t0 / chunk;
                const int own = item * length + t0 + int(ring.rank) * ROWS;
                for (int i = 0; i < SLICES; ++i)
                    ring.fill(slice + i, &weights, own, i * 64, &turned, of * S, i * 64);
                for (int i = 0; i < SLICES; ++i)
                    ring.fill(slice + SLICES + i, &answers, own, i * 64, &dmix, of * S, i * 64);
                for (int i = 0; i < width / 64; ++i)
                    ring.fill(slice + 2 * SLICES + i, &values, row, h * width + i * 64, &dtarget, of * S, i * 64);
            }
        __syncwarp();
    } else {
        more_registers<232>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        uint32_t held[32], *kept = reinterpret_cast<uint32_t*>(ring.rest(memory)) + threadIdx.x % 256;
        for (int work = blockIdx.x / 2; work < pairs * items; work += gridDim.x / 2, slice += last) {
            const int item = work / pairs, b = item / heads, h = item % heads, t0 = work % pairs * PAIR;
            const int top = t0 + int(ring.rank) * ROWS + group * 64 + warp * 16 + lane / 4, n = t0 / chunk;
            const bf16* from = x + b * xb + top * xt + h * S;
            float sum[128];
            ring.multiply(sum, group, slice, slice + SLICES);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t row[32];
                read_row(from + 8 * half * xt, lane, row);
                softmax_derivative(row, sum, half);
#pragma unroll
                for (int j = 0; j < 32; ++j) {
                    const uint32_t pair = pack_bf16(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
                    if (half == 0) kept[256 * j] = pair;
                    if (half == 1) held[j] = pair;
                }
                asm volatile("" ::: "memory");  // one after the other: registers are short
            }
            ring.multiply(sum, group, slice + SLICES, slice + last);
            const int64_t of = (int64_t(item) * chunks + n) * S + lane % 4 * 2;
            bf16* to = dx + ((int64_t(b) * length + top) * heads + h) * S;
            const int start = (first ? first[b * chunks + n] : 0) + n * chunk;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                const float2 norm = *reinterpret_cast<const float2*>(lam + of + 8 * j);
                const float2 add = *reinterpret_cast<const float2*>(column + of + 8 * j);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool use = top + 8 * half >= start;
                    const bf16* raws = from + 8 * half * xt + 8 * j + lane % 4 * 2;
                    const uint32_t raw = *reinterpret_cast<const uint32_t*>(raws);
                    const uint32_t g = half ? held[j] : kept[256 * j];
                    const float* d = sum + 4 * j + 2 * half;
                    float low = low_bf16(g) + exp2_ftz((low_bf16(raw) - norm.x) * LOG2E) * (d[0] + add.x);
                    float high = high_bf16(g) + exp2_ftz((high_bf16(raw) - norm.y) * LOG2E) * (d[1] + add.y);
                    write_pair(to + int64_t(8 * half) * heads * S, lane, j, use ? low : 0.f, use ? high : 0.f);
                }
                asm volatile("" ::: "memory");  // in this order: registers are short
            }
        }
    }
    ring.close();
}

// out (N, S, S) = the transposes of x. Blocks: squares of 32 by 32, by matrix.
extern "C" __global__ void __launch_bounds__(256) transpose(const bf16* __restrict__ x, bf16* __restrict__ out) {
    __shared__ bf16 square[32][34];
    const int column = threadIdx.x % 32, row = threadIdx.x / 32;
    const int64_t matrix = int64_t(blockIdx.z) * S * S;
#pragma unroll
    for (int i = row; i < 32; i += 8)
        square[i][column] = x[matrix + (blockIdx.y * 32 + i) * S + blockIdx.x * 32 + column];
    __syncthreads();
#pragma unroll
    for (int i = row; i < 32; i += 8)
        out[matrix + (blockIdx.x * 32 + i) * S + blockIdx.y * 32 + column] = square[column][i];
}
