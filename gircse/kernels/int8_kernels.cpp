// Products of few rows with weights of 8 bits, for processors that multiply such numbers (AVX512-VNNI).
//
// gircse/step_kernels.py loads it.

#include <immintrin.h>

#include "int8_parts.h"

namespace
{

constexpr int MOST_ROWS = 2; // that are computed together

struct Inputs {                         // of all rows
    std::vector<uint8_t> first, second; // (rows, in)
    std::vector<float> steps;           // (rows)
};

template <typename T> Inputs parts_of(const T *x, long rows, long in)
{
    Inputs inputs{std::vector<uint8_t>(rows * in), std::vector<uint8_t>(rows * in), std::vector<float>(rows)};
    for (long r = 0; r < rows; r++)
        inputs.steps[r] = part_row(x + r * in, in, inputs.first.data() + r * in, inputs.second.data() + r * in,
                                   [](long k) { return k; });
    return inputs;
}

INLINE __m512i four_inputs(const uint8_t *from) // for every output
{
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}

template <int ROWS, int VECTORS, typename T>
INLINE void multiply_panel(const Inputs &x, long row, long in, const Panel<T> &panel)
{
    const int8_t *packed = (const int8_t *)panel.of->packed + panel.first * in;
    const uint8_t *first = x.first.data() + row * in, *second = x.second.data() + row * in;
    __m512i sums[ROWS][VECTORS] = {}, rests[ROWS][VECTORS] = {};
    for (long k = 0; k < in; k += 4, packed += 4 * VECTORS * LANES)
        for (int r = 0; r < ROWS; r++) {
            const __m512i steps = four_inputs(first + r * in + k), parts = four_inputs(second + r * in + k);
            for (int v = 0; v < VECTORS; v++) {
                const __m512i weights = _mm512_loadu_si512(packed + 4 * v * LANES);
                sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], steps, weights);
                rests[r][v] = _mm512_dpbusd_epi32(rests[r][v], parts, weights);
            }
        }
    for (int v = 0; v < VECTORS; v++) {
        const Outputs<T> outputs = outputs_of(*panel.of, panel.first + v * LANES);
        for (int r = 0; r < ROWS; r++)
            store_row(outputs, row + r, x.steps[row + r], (integers)sums[r][v], (integers)rests[r][v]);
    }
}

template <int VECTORS, typename T> INLINE void multiply_rows(const Inputs &x, long rows, long in, const Panel<T> &panel)
{
    long row = 0;
    for (; row + MOST_ROWS <= rows; row += MOST_ROWS)
        multiply_panel<MOST_ROWS, VECTORS>(x, row, in, panel);
    for (; row < rows; row++)
        multiply_panel<1, VECTORS>(x, row, in, panel);
}

template <typename T> INLINE void multiply_job(const Inputs &x, long rows, long in, const Panel<T> &panel)
{
    if (panel.of->panel == 64)
        multiply_rows<64 / LANES>(x, rows, in, panel);
    else if (panel.of->panel == 48)
        multiply_rows<48 / LANES>(x, rows, in, panel);
    else if (panel.of->panel == 32)
        multiply_rows<32 / LANES>(x, rows, in, panel);
    else
        multiply_rows<16 / LANES>(x, rows, in, panel);
}

template <typename T>
void multiply_all(const T *x, long rows, long in, const Product<T> *products, long count, int threads)
{
    const Inputs inputs = parts_of(x, rows, in);
    const std::vector<Panel<T>> panels = panels_of(products, count);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < (long)panels.size(); i++)
        multiply_job(inputs, rows, in, panels[i]);
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
