// Attention of one query a head, which the keys and values of its position are written for.
#pragma once

#include <vector>

#include <omp.h>

#include "tiles.h"

namespace
{

constexpr int MOST_CHUNKS = MOST_WIDTH / LANES;

template <typename T> struct Attention {
    const T *query, *key, *value;         // of the new position: (rows, heads, width), (rows, shared, width) twice
    T *keys, *values;                     // (rows, shared, capacity, width)
    const int64_t *starts;                // (rows): the first position that is no padding
    const T *prefix_keys, *prefix_values; // (shared, prefix, width): what all rows begin with
    T *out;                               // (rows, heads, width)
    long rows, heads, shared, width, capacity, length, prefix;
    float scaling;
};

template <int G, typename T>
INLINE void score(const floats *query, int chunks, const T *keys, const T *values, long n, float *scores, long room)
{
    for (long t = 0; t < n; t++, keys += chunks * LANES, values += chunks * LANES) {
        floats total[G] = {};
        for (int c = 0; c < chunks; c++) {
            __builtin_prefetch(values + c * LANES);
            floats x = load(keys + c * LANES);
            for (int i = 0; i < G; i++)
                total[i] += query[i * chunks + c] * x;
        }
        for (int i = 0; i < G; i++)
            scores[i * room + t] = sum(total[i]);
    }
}

// `next` is read after this: rows are too short for the processor to foresee it.
template <int G, typename T>
INLINE void mix(const float *scores, long room, int chunks, const T *values, long n, const T *next, floats *mixed)
{
    for (long t = 0; t < n; t++, values += chunks * LANES, next += chunks * LANES) {
        for (int c = 0; c < chunks; c++) {
            __builtin_prefetch(next + c * LANES);
            floats x = load(values + c * LANES);
            for (int i = 0; i < G; i++)
                mixed[i * chunks + c] += scores[i * room + t] * x;
        }
    }
}

template <int G, typename T>
INLINE void attend_tile(const Attention<T> &a, long row, long head, const T *query, int chunks, float *scores, T *out)
{
    const long start = a.starts[row], own = a.length + 1 - start, seen = a.prefix + own, room = rounded_up(seen);
    const long first = ((row * a.shared + head) * a.capacity + start) * a.width, before = head * a.prefix * a.width;
    floats q[G * MOST_CHUNKS], mixed[G * MOST_CHUNKS];
    for (int c = 0; c < G * chunks; c++) {
        q[c] = load(query + c * LANES) * a.scaling;
        mixed[c] = floats{};
    }
    score<G>(q, chunks, a.prefix_keys + before, a.prefix_values + before, a.prefix, scores, room);
    score<G>(q, chunks, a.keys + first, a.values + first, own, scores + a.prefix, room);
    float total[G];
    for (int i = 0; i < G; i++)
        total[i] = soften(scores + i * room, seen, largest(scores + i * room, seen));
    mix<G>(scores, room, chunks, a.prefix_values + before, a.prefix, a.prefix_values + before, mixed);
    const bool last = row + 1 == a.rows && head + 1 == a.shared;
    mix<G>(scores + a.prefix, room, chunks, a.values + first, own, a.keys + first + (last ? 0 : a.capacity * a.width),
           mixed);
    for (int i = 0; i < G; i++)
        for (int c = 0; c < chunks; c++)
            store(mixed[i * chunks + c] / total[i], out + (i * chunks + c) * LANES);
}

template <int CHUNKS, typename T> INLINE void attend_head(const Attention<T> &a, long job, float *scores)
{
    const long row = job / a.shared, head = job % a.shared, each = a.heads / a.shared;
    const int chunks = CHUNKS ? CHUNKS : (int)(a.width / LANES); // a constant where it is given
    const long newest = (job * a.capacity + a.length) * a.width;
    memcpy(a.keys + newest, a.key + job * a.width, a.width * sizeof(T));
    memcpy(a.values + newest, a.value + job * a.width, a.width * sizeof(T));
    for (long i = 0; i < each; i += TILE) {
        const long place = (row * a.heads + head * each + i) * a.width;
        by_tile(each - i, [&](auto count) __attribute__((always_inline)) {
            attend_tile<count>(a, row, head, a.query + place, chunks, scores, a.out + place);
        });
    }
}

template <typename T> INLINE void attend_job(const Attention<T> &a, long job, float *scores)
{
    if (a.width == 64)
        attend_head<64 / LANES>(a, job, scores);
    else if (a.width == 128)
        attend_head<128 / LANES>(a, job, scores);
    else
        attend_head<0>(a, job, scores);
}

template <typename T> void attend_all(const Attention<T> &a, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(TILE * rounded_up(a.prefix + a.length + 1));
#pragma omp for schedule(static)
        for (long job = 0; job < a.rows * a.shared; job++)
            attend_job(a, job, scores.data());
    }
}

} // namespace
