// Products with weights of 8 bits by AMX: a tile of 16 rows and 64 inputs times one of 64 inputs and 16 outputs in one
// instruction.
#pragma once

#include "int8_parts.h"
#include "matrices.h"

namespace
{

constexpr int INPUTS = 64;           // of a tile
constexpr int BYTES = SIDE * INPUTS; // of a tile
constexpr int NUMBERS = SIDE * SIDE; // of a tile of sums

struct TiledInputs {
    uint8_t *first, *second; // (tiles of rows, tiles of inputs, SIDE, INPUTS)
    float *steps;            // (rows)
};

// Both parts of the inputs times the weights of 16 outputs, or of 32 if BESIDE: first outputs first, then parts.
template <bool BESIDE>
INLINE void sum_tiles(const uint8_t *first, const uint8_t *second, const int8_t *weights, long panel, long count,
                      int32_t *sums)
{
    asm volatile("" ::: "memory"); // compilers do not see that tiles read memory, and could write it later
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < count; k++, first += BYTES, second += BYTES, weights += INPUTS * panel) {
        for (int row = 0; row < SIDE; row++) // of the next tile
            __builtin_prefetch(weights + (INPUTS + 4 * row) * panel);
        _tile_loadd(4, first, LINE);
        _tile_loadd(6, weights, 4 * panel);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(5, second, LINE);
        _tile_dpbusd(2, 5, 6);
        if (BESIDE) {
            _tile_loadd(7, weights + LINE, 4 * panel);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, LINE);
    _tile_stored(2, sums + 2 * NUMBERS, LINE);
    if (BESIDE) {
        _tile_stored(1, sums + NUMBERS, LINE);
        _tile_stored(3, sums + 3 * NUMBERS, LINE);
    }
}

// A tile of rows, and the outputs from the given one on.
template <bool BESIDE, typename T>
INLINE void multiply_outputs(const TiledInputs &x, long row, long last, long in, const Product<T> &of, long output)
{
    alignas(64) int32_t sums[4 * NUMBERS];
    const int8_t *weights = (const int8_t *)of.packed + output / of.panel * of.panel * in + output % of.panel * 4;
    sum_tiles<BESIDE>(x.first + row * in, x.second + row * in, weights, of.panel, in / INPUTS, sums);
    for (int beside = 0; beside < 1 + BESIDE; beside++) {
        const Outputs<T> outputs = outputs_of(of, output + beside * SIDE);
        const int32_t *found = sums + beside * NUMBERS;
        for (long r = row; r < last; r++, found += SIDE) {
            integers first, second;
            memcpy(&first, found, sizeof first);
            memcpy(&second, found + 2 * NUMBERS, sizeof second);
            store_row(outputs, r, x.steps[r], first, second);
        }
    }
}

template <typename T> void multiply_panel(const TiledInputs &x, long rows, long in, const Panel<T> &panel)
{
    const Product<T> &of = *panel.of;
    for (long row = 0; row < rows; row += SIDE) { // the outer loop: its inputs are then near for all outputs
        const long last = rows - row < SIDE ? rows : row + SIDE;
        long done = 0;
        for (; done + 2 * SIDE <= of.panel; done += 2 * SIDE)
            multiply_outputs<true>(x, row, last, in, of, panel.first + done);
        for (; done < of.panel; done += SIDE)
            multiply_outputs<false>(x, row, last, in, of, panel.first + done);
    }
}

template <typename T> INLINE void tile_parts(const T *x, long row, long rows, long in, const TiledInputs &to)
{
    const long begun = row / SIDE * SIDE * in + row % SIDE * INPUTS;
    const auto place = [&](long k) __attribute__((always_inline)) { return begun + k / INPUTS * BYTES + k % INPUTS; };
    if (row < rows)
        to.steps[row] = part_row(x + row * in, in, to.first, to.second, place);
    else
        for (long k = 0; k < in; k += INPUTS) {
            memset(to.first + place(k), 0, INPUTS);
            memset(to.second + place(k), 0, INPUTS);
        }
}

template <typename T>
void multiply_int8(const T *x, long rows, long in, const Product<T> *products, long count, int threads)
{
    static thread_local Room room;
    const long tiled = tiles_of(rows) * SIDE;
    char *taken = room.take(2 * tiled * in + tiled * sizeof(float));
    const TiledInputs inputs{(uint8_t *)taken, (uint8_t *)taken + tiled * in, (float *)(taken + 2 * tiled * in)};
    const std::vector<Panel<T>> panels = panels_of(products, count, rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < tiled; row++)
            tile_parts(x, row, rows, in, inputs);
        Tiles used;
#pragma omp for schedule(static)
        for (long i = 0; i < (long)panels.size(); i++)
            multiply_panel(inputs, rows, in, panels[i]);
    }
}

} // namespace
