// The time-step norms (spec sections 1.1 and 1.2) of a piece of a stream: one kernel forward and one backward.
#include "piece_forward.cuh"
#include "piece_backward.cuh"

extern "C" __global__ void __launch_bounds__(1024) parameters(const float* partial, P* dweight, P* dbias, int N, int D) {
    wait_for_previous();
    let_next_begin();
    sum_partials(partial, dweight, dbias, N, D);
}
