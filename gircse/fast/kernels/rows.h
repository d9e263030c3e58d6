// What is computed of every row by itself: positions, norms and gates.
#pragma once

#include "vectors.h"

namespace
{

// Rotary positions, in place: the two halves of a head are turned against each other.
template <typename T> INLINE void turn_row(T *x, const float *cosines, const float *sines, long heads, long width)
{
    float wide[MOST_WIDTH], turned[MOST_WIDTH];
    const long half = width / 2;
    for (; heads > 0; heads--, x += width) {
        for (long d = 0; d < width; d += LANES)
            store(load(x + d), wide + d);
        for (long d = 0; d < half; d++) {
            turned[d] = wide[d] * cosines[d] - wide[d + half] * sines[d];
            turned[d + half] = wide[d + half] * cosines[d + half] + wide[d] * sines[d + half];
        }
        for (long d = 0; d < width; d += LANES)
            store(load(turned + d), x + d);
    }
}

template <typename T>
void turn_all(T *x, const float *cosines, const float *sines, long rows, long heads, long width, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * width > 1 << 14)
    for (long row = 0; row < rows; row++)
        turn_row(x + row * heads * width, cosines + row * width, sines + row * width, heads, width);
}

template <typename T> INLINE void norm_row(T *x, const T *more, const T *weight, float epsilon, long width, T *out)
{
    floats total = {};
    for (long d = 0; d < width; d += LANES) {
        if (more)
            store(load(x + d) + load(more + d), x + d);
        floats rounded = load(x + d);
        total += rounded * rounded;
    }
    const float scale = 1 / __builtin_sqrtf(sum(total) / (float)width + epsilon);
    for (long d = 0; d < width; d += LANES)
        store(load(x + d) * scale * load(weight + d), out + d);
}

template <typename T>
void norm_all(T *x, const T *more, const T *weight, float epsilon, long rows, long width, T *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > 1 << 14)
    for (long row = 0; row < rows; row++)
        norm_row(x + row * width, more ? more + row * width : nullptr, weight, epsilon, width, out + row * width);
}

template <typename T> INLINE void gate_part(const T *gate, const T *up, long n, T *out)
{
    for (long d = 0; d < n; d += LANES) {
        floats x = load(gate + d);
        store(x / (1.0f + exponential(-x)) * load(up + d), out + d);
    }
}

template <typename T> void gate_all(const T *gate, const T *up, long n, T *out, int threads)
{
    const long part = 8 * 1024, parts = (n + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 1)
    for (long i = 0; i < parts; i++)
        gate_part(gate + i * part, up + i * part, n - i * part < part ? n - i * part : part, out + i * part);
}

} // namespace
