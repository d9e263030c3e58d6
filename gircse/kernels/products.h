// Products of the same rows with several weights, as oneDNN packs them.
//
// Outputs lie in panels: (panels, in, PANEL) in float32, and in bfloat16 (panels, in / 2, PANEL, 2), two inputs that
// follow each other side by side.
#pragma once

#include <vector>

#include "vectors.h"

namespace
{

template <typename T> struct Product {
    const T *packed, *bias; // no bias where it is null
    T *out;                 // (rows, outputs)
    int64_t panel, outputs; // how many outputs lie together, and all
};

template <typename T> struct Panel {
    const Product<T> *of;
    long first; // output
};

template <typename T> std::vector<Panel<T>> panels_of(const Product<T> *products, long count)
{
    std::vector<Panel<T>> panels;
    for (const Product<T> *of = products; of < products + count; of++)
        for (long first = 0; first < of->outputs; first += of->panel)
            panels.push_back({of, first});
    return panels;
}

} // namespace
