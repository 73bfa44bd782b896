// What the kernels of whole sequences (filter.cu) and of single tiles (piece.cu) do alike.
#pragma once
#include "tiles.cuh"

// The state after the first `count` steps of a chunk, step by step: lane n keeps mode n and, of x, steps 2 n and 2 n + 1.
template <bool REVERSE>
DEVICE float2 state_after(uint32_t x, uint32_t drops, float2 state, float2 q, float2 input, int count) {
    for (int step = 0; step < count; ++step) {
        const uint32_t word = __shfl_sync(ALL, x, step / 2);
        const float value = step % 2 ? high_bf16(word) : low_bf16(word);
        if (drops >> step & 1) state = make_float2(0.f, 0.f);
        const float2 added = make_float2(input.x * value, input.y * value);
        state = REVERSE ? times(q, make_float2(state.x + added.x, state.y + added.y)) : times_plus(q, state, added);
    }
    return state;
}

// Lane n of a warp starts to copy the state of mode n before a batch row, zero where there is none.
DEVICE void fetch_states(float2 (&to)[MODES], const float2* from, bool there, const void* anywhere) {
    const int lane = threadIdx.x % 32;
    if (lane < MODES) copy_async_8(shared_address(&to[lane]), there ? from + lane : anywhere, there);
}
