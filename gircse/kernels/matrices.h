// The tiles of AMX: 16 rows of 64 bytes each, eight of them.
#pragma once

#include <vector>

#include <immintrin.h>
#include <omp.h>

#include "vectors.h"

namespace
{

constexpr int SIDE = 16; // rows of a tile, and outputs
constexpr int LINE = 64; // bytes of a row, where it is by itself

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

// Memory that a thread keeps: what is allocated anew at every call, the system clears every time.
class Room
{
    std::vector<char> bytes;

  public:
    char *take(size_t size)
    {
        if (bytes.size() < size + LINE)
            bytes.resize(size + LINE);
        return (char *)(((uintptr_t)bytes.data() + LINE - 1) / LINE * LINE);
    }
};

INLINE long tiles_of(long rows)
{
    return (rows + SIDE - 1) / SIDE;
}

} // namespace
