// Which logits are dropped: a hash of the seed, the row and the key's place in the row's window.
#pragma once
#include "ptx.cuh"

DEVICE uint32_t mix(uint32_t x) {
    x ^= x >> 16, x *= 0x21f0aaadu;
    x ^= x >> 15, x *= 0x735a2d97u;
    return x ^ (x >> 15);
}

DEVICE uint32_t row_key(uint64_t seed, int head, int t) {
    uint32_t of_head = mix(mix(uint32_t(seed) + uint32_t(head) * 0x9e3779b9u) ^ uint32_t(seed >> 32));
    return mix(of_head + uint32_t(t) * 0x85ebca6bu);
}

DEVICE bool dropped(uint32_t key, int j, uint32_t threshold) {
    return mix(key ^ (uint32_t(j + 1) * 0x9e3779b9u)) < threshold;
}
