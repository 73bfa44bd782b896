// The chain over chunks, on tensor cores in tf32, the running table in float32 registers, its rounded copy in shared
// memory as an operand.
//
// Forward (BACKWARD 0): M' = keep (1 - rho) M - keep rho (mix M) + rho target, from out[0] to out[F]; narrow (F + 1
// tables) gets the tables in bf16.
// Backward (1): D' = keep (1 - rho) D - keep mix^T (rho D) + out[f], from out[F] to out[0],
// with D the gradient of table f + 1 and D' that of f. Only the last stays: out[f + 1] becomes rho D, the gradient of
// target f, narrow[f] the same in bf16, and drho (F, parts, S) = rho times that of rho, the sum over a block's columns
// of D (tables[f + 1] - keep tables[f]).
//
// A block has COLS columns of one (batch, head) and ROWS = S threads; a warp has 32 rows. Only the order of summation
// distinguishes the index k of a fragment from memory: lane t takes k = 4 t + 2 step and the one after it.
#include "ptx.cuh"

constexpr int TILES = COLS / 8;
constexpr int NEXT = BACKWARD ? 1 : 8;  // between a lane's rows: neighbours where the matrix is read by columns
constexpr int PITCH = COLS + 2;  // 4 * PITCH % 32 == 8: the four lanes t and eight lanes g meet 32 banks

// `add`: target forward, tables backward.
extern "C" __global__ void __launch_bounds__(ROWS)
    chain(const float* __restrict__ matrix, const float* __restrict__ rho, const float* __restrict__ keep,
          const float* __restrict__ add, float* out, bf16* __restrict__ narrow, float* __restrict__ drho,
          int64_t matrix_step, int64_t add_step, int64_t out_step, int folds, int heads, int width) {
    extern __shared__ uint32_t operand[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int top = threadIdx.x / 32 * 32 + (BACKWARD ? 4 * g : g);  // and NEXT, 2 NEXT and 3 NEXT further
    const int item = blockIdx.y, column = blockIdx.x * COLS + 2 * t;
    const int64_t table = int64_t(ROWS) * width;
    out += int64_t(item) * out_step + column;
    add += int64_t(item) * add_step + column;
    narrow += int64_t(item) * (BACKWARD ? folds : folds + 1) * table + column;
    drho += (int64_t(item) * folds * gridDim.x + blockIdx.x) * ROWS + top;
    matrix += int64_t(item) * matrix_step + (BACKWARD ? 4 * t * ROWS + top : top * ROWS + 4 * t);
    rho += int64_t(item) * folds * ROWS + top;
    keep += item / heads * folds;

    float x[4][TILES][2];  // rows top + 8 i, columns 8 j, 8 j + 1
    const float* start = out + (BACKWARD ? folds : 0) * table;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            float2 v = *reinterpret_cast<const float2*>(start + int64_t(top + NEXT * i) * width + 8 * j);
            x[i][j][0] = v.x, x[i][j][1] = v.y;
        }

    if (!BACKWARD)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                *reinterpret_cast<uint32_t*>(narrow + int64_t(top + NEXT * i) * width + 8 * j) =
                    pack_bf16(x[i][j][0], x[i][j][1]);

    for (int step = 0; step < folds; ++step) {
        const int f = BACKWARD ? folds - 1 - step : step;
        const float kept = keep[f];
        const float* extra = BACKWARD ? out + f * table : add + f * table;
        float share[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            share[i] = rho[f * ROWS + NEXT * i];
            float scale = BACKWARD ? share[i] : 1.f, sum = 0.f;
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                const int64_t at = int64_t(top + NEXT * i) * width + 8 * j;
                if (j % 4 == 0) prefetch(extra + at);
                float2 v = make_float2(scale * x[i][j][0], scale * x[i][j][1]);
                *reinterpret_cast<uint2*>(operand + (top + NEXT * i) * PITCH + 8 * j + 2 * t) =
                    make_uint2(to_tf32(v.x), to_tf32(v.y));
                if (BACKWARD) {
                    float2 after = *reinterpret_cast<const float2*>(add + (f + 1) * table + at);
                    float2 before = *reinterpret_cast<const float2*>(add + f * table + at);
                    sum += x[i][j][0] * (after.x - kept * before.x) + x[i][j][1] * (after.y - kept * before.y);
                    *reinterpret_cast<float2*>(out + (f + 1) * table + at) = v;
                    *reinterpret_cast<uint32_t*>(narrow + f * table + at) = pack_bf16(v.x, v.y);
                }
            }
            if (BACKWARD) {
                sum = warp_sum<4>(sum);
                if (t == 0) drho[int64_t(f) * gridDim.x * ROWS + NEXT * i] = sum;
            }
        }
        __syncthreads();

        float sum[2][TILES][4] = {};
        const float* a = matrix + int64_t(f) * ROWS * ROWS;
        float from[2][4][4];  // rows, backward columns, of this turn and the next, so that it need not wait
#pragma unroll
        for (int i = 0; i < 4; ++i) load<4>(a + NEXT * i * ROWS, from[0][i]);
#pragma unroll 2
        for (int turn = 0; turn < ROWS / 16; ++turn) {
            if (turn + 1 < ROWS / 16)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    load<4>(a + NEXT * i * ROWS + 16 * (turn + 1) * (BACKWARD ? ROWS : 1), from[(turn + 1) % 2][i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t* b = operand + (16 * turn + 4 * t + 2 * half) * PITCH + g;
                uint32_t left[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = 2 * m + i % 2, k = 2 * half + i / 2;
                        left[m][i] = to_tf32(BACKWARD ? from[turn % 2][k][row] : from[turn % 2][row][k]);
                    }
#pragma unroll
                for (int j = 0; j < TILES; ++j)
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma_tf32(sum[m][j], left[m], b[8 * j], b[8 * j + PITCH]);
            }
        }

#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                const int64_t at = int64_t(top + NEXT * i) * width + 8 * j;
                float2 v = *reinterpret_cast<const float2*>(extra + at);
                float stay = kept * (1.f - share[i]), turned = BACKWARD ? kept : kept * share[i];
                float come = BACKWARD ? 1.f : share[i];
                x[i][j][0] = stay * x[i][j][0] - turned * sum[i / 2][j][i % 2 * 2] + come * v.x;
                x[i][j][1] = stay * x[i][j][1] - turned * sum[i / 2][j][i % 2 * 2 + 1] + come * v.y;
                if (!BACKWARD) {
                    *reinterpret_cast<float2*>(out + (f + 1) * table + at) = make_float2(x[i][j][0], x[i][j][1]);
                    *reinterpret_cast<uint32_t*>(narrow + (f + 1) * table + at) = pack_bf16(x[i][j][0], x[i][j][1]);
                }
            }
        __syncthreads();
    }
    if (BACKWARD)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                *reinterpret_cast<float2*>(out + int64_t(top + NEXT * i) * width + 8 * j) =
                    make_float2(x[i][j][0], x[i][j][1]);
}
