// Products of the same rows with several weights, as oneDNN packs them.
//
// Outputs lie in panels: (panels, in, PANEL) in float32, and in bfloat16 (panels, in / 2, PANEL, 2), two inputs that
// follow each other side by side; of 8 bits, (panels, in / 4, PANEL, 4), four. Weights of 8 bits without sums are as
// gircse/fast/int8.py lays them: (panels, in, PANEL), a panel of two vectors.
#pragma once

#include <type_traits>
#include <vector>

#include "vectors.h"

namespace
{

constexpr long LEAST_ROWS = 20; // of a job, where a panel is more than one

template <typename T> struct Product {
    const void *packed;     // of T, or of 8 bits where there are scales
    const float *scales;    // (outputs): what 1 of 8 bits stands for
    const int32_t *sums;    // (outputs): of the weights of 8 bits, for processors that multiply those
    const T *bias;          // null where there is none
    T *out;                 // (rows, outputs)
    int64_t panel, outputs; // how many outputs lie together, and all
};

template <typename T> struct Panel { // of a weight, and the rows that are multiplied with it
    const Product<T> *of;
    long first; // output
    long row, rows;
};

// With enough rows, a panel's are parted among jobs that follow each other: three panels are no two threads' work.
template <typename T>
std::vector<Panel<T>> panels_of(const Product<T> *products, long count, long rows, int threads = 1)
{
    const long most = rows / LEAST_ROWS, parts = most < 1 ? 1 : most < threads ? most : threads;
    std::vector<Panel<T>> panels;
    for (const Product<T> *of = products; of < products + count; of++)
        for (long first = 0; first < of->outputs; first += of->panel)
            for (long i = 0; i < parts; i++) {
                const long row = rows * i / parts;
                panels.push_back({of, first, row, rows * (i + 1) / parts - row});
            }
    return panels;
}

// Call with how many vectors a panel has, as a type.
template <typename Work> INLINE void by_vectors(int64_t panel, Work work)
{
    if (panel == 64)
        work(std::integral_constant<int, 64 / LANES>{});
    else if (panel == 48)
        work(std::integral_constant<int, 48 / LANES>{});
    else if (panel == 32)
        work(std::integral_constant<int, 32 / LANES>{});
    else
        work(std::integral_constant<int, 16 / LANES>{});
}

} // namespace
