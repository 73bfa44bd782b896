// Complex arithmetic of the modes.
#pragma once
#include "ptx.cuh"

constexpr uint32_t ALL = 0xffffffffu;

DEVICE float2 times(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }

// a b + c
DEVICE float2 times_plus(float2 a, float2 b, float2 c) {
    return make_float2(fmaf(a.x, b.x, fmaf(-a.y, b.y, c.x)), fmaf(a.x, b.y, fmaf(a.y, b.x, c.y)));
}

DEVICE float2 square(float2 a) { return make_float2(a.x * a.x - a.y * a.y, 2.f * a.x * a.y); }
