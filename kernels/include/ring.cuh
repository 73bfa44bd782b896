// A tile of 128 rows by 256 keys is multiplied slice by slice of 64 features: one thread copies operand slices by tensor
// map into a ring of stages, two warpgroups of 64 rows multiply. Two blocks with neighbouring rows and the same keys
// form a cluster; each reads half of the keys from L2 for both.
#pragma once
#include "hopper.cuh"

constexpr int STAGES = 4, ROWS = 128, KEYS = 256, PAIR = 2 * ROWS;
constexpr uint32_t A_BYTES = ROWS * 128, B_BYTES = KEYS * 128, STAGE = A_BYTES + B_BYTES;

struct Ring {
    uint32_t stages, full, empty, rank;

    // All threads of the cluster. `memory` has STAGES * STAGE + 1024 bytes, `barriers` 2 * STAGES.
    DEVICE void open(uint8_t* memory, uint64_t* barriers) {
        stages = (shared_address(memory) + 1023u) & ~1023u, full = shared_address(barriers);
        empty = full + 8 * STAGES, rank = cluster_rank();
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4);
            barrier_init_fence();
        }
        cluster_sync();
    }
    // What follows the stages in `memory`.
    DEVICE uint8_t* rest(uint8_t* memory) const { return memory + (stages - shared_address(memory)) + STAGES * STAGE; }

    // No block may go while the other copies into it or signals to it.
    DEVICE void close() { cluster_sync(); }

    // Slice i: `row` of this block's rows, `key` of the keys that both blocks share, each from its column on.
    DEVICE void fill(int i, const TensorMap* rows, int row, int column, const TensorMap* keys, int key, int from) {
        const int s = i % STAGES;
        const uint32_t to = stages + s * STAGE, barrier = full + 8 * s, part = rank * (B_BYTES / 2);
        barrier_wait(empty + 8 * s, (i / STAGES & 1) ^ 1);
        barrier_expect(barrier, STAGE);
        copy_box(to, rows, barrier, column, row);
        copy_box_to(3, to + A_BYTES + part, keys, barrier, from, key + int(rank) * (KEYS / 2));
    }

    // sum = the product of slices [from, to), for the 64 rows of a warpgroup.
    DEVICE void multiply(float (&sum)[128], int group, int from, int to) {
        for (int i = from; i < to; ++i) {
            const int s = i % STAGES;
            const uint32_t a = stages + s * STAGE + group * 64 * 128, b = stages + s * STAGE + A_BYTES;
            barrier_wait(full + 8 * s, i / STAGES & 1);
            products_fence();
#pragma unroll
            for (int part = 0; part < 4; ++part)
                product_64x256(sum, operand(a + part * 32), operand(b + part * 32), i > from || part > 0);
            products_commit();
            if (i > from) {
                products_wait<1>();
                release(i - 1);
            }
        }
        products_wait<0>();
        release(to - 1);
    }

    // The stage of slice i is free in this block: both blocks copy into it.
    DEVICE void release(int i) {
        if (threadIdx.x % 128 < 2) barrier_arrive_at(empty + 8 * (i % STAGES), threadIdx.x % 128);
    }
};
