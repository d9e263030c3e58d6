// How many rows are computed together.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace
{

constexpr int TILE = 4; // queries, or rows of a product, that are computed together

// Call with how many of what is left are computed together, as a type, so that loops over them are unrolled.
template <int MOST = TILE, typename Work> INLINE void by_tile(long left, Work work)
{
    if constexpr (MOST > 1)
        if (left < MOST)
            return by_tile<MOST - 1>(left, work);
    work(std::integral_constant<int, MOST>{});
}

} // namespace
