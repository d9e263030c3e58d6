// The tiles of AMX: 16 rows of 64 bytes each, eight of them.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include "room.h"
#include "vectors.h"

namespace
{

constexpr int SIDE = 16; // rows of a tile, and outputs

struct alignas(64) TileSizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE};
    uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

class Tiles // while it lives, this thread may use them
{
  public:
    Tiles()
    {
        static const TileSizes sizes;
        _tile_loadconfig(&sizes);
    }
    ~Tiles()
    {
        _tile_release();
    }
};

INLINE long tiles_of(long rows)
{
    return (rows + SIDE - 1) / SIDE;
}

} // namespace
