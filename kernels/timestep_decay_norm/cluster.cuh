// Blocks of a thread block cluster (sm_90 and newer) that write to each other's shared memory.
#pragma once
#include "scan.cuh"

#if __CUDA_ARCH__ >= 900
// A barrier in shared memory that counts bytes; by one thread. Others may send once they have passed the cluster's.
DEVICE void open_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void expect_bytes(const uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
DEVICE void await_bytes(const uint64_t* barrier) {
    asm volatile("{\n.reg .pred done;\n"
                 "AGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE uint32_t in_block(int block, const void* own) {  // the same place in the shared memory of a block of the cluster
    uint32_t place;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(own)), "r"(block));
    return place;
}
// To the same place in a block, whose barrier counts it.
DEVICE void send_run(const Run* own_place, const uint64_t* own_barrier, int block, const Run& run) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     in_block(block, own_place)),
                 "r"(__float_as_uint(run.p)), "r"(__float_as_uint(run.q)), "r"(__float_as_uint(run.a)),
                 "r"(__float_as_uint(run.b)), "r"(in_block(block, own_barrier))
                 : "memory");
}
DEVICE void send_float(const float* own_place, const uint64_t* own_barrier, int block, float value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     in_block(block, own_place)),
                 "r"(__float_as_uint(value)), "r"(in_block(block, own_barrier))
                 : "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#endif

#if __CUDA_ARCH__ >= 900
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
