// The moving average one step after the other, all in float32: lane n of a group of LANES holds mode n of a channel,
// and LANES steps make a round. For every dtype, length and width; the tensor-core form covers the common case faster.
// x, y (B, L, D); bos (B, L); p, q, gamma (D, N); states (B, D, N).
#include "dual.cuh"

constexpr int LANES = MODES;  // 4, 16 or 32, at least the number of modes
constexpr int THREADS = 128;

// One lane's place: a mode of a channel of a batch row. Lanes without one compute with zeros and store nothing.
struct Place {
    int lane, channel, row;
    bool has_channel, has_mode;

    DEVICE Place(int width, int modes) {
        lane = threadIdx.x % LANES;
        channel = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
        row = blockIdx.y;
        has_channel = channel < width;
        channel = has_channel ? channel : width - 1;
        has_mode = has_channel && lane < modes;
    }
    DEVICE int64_t parameter(int modes) const { return int64_t(channel) * modes + lane; }
    DEVICE int64_t state(int width, int modes) const { return (int64_t(row) * width + channel) * modes + lane; }
};

// The steps of a round in the order in which they are run; lane s loads step s.
template <class T, bool REVERSE> struct Steps {
    const uint8_t* bos;
    int length, width;
    int64_t start, stride;  // of this lane's channel

    DEVICE Steps(const Place& place, const uint8_t* bos, int length, int width)
        : bos(bos ? bos + int64_t(place.row) * length : nullptr), length(length), width(width) {
        start = int64_t(place.row) * length * width + place.channel;
    }
    DEVICE int time(int step) const { return REVERSE ? length - 1 - step : step; }
    DEVICE int64_t offset(int step) const { return start + int64_t(time(step)) * width; }
    DEVICE float value(const T* from, int step) const { return step < length ? to_float(from[offset(step)]) : 0.f; }
    DEVICE bool begins(int step) const { return bos && step < length && bos[time(step)]; }
};

// Forward: h = keep q h + p x, y = Re(gamma h) + x, from `first` to `last`. Backward in time, with x = dy and y = dx:
// e = first + gamma x, y = Re(p e) + x, first = keep q e; both states are then conjugates of gradients.
template <class T, bool REVERSE>
__global__ void __launch_bounds__(THREADS)
    scan_filter(const T* x, const uint8_t* bos, const float* p, const float2* q, const float2* gamma,
                const float2* first, T* y, float2* last, int length, int width, int modes) {
    const Place place(width, modes);
    const Steps<T, REVERSE> steps(place, bos, length, width);
    float2 h = make_float2(0.f, 0.f), decay = h, output = h;
    float input = 0.f;
    if (place.has_mode) {
        input = p[place.parameter(modes)];
        decay = q[place.parameter(modes)];
        output = gamma[place.parameter(modes)];
        if (first) h = first[place.state(width, modes)];
        if (REVERSE) h.y = -h.y;
    }
    const float2 zero = make_float2(0.f, 0.f);

    float value = steps.value(x, place.lane);
    bool begins = steps.begins(place.lane);
    for (int round = 0; round < length; round += LANES) {
        const float own = value;
        const uint32_t resets = __ballot_sync(ALL, begins);
        value = steps.value(x, round + LANES + place.lane);
        begins = steps.begins(round + LANES + place.lane);
        const int count = length - round;
        float sums[LANES];
        auto step = [&](int k, bool reset) {
            const float input_x = __shfl_sync(ALL, own, k, LANES);
            if constexpr (REVERSE) {
                h = make_float2(fmaf(output.x, input_x, h.x), fmaf(output.y, input_x, h.y));
                sums[k] = input * h.x;
                h = reset ? zero : times(decay, h);
            } else {
                if (reset) h = zero;
                h = times_plus(decay, h, make_float2(input * input_x, 0.f));
                sums[k] = output.x * h.x - output.y * h.y;
            }
        };
        if (resets == 0 && count >= LANES) {
#pragma unroll
            for (int k = 0; k < LANES; ++k) step(k, false);
        } else {
#pragma unroll
            for (int k = 0; k < LANES; ++k) {
                sums[k] = 0.f;
                if (k < count) step(k, resets >> k & 1);
            }
        }
        sum_to_own_index<LANES / 2>(sums, place.lane);
        if (place.has_channel && place.lane < count)
            y[steps.offset(round + place.lane)] = from_float<T>(sums[0] + own);
    }
    if (place.has_mode) last[place.state(width, modes)] = REVERSE ? make_float2(h.x, -h.y) : h;
}

// The entering state's share of sum_t dy_t h_t, with its derivative by q: over the steps before the first BOS, or until
// q^t no longer counts. `weight`, of the state before the first step, becomes that after the last one.
template <class T>
DEVICE Dual passed_on(const Steps<T, false>& steps, const T* dy, int lane, float2 decay, Dual& weight) {
    const Dual to_next = {decay, make_float2(1.f, 0.f)};
    Dual sum = zero_dual();
    for (int round = 0; round < steps.length; round += LANES) {
        const float own = steps.value(dy, round + lane);
        const uint32_t ends = __ballot_sync(ALL, steps.begins(round + lane));
        const int count = steps.length - round;
#pragma unroll
        for (int k = 0; k < LANES; ++k) {
            if (ends >> k & 1) weight = zero_dual();
            if (k < count) weight = times(to_next, weight);
            const float value = __shfl_sync(ALL, own, k, LANES);
            sum = times_plus(constant(make_float2(value, 0.f)), weight, sum);
        }
        if (!__any_sync(ALL, size_of(weight) > NEGLIGIBLE)) break;
    }
    return sum;
}

// The parameter gradients of every batch row, (B, D, N), from sum dy u and sum dy v, with u = keep q u + x and its
// derivative v = keep q v + (keep u before the step) by q, from zero. dlast: the gradient of the last h, or null.
template <class T>
__global__ void __launch_bounds__(THREADS)
    scan_correlate(const T* x, const T* dy, const uint8_t* bos, const float* p, const float2* q, const float2* gamma,
                   const float2* first, const float2* dlast, float* dp, float2* dq, float2* dgamma, int length,
                   int width, int modes) {
    const Place place(width, modes);
    const Steps<T, false> steps(place, bos, length, width);
    const float2 zero = make_float2(0.f, 0.f);
    const float2 decay = place.has_mode ? q[place.parameter(modes)] : zero;
    float2 u = zero, v = zero, sum_u = zero, sum_v = zero;

    float value = steps.value(x, place.lane), gradient = steps.value(dy, place.lane);
    bool begins = steps.begins(place.lane);
    for (int round = 0; round < length; round += LANES) {
        const float own_value = value, own_gradient = gradient;
        const uint32_t resets = __ballot_sync(ALL, begins);
        const int count = length - round;
        value = steps.value(x, round + LANES + place.lane);
        gradient = steps.value(dy, round + LANES + place.lane);
        begins = steps.begins(round + LANES + place.lane);
        auto step = [&](int k, bool reset) {
            if (reset) u = v = zero;
            v = times_plus(decay, v, u);
            u = times_plus(decay, u, make_float2(__shfl_sync(ALL, own_value, k, LANES), 0.f));
            const float g = __shfl_sync(ALL, own_gradient, k, LANES);
            sum_u = make_float2(fmaf(g, u.x, sum_u.x), fmaf(g, u.y, sum_u.y));
            sum_v = make_float2(fmaf(g, v.x, sum_v.x), fmaf(g, v.y, sum_v.y));
        };
        if (resets == 0 && count >= LANES) {
#pragma unroll
            for (int k = 0; k < LANES; ++k) step(k, false);
        } else {
#pragma unroll
            for (int k = 0; k < LANES; ++k)
                if (k < count) step(k, resets >> k & 1);
        }
    }
    const int64_t state = place.state(width, modes);
    Dual weight = first && place.has_mode ? constant(first[state]) : zero_dual();
    const Dual passed = first ? passed_on(steps, dy, place.lane, decay, weight) : zero_dual();
    if (place.has_mode) {
        const int64_t parameter = place.parameter(modes);
        Leaving leaving = {};
        if (dlast) leaving.add(dlast[state], Dual{u, v}, p[parameter], weight.slope);
        const Gradients to = {dp, dq, dgamma};
        to.store(state, p[parameter], gamma[parameter], Dual{sum_u, sum_v}, passed, leaving);
    }
}
