// A chain of few tiles: its blocks form a thread block cluster (sm_90 and newer) and send each other what their tiles
// do, from shared memory to shared memory, so that nothing has to be prepared in global memory.
#pragma once
#include "scan.cuh"

#if CLUSTER && __CUDA_ARCH__ >= 900
constexpr bool IN_CLUSTER = true;
constexpr int CLUSTER_BLOCKS = CLUSTER;

template <int CHAINS> struct __align__(16) Inbox {
    Run runs[CHAINS][CLUSTER_BLOCKS];  // of the blocks of lower rank
    uint64_t barriers[CHAINS];

    DEVICE static int rank() { return blockIdx.x % CLUSTER_BLOCKS; }

    // By all threads of all blocks. Nothing may be sent before ready().
    DEVICE void open() {
        if (threadIdx.x < CHAINS) {
            const uint32_t barrier = shared_address(&barriers[threadIdx.x]);
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");  // the fence above orders what matters
    }
    // After a barrier of the block. What arrives before a chain is told how much to expect is counted all the same.
    DEVICE void ready() const {
        if (threadIdx.x < CHAINS)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                             shared_address(&barriers[threadIdx.x])),
                         "r"(rank() * int(sizeof(Run)))
                         : "memory");
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    }

    // By one warp a chain: lane l sends to the block l ranks further on.
    DEVICE void send(int chain, const Run& run) {
        const int to = rank() + 1 + threadIdx.x % 32;
        if (to >= CLUSTER_BLOCKS) return;
        uint32_t place, barrier;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(&runs[chain][rank()])), "r"(to));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(&barriers[chain])), "r"(to));
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                         place),
                     "r"(__float_as_uint(run.p)), "r"(__float_as_uint(run.q)), "r"(__float_as_uint(run.a)),
                     "r"(__float_as_uint(run.b)), "r"(barrier)
                     : "memory");
    }

    // What arrives from the blocks of lower rank, by one warp: all of it, in their order. A block must not end before.
    template <Kind kind> DEVICE Run received(int chain) const {
        const uint32_t barrier = shared_address(&barriers[chain]);
        asm volatile("{\n.reg .pred done;\n"
                     "AGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
                     "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier)
                     : "memory");
        const int lane = threadIdx.x % 32;
        const Run run = lane < rank() ? runs[chain][lane] : identity<kind>();
        return from_lane(warp_scan<kind, CLUSTER_BLOCKS>(run), CLUSTER_BLOCKS - 1);
    }
};
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
constexpr bool IN_CLUSTER = false;
constexpr int CLUSTER_BLOCKS = 1;
template <int CHAINS> struct Inbox {
    DEVICE void open() {}
    DEVICE void ready() const {}
    DEVICE void send(int, const Run&) {}
    template <Kind kind> DEVICE Run received(int) const { return identity<kind>(); }
};
#define CLUSTERED
#endif

// Kernels of clusters are launched early: each lets the next begin when little is left to do, and may only set itself
// up and ask the L2 cache for what it will read, until all before it have ended. Every block of each waits for that, so
// the end of the kernel before is the end of all before it. (Let to begin at once, kernel after kernel would take
// places, and the blocks of each would lie unevenly on the multiprocessors.)
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
