// Products with packed weights, and soft tokens, of bfloat16 by pairs: sixteen pairs of such numbers are multiplied and
// added up in float32 by one instruction (AVX512-BF16).
//
// gircse/fast/step_kernels.py loads it where the processor has that and no AMX, and prefers it to step_kernels.cpp, whose
// calls these are. What a row gets depends on that row alone.

#include <immintrin.h>

#include "soft_token.h"

namespace
{

constexpr int PAIRS = 2 * LANES; // numbers that are multiplied at once
constexpr int PRODUCT_ROWS = 5;  // of a product, that are computed together: of six, sums leave the registers

INLINE __m512bh pairs(const bfloat16 *from)
{
    return (__m512bh)_mm512_loadu_si512(from);
}

INLINE __m512bh pair(const bfloat16 *from) // for every output
{
    int32_t both;
    memcpy(&both, from, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

// ---- Products with packed weights ----

template <int ROWS, int VECTORS>
INLINE void multiply_panel(const bfloat16 *x, long in, const bfloat16 *packed, const bfloat16 *bias, long stride,
                           bfloat16 *out)
{
    __m512 total[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < ROWS; r++)
            total[r][v] = (__m512)(bias ? load(bias + v * LANES) : floats{});
    for (long k = 0; k < in; k += 2, packed += VECTORS * PAIRS) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = pairs(packed + v * PAIRS);
        for (int r = 0; r < ROWS; r++) {
            const __m512bh both = pair(x + r * in + k);
            for (int v = 0; v < VECTORS; v++)
                total[r][v] = _mm512_dpbf16_ps(total[r][v], weights[v], both);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            store((floats)total[r][v], out + r * stride + v * LANES);
}

template <int VECTORS> INLINE void multiply_rows(const bfloat16 *x, long in, const Panel<bfloat16> &panel)
{
    const Product<bfloat16> &of = *panel.of;
    const bfloat16 *packed = (const bfloat16 *)of.packed + panel.first * in;
    const bfloat16 *bias = of.bias ? of.bias + panel.first : nullptr;
    for (long done = 0; done < panel.rows; done += PRODUCT_ROWS) {
        const long row = panel.row + done;
        bfloat16 *out = of.out + row * of.outputs + panel.first;
        by_tile<PRODUCT_ROWS>(panel.rows - done, [&](auto count) __attribute__((always_inline)) {
            multiply_panel<count, VECTORS>(x + row * in, in, packed, bias, of.outputs, out);
        });
    }
}

// ---- The soft token: softmax(h·Eᵀ) · E, with one pass over the table ----

template <int ROWS>
INLINE void score_pairs(const bfloat16 *hidden, long width, const bfloat16 *table, long n, float scale, float *scores)
{
    for (long word = 0; word < n; word += SCORED) {
        const bfloat16 *words[SCORED];
        for (long i = 0; i < SCORED; i++) // beyond the last word, that word again
            words[i] = table + (word + i < n ? word + i : n - 1) * width;
        floats found[SCORED_ROWS * SCORED] = {};
        for (long d = 0; d < width; d += PAIRS) {
            __m512bh x[SCORED];
            for (int i = 0; i < SCORED; i++)
                x[i] = pairs(words[i] + d);
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < SCORED; i++) {
                    floats &sum = found[r * SCORED + i];
                    sum = (floats)_mm512_dpbf16_ps((__m512)sum, x[i], pairs(hidden + r * width + d));
                }
        }
        store_scores<ROWS>(sums(found) * scale, scores + word);
    }
}

// Adds what `weights` make of the words to each row, (rows, width), whose numbers stay in the order of `place_of`.
template <int ROWS>
INLINE void mix_pairs(const float *weights, const bfloat16 *table, long n, long width, float *mixed)
{
    bfloat16 rounded[ROWS * WORDS];
    for (int r = 0; r < ROWS; r++)
        for (long word = 0; word < n; word += LANES)
            store(load(weights + r * WORDS + word), rounded + r * WORDS + word);
    for (long d = 0; d < width; d += PAIRS) {
        __m512 total[ROWS][2] = {};
        for (long word = 0; word < n; word += 2) {
            const __m512i even = _mm512_loadu_si512(table + word * width + d);
            const __m512i odd = word + 1 < n ? _mm512_loadu_si512(table + (word + 1) * width + d) : __m512i{};
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
            const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
            for (int r = 0; r < ROWS; r++) {
                const __m512bh both = pair(rounded + r * WORDS + word);
                total[r][0] = _mm512_dpbf16_ps(total[r][0], low, both);
                total[r][1] = _mm512_dpbf16_ps(total[r][1], high, both);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) {
                float *at = mixed + r * width + d + half * LANES;
                store(load(at) + (floats)total[r][half], at);
            }
    }
}

INLINE long place_of(long d) // unpacking puts four numbers of eight into the lower half of a vector
{
    return d / PAIRS * PAIRS + d % 8 / 4 * LANES + d % PAIRS / 8 * 4 + d % 4;
}

} // namespace

// ---- What Python calls ----

extern "C" void multiply_bfloat16(const bfloat16 *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                  int threads)
{
    const std::vector<Panel<bfloat16>> panels = panels_of((const Product<bfloat16> *)products, count, rows, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < (long)panels.size(); i++)
        by_vectors(panels[i].of->panel, [&](auto vectors) __attribute__((always_inline)) {
            multiply_rows<vectors>(x, in, panels[i]);
        });
}

extern "C" void soft_tokens_bfloat16(const bfloat16 *hidden, int64_t rows, int64_t width, const bfloat16 *table,
                                     int64_t vocabulary, float scale, bfloat16 *out, int threads)
{
    const auto shares = shares_of(vocabulary, rows, width, threads, [&](long word, Share &share) {
        static thread_local std::vector<float> scores;
        scores.resize(rows * WORDS);
        const bfloat16 *words = table + word * width;
        const long n = vocabulary - word < WORDS ? vocabulary - word : WORDS;
        soften_words(
            rows, width, n, scores.data(), share,
            [&](long r, auto count) __attribute__((always_inline)) {
                score_pairs<count>(hidden + r * width, width, words, n, scale, scores.data() + r * WORDS);
            },
            [&](long r, auto count) __attribute__((always_inline)) {
                mix_pairs<count>(scores.data() + r * WORDS, words, n, width, share.mixed.data() + r * width);
            });
    });
    join_shares(shares, rows, width, out, place_of);
}

extern "C" int version()
{
    return VERSION;
}
