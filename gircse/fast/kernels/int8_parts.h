// Inputs of products with weights of 8 bits, and what is made of the sums.
//
// As in gircse/fast/int8.py an input is not rounded to 8 bits, but goes through the product in two parts of 8 bits. Sums are
// of whole numbers, so that all ways to them give the same.
#pragma once

#include "products.h"

namespace
{

constexpr int ZERO = 127;      // what stands for 0 in either part
constexpr float PARTS = 254;   // steps of the second part that make one of the first
constexpr float LARGEST = 127; // steps of the first part, in both directions
constexpr float TINY = 1.1754944e-38f;

INLINE void store_bytes(integers x, uint8_t *to)
{
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    const bytes narrow = __builtin_convertvector(x, bytes);
    memcpy(to, &narrow, sizeof narrow);
}

// What one of the first part stands for. Both parts go to `place(k)` of where they begin.
template <typename T, typename Place>
INLINE float part_row(const T *x, long in, uint8_t *first, uint8_t *second, Place place)
{
    floats largest = {};
    integers wrong = {};
    for (long k = 0; k < in; k += LANES) {
        const floats one = load(x + k), size = one < 0.0f ? -one : one;
        largest = size > largest ? size : largest;
        wrong |= one != one; // NaN
    }
    float most = TINY;
    bool is_wrong = false;
    for (int lane = 0; lane < LANES; lane++) {
        most = largest[lane] > most ? largest[lane] : most;
        is_wrong |= wrong[lane] != 0;
    }
    const float step = most / LARGEST, each = 1 / step;
    for (long k = 0; k < in; k += LANES) {
        const floats steps = load(x + k) * each + (ZERO + 0.5f); // from 0.5 to 254.5
        const integers whole = __builtin_convertvector(steps, integers);
        store_bytes(whole, first + place(k));
        const floats rest = steps - __builtin_convertvector(whole, floats);
        store_bytes(__builtin_convertvector(rest * PARTS + 0.5f, integers), second + place(k));
    }
    return is_wrong ? __builtin_nanf("") : step;
}

template <typename T> struct Outputs { // a vector of them
    floats scale, offset;
    integers zero; // what the sums are for inputs of 0
    T *out;
    long stride;
};

template <typename T> INLINE Outputs<T> outputs_of(const Product<T> &of, long output)
{
    Outputs<T> found{load(of.scales + output), of.bias ? load(of.bias + output) : floats{}, {}, of.out + output,
                     of.outputs};
    memcpy(&found.zero, of.sums + output, sizeof found.zero);
    found.zero *= ZERO;
    return found;
}

// Of a row, from the sums of both parts.
template <typename T>
INLINE void store_row(const Outputs<T> &outputs, long row, float step, integers first, integers second)
{
    const floats steps = __builtin_convertvector(first - outputs.zero, floats);
    const floats parts = __builtin_convertvector(second - outputs.zero, floats);
    const floats product = (steps + parts * (1 / PARTS)) * (step * outputs.scale);
    store(product + outputs.offset, outputs.out + row * outputs.stride);
}

} // namespace
