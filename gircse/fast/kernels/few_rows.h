// Products of few rows, for processors without AMX and for float32; of any number with weights of 8 bits, for processors
// that do not multiply those: they become float32 on the way.
#pragma once

#include "products.h"
#include "tiles.h"

namespace
{

constexpr int WIDENED_ROWS = 6; // that meet two vectors of weights of 8 bits: sums fit into sixteen registers

template <int ROWS, int VECTORS>
INLINE void multiply_panel(const float *x, long in, const float *panel, const float *bias, long stride, float *out)
{
    floats total[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < ROWS; r++)
            total[r][v] = bias ? load(bias + v * LANES) : floats{};
    for (long k = 0; k < in; k++, panel += VECTORS * LANES)
        for (int v = 0; v < VECTORS; v++) {
            floats weights = load(panel + v * LANES);
            for (int r = 0; r < ROWS; r++)
                total[r][v] += x[r * in + k] * weights;
        }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            store(total[r][v], out + r * stride + v * LANES);
}

template <int ROWS, int VECTORS>
INLINE void multiply_panel(const float *x, long in, const bfloat16 *panel, const bfloat16 *bias, long stride,
                           bfloat16 *out)
{
    floats even[ROWS][VECTORS], odd[ROWS][VECTORS] = {};
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < ROWS; r++)
            even[r][v] = bias ? load(bias + v * LANES) : floats{};
    for (long k = 0; k < in; k += 2, panel += 2 * VECTORS * LANES)
        for (int v = 0; v < VECTORS; v++) {
            words pairs;
            memcpy(&pairs, panel + 2 * v * LANES, sizeof pairs);
            floats first = (floats)(pairs << 16), second = (floats)(pairs & 0xffff0000);
            for (int r = 0; r < ROWS; r++) {
                even[r][v] += x[r * in + k] * first;
                odd[r][v] += x[r * in + k + 1] * second;
            }
        }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            store(even[r][v] + odd[r][v], out + r * stride + v * LANES);
}

// Weights of 8 bits of a panel: (in, VECTORS * LANES), one input after the other.
template <int ROWS, int VECTORS, typename T>
INLINE void multiply_panel(const float *x, long in, const Panel<T> &panel, long row)
{
    const Product<T> &of = *panel.of;
    const int8_t *packed = (const int8_t *)of.packed + panel.first * in;
    floats total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            total[r][v] = floats{};
    x += row * in;
    for (long k = 0; k < in; k++, packed += VECTORS * LANES) {
        floats weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = load(packed + v * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                total[r][v] += x[r * in + k] * weights[v];
    }
    // Unrolled, or the sums are in memory all the time, to be found by a number that changes.
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        const long output = panel.first + v * LANES;
        const floats scale = load(of.scales + output), offset = of.bias ? load(of.bias + output) : floats{};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            store(total[r][v] * scale + offset, of.out + (row + r) * of.outputs + output);
    }
}

template <int VECTORS, typename T>
INLINE void multiply_rows(const float *x, long rows, long in, const T *panel, const T *bias, long stride, T *out)
{
    for (long r = 0; r < rows; r += TILE, x += TILE * in, out += TILE * stride) {
        by_tile(rows - r, [&](auto count) __attribute__((always_inline)) {
            multiply_panel<count, VECTORS>(x, in, panel, bias, stride, out);
        });
    }
}

template <typename T> INLINE void multiply_job(const float *x, long in, const Panel<T> &panel)
{
    const Product<T> &of = *panel.of;
    const long rows = panel.rows;
    if (of.scales) {
        for (long row = panel.row; row < panel.row + rows; row += WIDENED_ROWS)
            by_tile<WIDENED_ROWS>(panel.row + rows - row, [&](auto count) __attribute__((always_inline)) {
                multiply_panel<count, 2>(x, in, panel, row);
            });
        return;
    }
    const T *packed = (const T *)of.packed + panel.first * in, *bias = of.bias ? of.bias + panel.first : nullptr;
    T *out = of.out + panel.row * of.outputs + panel.first;
    x += panel.row * in;
    by_vectors(of.panel, [&](auto vectors) __attribute__((always_inline)) {
        multiply_rows<vectors>(x, rows, in, packed, bias, of.outputs, out);
    });
}

template <typename T> std::vector<float> widened(const T *x, long n)
{
    std::vector<float> wide(n);
    for (long i = 0; i < n; i += LANES)
        store(load(x + i), wide.data() + i);
    return wide;
}

template <typename T>
void multiply_all(const T *x, long rows, long in, const Product<T> *products, long count, int threads)
{
    const std::vector<float> wide = widened(x, rows * in);
    const std::vector<Panel<T>> panels = panels_of(products, count, rows, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < (long)panels.size(); i++)
        multiply_job(wide.data(), in, panels[i]);
}

} // namespace
