// Products of few rows with weights of 8 bits, for processors that multiply such numbers (AVX512-VNNI).
//
// gircse/fast/step_kernels.py loads it.

#include <immintrin.h>

#include "int8_parts.h"
#include "room.h"
#include "tiles.h"

namespace
{

// Up to which two rows at a time meet a whole panel. Of more, five meet two vectors of it: sums stay in registers, and
// it is read less often.
constexpr long FEW_ROWS = 16;

struct Inputs {              // of all rows
    uint8_t *first, *second; // (rows, in)
    float *steps;            // (rows)
};

INLINE __m512i four_inputs(const uint8_t *from) // for every output
{
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}

// Rows times VECTORS vectors of outputs of a panel, from vector `from` on.
template <int ROWS, int VECTORS, typename T>
INLINE void multiply_part(const Inputs &x, long row, long in, const Panel<T> &panel, int from)
{
    const int8_t *packed = (const int8_t *)panel.of->packed + panel.first * in + 4 * from * LANES;
    const uint8_t *first = x.first + row * in, *second = x.second + row * in;
    const long stride = 4 * panel.of->panel;
    integers sums[ROWS][VECTORS], rests[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = rests[r][v] = integers{};
    for (long k = 0; k < in; k += 4, packed += stride) {
        __m512i weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = _mm512_loadu_si512(packed + 4 * v * LANES);
        for (int r = 0; r < ROWS; r++) {
            const __m512i steps = four_inputs(first + r * in + k), parts = four_inputs(second + r * in + k);
            for (int v = 0; v < VECTORS; v++) {
                sums[r][v] = (integers)_mm512_dpbusd_epi32((__m512i)sums[r][v], steps, weights[v]);
                rests[r][v] = (integers)_mm512_dpbusd_epi32((__m512i)rests[r][v], parts, weights[v]);
            }
        }
    }
    // Unrolled, or the sums are in memory all the time, to be found by a number that changes.
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        const Outputs<T> outputs = outputs_of(*panel.of, panel.first + (from + v) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            store_row(outputs, row + r, x.steps[row + r], sums[r][v], rests[r][v]);
    }
}

template <int VECTORS, typename T> INLINE void multiply_rows(const Inputs &x, long in, const Panel<T> &panel)
{
    const long end = panel.row + panel.rows;
    if (panel.rows <= FEW_ROWS) {
        for (long row = panel.row; row < end; row += 2)
            by_tile<2>(end - row, [&](auto count) __attribute__((always_inline)) {
                multiply_part<count, VECTORS>(x, row, in, panel, 0);
            });
        return;
    }
    for (long row = panel.row; row < end; row += 5)
        by_tile<5>(end - row, [&](auto count) __attribute__((always_inline)) {
            for (int v = 0; v + 2 <= VECTORS; v += 2)
                multiply_part<count, 2>(x, row, in, panel, v);
            if (VECTORS % 2)
                multiply_part<count, 1>(x, row, in, panel, VECTORS - 1);
        });
}

template <typename T>
void multiply_all(const T *x, long rows, long in, const Product<T> *products, long count, int threads)
{
    static thread_local Room room;
    uint8_t *first = (uint8_t *)room.take(rows * (2 * in + sizeof(float)));
    const Inputs inputs{first, first + rows * in, (float *)(first + 2 * rows * in)};
    const std::vector<Panel<T>> panels = panels_of(products, count, rows, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            inputs.steps[r] = part_row(x + r * in, in, inputs.first + r * in, inputs.second + r * in,
                                       [](long k) { return k; });
#pragma omp for schedule(static)
        for (long i = 0; i < (long)panels.size(); i++)
            by_vectors(panels[i].of->panel, [&](auto vectors) __attribute__((always_inline)) {
                multiply_rows<vectors>(inputs, in, panels[i]);
            });
    }
}

} // namespace

// ---- What Python calls ----

extern "C" void multiply_int8_float32(const float *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                      int threads)
{
    multiply_all(x, rows, in, (const Product<float> *)products, count, threads);
}

extern "C" void multiply_int8_bfloat16(const bfloat16 *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                       int threads)
{
    multiply_all(x, rows, in, (const Product<bfloat16> *)products, count, threads);
}

extern "C" int version()
{
    return VERSION;
}
