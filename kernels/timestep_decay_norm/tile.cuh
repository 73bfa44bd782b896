// How the time-step norms cut their work. A block holds a tile of steps and whole groups in shared memory.
// Defines: DECAYED 0/1; INPUT, PARAMETER types of x and of the parameters; FEATURES a group; VECTOR elements an access;
// LANES lanes a group; VECTORS accesses a lane, group and step; GROUPS groups a block; ROWS steps a thread; THREADS a
// block; CLUSTER blocks that hold a chain of tiles and speak through shared memory, 0: any number that speak through
// global memory.
#pragma once
#include "cluster.cuh"
#include "vectors.cuh"

using X = INPUT;
using P = PARAMETER;
constexpr int K = FEATURES;
constexpr int SLOTS = LANES * GROUPS, ACROSS = THREADS / SLOTS, TILE = ACROSS * ROWS, WARPS = THREADS / 32;
constexpr bool WHOLE = LANES * VECTORS * VECTOR == K;
// How many live on a multiprocessor.
constexpr int FORWARD_BLOCKS = (VECTORS > 4 ? 512 : 1024) / THREADS, BACKWARD_BLOCKS = 768 / THREADS;
constexpr bool EARLY = IN_CLUSTER && VECTORS == 1;  // few blocks live on a multiprocessor: load before the waits
static_assert(TILE <= 64 && THREADS % SLOTS == 0, "a warp scans two steps a lane");

struct Rates {
    float beta1, beta2, keep1, keep2, log1, log2, eps;  // keep = 1 - beta, log = ln beta
};

// Where a block works. `order` is its tile's place in the chain: time order forward, the reverse backward.
struct Place {
    int order, row, strip, groups, L, tiles;
    DEVICE Place(int L, int groups, int rows, int tiles) : groups(groups), L(L), tiles(tiles) {
        const int strips = (groups + GROUPS - 1) / GROUPS;
        const uint32_t first = blockIdx.x / CLUSTER_BLOCKS;
        strip = first % strips;
        row = first / strips % rows;
        order = IN_CLUSTER ? blockIdx.x % CLUSTER_BLOCKS : first / strips / rows;
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

// A tile in shared memory. Every thread reads back what it fetched itself, so no barrier is needed; registers instead
// would let fewer blocks live on a multiprocessor, and it is they that hide each other's waits.
constexpr int TILE_BYTES = ROWS * VECTORS * VECTOR * THREADS * int(sizeof(X));
struct Tile {
    X* own;
    DEVICE Tile(char* memory) : own(reinterpret_cast<X*>(memory) + threadIdx.x * VECTOR) {}
    DEVICE X* at(int r, int v) const { return own + (r * VECTORS + v) * THREADS * VECTOR; }
    DEVICE void fetch(int r, int v, const X* from, bool inside) const {
        if constexpr (VECTOR * sizeof(X) == 16) {
            copy_async_16(shared_address(at(r, v)), from, inside);
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) at(r, v)[i] = inside ? from[i] : from_float<X>(0.f);
        }
    }
    DEVICE Vector<X, VECTOR> operator()(int r, int v) const {
        Vector<X, VECTOR> values;
        values.read(at(r, v));
        return values;
    }
};
extern __shared__ __align__(16) char memory[];

// Ask the L2 cache for the tile that begins at step `start`.
DEVICE void prefetch_tile(const X* all, const Place& place, int start) {
    constexpr int LINE = 128 / int(sizeof(X)), LINES = (GROUPS * K + LINE - 1) / LINE;
    const int width = place.groups * K;
    all += int64_t(place.row) * place.L * width;
    for (int i = threadIdx.x; i < TILE * LINES; i += THREADS) {
        const int step = start + i / LINES, column = place.group(0) * K + i % LINES * LINE;
        if (step < place.L && column < width) prefetch(all + int64_t(step) * width + column);
    }
}

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

// The begin of steps from .. to - 1 of a row, by one warp that has seen `before`; returns the last.
template <class Use> DEVICE int find_begins(const uint8_t* bos, int from, int to, int before, Use use) {
    constexpr uint32_t all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
#pragma unroll 8
    for (int t = from; t < to; t += 32) {
        const uint32_t marks = __ballot_sync(all, t + lane < to && bos[t + lane]), upto = marks & (all >> (31 - lane));
        if (t + lane < to) use(t + lane, upto ? t + 31 - __clz(upto) : before);
        if (marks) before = t + 31 - __clz(marks);
    }
    return before;
}

template <class Use> DEVICE void for_each_group(const Place& place, Use use) {
    for (int g = threadIdx.x / 32; g < GROUPS; g += WARPS)
        if (place.group(g) < place.groups) use(g);
}

// What a block does with its tile, once it is there. Handed over as a function (as the forward's fetch is one), because
// the same steps written straight into a kernel compile to other machine code than that which was measured.
template <class Use> DEVICE void after_fetch(Use use) {
    copy_async_wait<0>();
    use();
}

DEVICE float correction(float log_beta, float n) { return -1.f / expm1f(n * log_beta); }

// The powers of a run without a BOS, straight from the logarithm: products of rounded betas drift.
DEVICE Run exact_powers(Run run, float steps, const Rates& rate) {
    if (run.p != 0.f) run.p = expf(steps * rate.log1);
    if (run.q != 0.f) run.q = expf(steps * rate.log2);
    return run;
}
