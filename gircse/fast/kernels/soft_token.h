// The soft token, softmax(h·Eᵀ) · E, with one pass over the table.
#pragma once

#include <utility>
#include <vector>

#include <omp.h>

#include "few_rows.h"

namespace
{

constexpr int WORDS = 64;                   // of the vocabulary that are computed together
constexpr int SCORED_ROWS = TILE;           // whose logits are, with some words at once:
constexpr int SCORED = LANES / SCORED_ROWS; // as many sums as a vector has numbers
constexpr int MIXED_ROWS = LANES / 2;       // whose sums of words are

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

// Of SCORED_ROWS rows, SCORED words each.
template <int R> INLINE void store_scores(floats scores, float *to)
{
    for (int r = 0; r < R; r++)
        memcpy(to + r * WORDS, (const float *)&scores + r * SCORED, SCORED * sizeof(float));
}

// Of few rows, word by word, as memory lies.
template <int R, typename T>
INLINE void score_in_order(const float *hidden, long width, const T *table, long n, float *scores)
{
    for (long word = 0; word < n; word++, table += width) {
        floats found[R] = {};
        for (long d = 0; d < width; d += LANES) {
            const floats x = load(table + d);
            for (int r = 0; r < R; r++)
                found[r] += load(hidden + r * width + d) * x;
        }
        for (int r = 0; r < R; r++)
            scores[r * WORDS + word] = sum(found[r]);
    }
}

// Of SCORED_ROWS rows, which several words share a load of.
template <typename T>
INLINE void score_words(const float *hidden, long width, const T *table, long n, float *scores)
{
    for (long word = 0; word < n; word += SCORED) {
        const T *words[SCORED];
        for (long i = 0; i < SCORED; i++) // beyond the last word, that word again
            words[i] = table + (word + i < n ? word + i : n - 1) * width;
        floats found[SCORED_ROWS * SCORED] = {};
        for (long d = 0; d < width; d += LANES) {
            floats x[SCORED];
            for (int i = 0; i < SCORED; i++)
                x[i] = load(words[i] + d);
            for (int r = 0; r < SCORED_ROWS; r++) {
                const floats h = load(hidden + r * width + d);
                for (int i = 0; i < SCORED; i++)
                    found[r * SCORED + i] += h * x[i];
            }
        }
        store_scores<SCORED_ROWS>(sums(found), scores + word);
    }
}

// Adds what `weights` make of the words to each row, (rows, width): VECTORS vectors of it, from d on.
template <int R, int VECTORS, typename T>
INLINE void mix_part(const float *weights, const T *table, long n, long width, long d, float *mixed)
{
    floats total[R][VECTORS] = {};
    for (long word = 0; word < n; word++)
        for (int v = 0; v < VECTORS; v++) {
            const floats x = load(table + word * width + d + v * LANES);
            for (int r = 0; r < R; r++)
                total[r][v] += weights[r * WORDS + word] * x;
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            float *at = mixed + r * width + d + v * LANES;
            store(load(at) + total[r][v], at);
        }
}

template <int R, typename T>
INLINE void mix_words(const float *weights, const T *table, long n, long width, float *mixed)
{
    constexpr int VECTORS = R < 3 ? 4 : 2; // enough sums that none waits for itself
    long d = 0;
    for (; d + VECTORS * LANES <= width; d += VECTORS * LANES)
        mix_part<R, VECTORS>(weights, table, n, width, d, mixed);
    for (; d < width; d += LANES)
        mix_part<R, 1>(weights, table, n, width, d, mixed);
}

// Of `n` words: `score(row, count)` writes logits of some rows, `mix(row, count)` adds up the words for some.
template <typename Score, typename Mix>
INLINE void soften_words(long rows, long width, long n, float *scores, Share &share, Score score, Mix mix)
{
    for (long r = 0; r < rows; r += SCORED_ROWS)
        by_tile<SCORED_ROWS>(rows - r, [&](auto count) __attribute__((always_inline)) { score(r, count); });
    for (long r = 0; r < rows; r++)
        soften_row(scores + r * WORDS, n, width, share.most[r], share.total[r], share.mixed.data() + r * width);
    for (long r = 0; r < rows; r += MIXED_ROWS)
        by_tile<MIXED_ROWS>(rows - r, [&](auto count) __attribute__((always_inline)) { mix(r, count); });
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
        static thread_local std::vector<float> scores;
        scores.resize(rows * WORDS);
        const T *words = table + word * width;
        const long n = vocabulary - word < WORDS ? vocabulary - word : WORDS;
        soften_words(
            rows, width, n, scores.data(), share,
            [&](long r, auto count) __attribute__((always_inline)) {
                const float *some = scaled.data() + r * width;
                if constexpr (LANES == 16 && count == SCORED_ROWS) // AVX2 has too few registers
                    if (rows > SCORED_ROWS)
                        return score_words(some, width, words, n, scores.data() + r * WORDS);
                score_in_order<count>(some, width, words, n, scores.data() + r * WORDS);
            },
            [&](long r, auto count) __attribute__((always_inline)) {
                mix_words<count>(scores.data() + r * WORDS, words, n, width, share.mixed.data() + r * width);
            });
    });
    join_shares(shares, rows, width, out, [](long d) { return d; });
}

} // namespace
