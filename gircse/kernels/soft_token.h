// The soft token of few rows, softmax(h·Eᵀ) · E, with one pass over the table.
#pragma once

#include <utility>
#include <vector>

#include <omp.h>

#include "few_rows.h"

namespace
{

constexpr int WORDS = 64; // of the vocabulary that are computed together

struct Share {                             // what a thread has found in its part of the vocabulary, of each row
    std::vector<float> most, total, mixed; // the largest logit; sums of e^(logit - most) and of it times E
};

// Logits of a row to e^(logit - most), in place; what was found before shrinks if they are larger.
INLINE void soften_row(float *scores, long n, long width, float &most, float &total, float *mixed)
{
    const float block = largest(scores, n), shift = block > most ? block : most;
    const float shrink = exponential(floats{} + (most - shift))[0];
    total = total * shrink + soften(scores, n, shift);
    most = shift;
    for (long d = 0; shrink < 1 && d < width; d += LANES)
        store(load(mixed + d) * shrink, mixed + d);
}

template <int R, typename T>
INLINE void soften_words(const float *hidden, long width, const T *table, long n, float *most, float *total,
                         float *mixed)
{
    float scores[R][WORDS] = {};
    for (long t = 0; t < n; t++) {
        floats found[R] = {};
        for (long d = 0; d < width; d += LANES) {
            floats x = load(table + t * width + d);
            for (int r = 0; r < R; r++)
                found[r] += load(hidden + r * width + d) * x;
        }
        for (int r = 0; r < R; r++)
            scores[r][t] = sum(found[r]);
    }
    for (int r = 0; r < R; r++)
        soften_row(scores[r], n, width, most[r], total[r], mixed + r * width);
    long t = 0;
    for (; t + 4 <= n; t += 4, table += 4 * width)
        for (long d = 0; d < width; d += LANES) {
            floats a = load(table + d), b = load(table + width + d);
            floats c = load(table + 2 * width + d), e = load(table + 3 * width + d);
            for (int r = 0; r < R; r++) {
                const float *p = scores[r] + t;
                store(load(mixed + r * width + d) + (p[0] * a + p[1] * b) + (p[2] * c + p[3] * e),
                      mixed + r * width + d);
            }
        }
    for (; t < n; t++, table += width)
        for (long d = 0; d < width; d += LANES)
            for (int r = 0; r < R; r++)
                store(load(mixed + r * width + d) + scores[r][t] * load(table + d), mixed + r * width + d);
}

template <typename T>
INLINE void soften_job(const float *hidden, long rows, long width, const T *table, long n, Share &share)
{
    for (long r = 0; r < rows; r += TILE) {
        const float *h = hidden + r * width;
        float *most = share.most.data() + r, *total = share.total.data() + r, *mixed = share.mixed.data() + r * width;
        by_tile(rows - r, [&](auto count) __attribute__((always_inline)) {
            soften_words<count>(h, width, table, n, most, total, mixed);
        });
    }
}

// `work` is called with the first of WORDS words and the share of its thread.
template <typename Work> std::vector<Share> shares_of(long vocabulary, long rows, long width, int threads, Work work)
{
    const long blocks = (vocabulary + WORDS - 1) / WORDS;
    std::vector<Share> shares(threads);
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        Share share{std::vector<float>(rows, -1e30f), std::vector<float>(rows), std::vector<float>(rows * width)};
        for (long block = blocks * me / all; block < blocks * (me + 1) / all; block++)
            work(block * WORDS, share);
        shares[me] = std::move(share);
    }
    return shares;
}

// `place(d)` is where number d of a row lies in a share.
template <typename T, typename Place>
void join_shares(const std::vector<Share> &shares, long rows, long width, T *out, Place place)
{
    for (long r = 0; r < rows; r++) {
        float most = -1e30f, total = 0;
        for (const Share &share : shares)
            if (!share.most.empty() && share.most[r] > most)
                most = share.most[r];
        std::vector<float> mixed(width);
        for (const Share &share : shares) {
            if (share.most.empty()) // fewer threads than were asked for
                continue;
            const float shrink = exponential(floats{} + (share.most[r] - most))[0];
            total += shrink * share.total[r];
            for (long d = 0; d < width; d++)
                mixed[d] += shrink * share.mixed[r * width + place(d)];
        }
        for (long d = 0; d < width; d += LANES)
            store(load(mixed.data() + d) / total, out + r * width + d);
    }
}

template <typename T>
void soft_tokens(const T *hidden, long rows, long width, const T *table, long vocabulary, float scale, T *out,
                 int threads)
{
    std::vector<float> scaled = widened(hidden, rows * width);
    for (float &x : scaled)
        x *= scale;
    const auto shares = shares_of(vocabulary, rows, width, threads, [&](long word, Share &share) {
        const long left = vocabulary - word;
        soften_job(scaled.data(), rows, width, table + word * width, left < WORDS ? left : WORDS, share);
    });
    join_shares(shares, rows, width, out, [](long d) { return d; });
}

} // namespace
