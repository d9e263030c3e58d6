// What a soft token needs on a CPU: attention, positions, norms and gates; with few rows products and p·E too.
//
// gircse/fast/step_kernels.py loads it and checks shapes; nothing here knows Python or PyTorch. PyTorch's operations are
// made for many rows: for one query a head, or one row of a product, they take several times as long as reading their
// input does. Sums are taken in float32 and rounded once, and what a row gets depends on that row alone.
//
// It is compiled for AVX-512 and for AVX2 (pyproject.toml).

#include "few_rows.h"
#include "soft_token.h"
#include "whole_step.h"

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
    extern "C" void step_##DTYPE(const void *step, int threads)                                                        \
    {                                                                                                                  \
        step_all(*(const Step<T> *)step, threads);                                                                     \
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
