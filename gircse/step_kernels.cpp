// What a soft token needs on a CPU: attention, positions, norms and gates; with few rows products and p·E too.
//
// gircse/step_kernels.py loads it and checks shapes; nothing here knows Python or PyTorch. PyTorch's operations are
// made for many rows: for one query a head, or one row of a product, they take several times as long as reading their
// input does. Sums are taken in float32 and rounded once, and what a row gets depends on that row alone.
//
// Vectors are the compiler's own, so no instruction is named. It is compiled for AVX-512 and for AVX2 (pyproject.toml).

#include <type_traits>
#include <utility>

#include <omp.h>

#include "step_kernels.h"

namespace
{

constexpr int MOST_WIDTH = 256; // of a head
constexpr int MOST_CHUNKS = MOST_WIDTH / LANES;
constexpr int TILE = 4;   // queries, or rows of a product, that are computed together
constexpr int WORDS = 64; // of the vocabulary that are computed together

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

// Call with how many of what is left are computed together, as a type, so that loops over them are unrolled.
template <typename Work> INLINE void by_tile(long left, Work work)
{
    if (left == 1)
        work(std::integral_constant<int, 1>{});
    else if (left == 2)
        work(std::integral_constant<int, 2>{});
    else if (left == 3)
        work(std::integral_constant<int, 3>{});
    else
        work(std::integral_constant<int, TILE>{});
}

// ---- Attention of one query a head ----

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

// ---- Positions, norms and gates ----

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

// ---- Products of few rows with packed weights ----

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

template <int VECTORS, typename T>
INLINE void multiply_rows(const float *x, long rows, long in, const T *panel, const T *bias, long stride, T *out)
{
    for (long r = 0; r < rows; r += TILE, x += TILE * in, out += TILE * stride) {
        by_tile(rows - r, [&](auto count) __attribute__((always_inline)) {
            multiply_panel<count, VECTORS>(x, in, panel, bias, stride, out);
        });
    }
}

template <typename T> INLINE void multiply_job(const float *x, long rows, long in, const Panel<T> &panel)
{
    const Product<T> &of = *panel.of;
    const T *packed = of.packed + panel.first * in, *bias = of.bias ? of.bias + panel.first : nullptr;
    T *out = of.out + panel.first;
    if (of.panel == 64)
        multiply_rows<64 / LANES>(x, rows, in, packed, bias, of.outputs, out);
    else if (of.panel == 48)
        multiply_rows<48 / LANES>(x, rows, in, packed, bias, of.outputs, out);
    else if (of.panel == 32)
        multiply_rows<32 / LANES>(x, rows, in, packed, bias, of.outputs, out);
    else
        multiply_rows<16 / LANES>(x, rows, in, packed, bias, of.outputs, out);
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
    const std::vector<Panel<T>> panels = panels_of(products, count);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < (long)panels.size(); i++)
        multiply_job(wide.data(), rows, in, panels[i]);
}

// ---- The soft token: softmax(h·Eᵀ) · E, with one pass over the table ----

struct Share {                             // what a thread has found in its part of the vocabulary, of each row
    std::vector<float> most, total, mixed; // the largest logit; sums of e^(logit - most) and of it times E
};

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
    for (int r = 0; r < R; r++) {
        const float block = largest(scores[r], n), shift = block > most[r] ? block : most[r];
        const float shrink = exponential(floats{} + (most[r] - shift))[0];
        total[r] = total[r] * shrink + soften(scores[r], n, shift);
        most[r] = shift;
        for (long d = 0; shrink < 1 && d < width; d += LANES)
            store(load(mixed + r * width + d) * shrink, mixed + r * width + d);
    }
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

template <typename T>
void soft_tokens(const T *hidden, long rows, long width, const T *table, long vocabulary, float scale, T *out,
                 int threads)
{
    std::vector<float> scaled = widened(hidden, rows * width);
    for (float &x : scaled)
        x *= scale;
    const long blocks = (vocabulary + WORDS - 1) / WORDS;
    std::vector<Share> shares(threads);
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        Share share{std::vector<float>(rows, -1e30f), std::vector<float>(rows), std::vector<float>(rows * width)};
        for (long block = blocks * me / all; block < blocks * (me + 1) / all; block++) {
            const long left = vocabulary - block * WORDS;
            soften_job(scaled.data(), rows, width, table + block * WORDS * width, left < WORDS ? left : WORDS, share);
        }
        shares[me] = std::move(share);
    }
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
                mixed[d] += shrink * share.mixed[r * width + d];
        }
        for (long d = 0; d < width; d += LANES)
            store(load(mixed.data() + d) / total, out + r * width + d);
    }
}

} // namespace

// ---- What Python calls, once for each dtype ----

#define ENTRIES(DTYPE, T)                                                                                              \
    extern "C" void attend_##DTYPE(const T *query, const T *key, const T *value, T *keys, T *values,                   \
                                   const int64_t *starts, const T *prefix_keys, const T *prefix_values, T *out,        \
                                   int64_t rows, int64_t heads, int64_t shared, int64_t width, int64_t capacity,       \
                                   int64_t length, int64_t prefix, float scaling, int threads)                         \
    {                                                                                                                  \
        attend_all(Attention<T>{query, key, value, keys, values, starts, prefix_keys, prefix_values, out, rows, heads, \
                                shared, width, capacity, length, prefix, scaling},                                     \
                   threads);                                                                                           \
    }                                                                                                                  \
    extern "C" void turn_##DTYPE(T *x, const float *cosines, const float *sines, int64_t rows, int64_t heads,          \
                                 int64_t width, int threads)                                                           \
    {                                                                                                                  \
        turn_all(x, cosines, sines, rows, heads, width, threads);                                                      \
    }                                                                                                                  \
    extern "C" void norm_##DTYPE(T *x, const T *more, const T *weight, float epsilon, int64_t rows, int64_t width,     \
                                 T *out, int threads)                                                                  \
    {                                                                                                                  \
        norm_all(x, more, weight, epsilon, rows, width, out, threads);                                                 \
    }                                                                                                                  \
    extern "C" void gate_##DTYPE(const T *gate, const T *up, int64_t n, T *out, int threads)                           \
    {                                                                                                                  \
        gate_all(gate, up, n, out, threads);                                                                           \
    }                                                                                                                  \
    extern "C" void multiply_##DTYPE(const T *x, int64_t rows, int64_t in, const void *products, int64_t count,        \
                                     int threads)                                                                      \
    {                                                                                                                  \
        multiply_all(x, rows, in, (const Product<T> *)products, count, threads);                                       \
    }                                                                                                                  \
    extern "C" void soft_tokens_##DTYPE(const T *hidden, int64_t rows, int64_t width, const T *table,                  \
                                        int64_t vocabulary, float scale, T *out, int threads)                          \
    {                                                                                                                  \
        soft_tokens(hidden, rows, width, table, vocabulary, scale, out, threads);                                      \
    }

extern "C" int version()
{
    return VERSION;
}

ENTRIES(float32, float)
ENTRIES(bfloat16, bfloat16)
