// How the time-step norms cut their work. A block holds a tile of steps and whole groups in shared memory.
// Defines: DECAYED 0/1; INPUT, PARAMETER types of x and of the parameters; FEATURES a group; VECTOR elements an access;
// LANES lanes a group; VECTORS accesses a lane, group and step; GROUPS groups a block; ROWS steps a thread; THREADS a
// block.
#pragma once
#include "steps.cuh"
#include "vectors.cuh"

using X = INPUT;
using P = PARAMETER;
constexpr int K = FEATURES;
constexpr int SLOTS = LANES * GROUPS, ACROSS = THREADS / SLOTS, TILE = ACROSS * ROWS, WARPS = THREADS / 32;
constexpr bool WHOLE = LANES * VECTORS * VECTOR == K;
// How many live on a multiprocessor.
constexpr int FORWARD_BLOCKS = (VECTORS > 4 ? 512 : 1024) / THREADS, BACKWARD_BLOCKS = 768 / THREADS;
static_assert(TILE <= 64 && THREADS % SLOTS == 0, "a warp scans two steps a lane");

// Where a block works. `order` is its tile's place in the chain: time order forward, the reverse backward.
struct Place {
    int order, row, strip, groups, L, tiles;
    DEVICE Place(int L, int groups, int rows, int tiles) : groups(groups), L(L), tiles(tiles) {
        const int strips = (groups + GROUPS - 1) / GROUPS;
        strip = blockIdx.x % strips;
        row = blockIdx.x / strips % rows;
        order = blockIdx.x / strips / rows;
    }
    DEVICE int group(int g) const { return strip * GROUPS + g; }
    DEVICE int64_t chain(int g) const { return int64_t(row) * groups + group(g); }
    DEVICE uint64_t* slots(uint64_t* all, int g) const { return all + chain(g) * (tiles + (tiles - 1) / 32); }
};

// The thread's share of a tile: LANES lanes a group, GROUPS groups side by side, ACROSS steps at once.
struct Share {
    int lane, group, step;
    DEVICE Share() {
        lane = threadIdx.x % LANES;
        group = threadIdx.x / LANES % GROUPS;
        step = threadIdx.x / SLOTS;
    }
    DEVICE int column(int v) const { return (v * LANES + lane) * VECTOR; }
    DEVICE bool within(int v) const { return WHOLE || column(v) < K; }
};

// In shared memory; registers instead would let fewer blocks live on a multiprocessor, and it is they that hide each
// other's waits.
constexpr int TILE_BYTES = ROWS * VECTORS * VECTOR * THREADS * int(sizeof(X));
using SharedTile = Tile<X, VECTOR, VECTORS, THREADS>;
extern __shared__ __align__(16) char memory[];

// Documents of one row: begin[t] is the step of the latest BOS at or before t, -1 when there is none in this call.
struct Documents {
    const int* begin;
    int64_t carried;
    DEVICE int at(int t) const { return begin ? begin[t] : -1; }
    DEVICE int64_t count(int t) const {
        const int from = at(t);
        return from >= 0 ? t - from + 1 : carried + t + 1;
    }
    DEVICE bool starts(int t) const { return begin && begin[t] == t; }
};

template <class Use> DEVICE void for_each_group(const Place& place, Use use) {
    for (int g = threadIdx.x / 32; g < GROUPS; g += WARPS)
        if (place.group(g) < place.groups) use(g);
}
