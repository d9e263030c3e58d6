// How many rows are computed together.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace
{

constexpr int TILE = 4; // queries, or rows of a product, that are computed together

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

} // namespace
