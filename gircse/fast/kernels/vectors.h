// Vectors, which are the compiler's own: no instruction is named. What else the kernels are written with.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// Inlined, so that counts that are known where it is called are constants in it.
#define INLINE static inline __attribute__((always_inline))

namespace
{

constexpr int VERSION = 5; // of the calls, as in step_kernels.py

#ifdef __AVX512F__
constexpr int LANES = 16; // numbers of a vector
#else
constexpr int LANES = 8;
#endif

constexpr int MOST_WIDTH = 256; // of a head

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

INLINE floats load(const float *from)
{
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE floats load(const bfloat16 *from)
{
    halves x;
    memcpy(&x, from, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

INLINE floats load(const int8_t *from)
{
    integers wide; // lane by lane: compilers know the one instruction for this, but not in __builtin_convertvector
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++)
        wide[lane] = from[lane];
    return __builtin_convertvector(wide, floats);
}

INLINE void store(floats x, float *to)
{
    memcpy(to, &x, sizeof x);
}

INLINE words rounded(floats x) // to bfloat16, the upper half of each: to the nearest, ties to even; NaN stays NaN
{
    const words bits = (words)x;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE void store(floats x, bfloat16 *to)
{
    halves narrow = __builtin_convertvector(rounded(x) >> 16, halves);
    memcpy(to, &narrow, sizeof narrow);
}

INLINE float sum(floats x)
{
    float total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += x[lane];
    return total;
}

// Every second number of two vectors, from the first or from the second on.
template <int FROM, size_t... I> INLINE floats every_second(floats a, floats b, std::index_sequence<I...>)
{
#ifdef __clang__
    return __builtin_shufflevector(a, b, (2 * I + FROM)...);
#else
    return __builtin_shuffle(a, b, integers{(int32_t)(2 * I + FROM)...});
#endif
}

// Of as many vectors as one has numbers, the sum of each: of pairs first, then of pairs of those.
template <int COUNT = LANES> INLINE floats sums(const floats *x)
{
    if constexpr (COUNT == 1) {
        return x[0];
    } else {
        constexpr std::make_index_sequence<LANES> lanes;
        floats halves[COUNT / 2];
        for (int i = 0; i < COUNT; i += 2)
            halves[i / 2] = every_second<0>(x[i], x[i + 1], lanes) + every_second<1>(x[i], x[i + 1], lanes);
        return sums<COUNT / 2>(halves);
    }
}

// e^x as in Cephes' expf, to 2e-7 of it; what is below -87 counts as -87, what is above 88 as 88.
INLINE floats exponential(floats x)
{
    x = x < -87.0f ? floats{} - 87.0f : x;
    x = x > 88.0f ? floats{} + 88.0f : x;
    floats scaled = x * 1.44269504f;
    integers power = __builtin_convertvector(scaled + (scaled < 0.0f ? floats{} - 0.5f : floats{} + 0.5f), integers);
    floats whole = __builtin_convertvector(power, floats);
    floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return y * (floats)((power + 127) << 23);
}

INLINE long rounded_up(long n)
{
    return (n + LANES - 1) / LANES * LANES;
}

INLINE float largest(float *scores, long n) // fills up the last vector with what no sum of exponentials will see
{
    for (long t = n; t < rounded_up(n); t++)
        scores[t] = -1e30f;
    floats most = load(scores);
    for (long t = LANES; t < n; t += LANES) {
        floats x = load(scores + t);
        most = x > most ? x : most;
    }
    float found = most[0];
    for (int lane = 1; lane < LANES; lane++)
        found = most[lane] > found ? most[lane] : found;
    return found;
}

INLINE float soften(float *scores, long n, float shift) // to e^(score - shift), in place; their sum
{
    floats total = {};
    for (long t = 0; t < n; t += LANES) {
        floats x = exponential(load(scores + t) - shift);
        store(x, scores + t);
        total += x;
    }
    return sum(total);
}

} // namespace
