// Products with packed weights, and soft tokens, of bfloat16 by AMX: a tile of 16 rows and 32 inputs times one of 32
// inputs and 16 outputs in one instruction. Products with weights of 8 bits: int8_tiles.h.
//
// gircse/fast/step_kernels.py loads it where the processor has AMX and prefers it to step_kernels.cpp, whose calls these
// are. Logits stay in float32, of which PyTorch's products keep 8 bits. What a row gets depends on that row alone.

#include "int8_tiles.h"
#include "matrices.h"
#include "products.h"

namespace
{

constexpr int DEPTH = 32;          // inputs of a tile
constexpr int TILE = SIDE * DEPTH; // numbers of bfloat16
constexpr int SUMS = SIDE * SIDE;  // numbers of float32
constexpr int WORDS = 256;         // of the vocabulary that are computed together
constexpr int AHEAD = 2;           // tiles that are fetched before they are needed

struct Factor { // two tiles, one under or beside the other, and those that follow them along the inputs
    const bfloat16 *first, *second;
    long stride; // bytes between rows of a tile
    long step;   // numbers between tiles
};

struct Sums { // where the results of up to four tiles lie
    float *at;
    long below, beside; // numbers from the first
    long stride;        // bytes between rows
};

// Left times right, over `count` tiles of inputs: two tiles of rows if BELOW, two of outputs if BESIDE. AGAIN adds to
// what is there; FETCH says that the right factor comes from memory.
template <bool BELOW, bool BESIDE, bool AGAIN = false, bool FETCH = false>
INLINE void multiply_tiles(const Factor &left, const Factor &right, long count, const Sums &sums)
{
    asm volatile("" ::: "memory"); // compilers do not see that tiles read memory, and could write it later
    float *below = sums.at + sums.below, *beside = sums.at + sums.beside, *last = below + sums.beside;
    if (AGAIN) {
        _tile_loadd(0, sums.at, sums.stride);
        if (BESIDE)
            _tile_loadd(1, beside, sums.stride);
        if (BELOW)
            _tile_loadd(2, below, sums.stride);
        if (BELOW && BESIDE)
            _tile_loadd(3, last, sums.stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < count; k++) {
        if (FETCH && k + AHEAD < count)
            for (int row = 0; row < SIDE; row++) {
                __builtin_prefetch((const char *)(right.first + (k + AHEAD) * right.step) + row * right.stride);
                if (BESIDE)
                    __builtin_prefetch((const char *)(right.second + (k + AHEAD) * right.step) + row * right.stride);
            }
        _tile_loadd(4, left.first + k * left.step, left.stride);
        _tile_loadd(6, right.first + k * right.step, right.stride);
        _tile_dpbf16ps(0, 4, 6);
        if (BESIDE) {
            _tile_loadd(7, right.second + k * right.step, right.stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (BELOW) {
            _tile_loadd(5, left.second + k * left.step, left.stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (BELOW && BESIDE)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums.at, sums.stride);
    if (BESIDE)
        _tile_stored(1, beside, sums.stride);
    if (BELOW)
        _tile_stored(2, below, sums.stride);
    if (BELOW && BESIDE)
        _tile_stored(3, last, sums.stride);
}

// ---- Products with packed weights ----

// A row into tiles, (tiles of rows, tiles of inputs, SIDE, DEPTH); zeros where there is no such row.
INLINE void tile_row(const bfloat16 *x, long row, long rows, long in, bfloat16 *tiles)
{
    bfloat16 *to = tiles + row / SIDE * SIDE * in + row % SIDE * DEPTH;
    for (long k = 0; k < in; k += DEPTH, to += TILE) {
        if (row < rows)
            memcpy(to, x + row * in + k, LINE);
        else
            memset(to, 0, LINE);
    }
}

template <bool BESIDE>
INLINE void multiply_part(const bfloat16 *tiles, long rows, long in, const Product<bfloat16> &of, long first)
{
    constexpr int WIDTH = BESIDE ? 2 * SIDE : SIDE;
    alignas(64) float found[2 * SIDE * WIDTH];
    const Sums sums{found, SIDE * WIDTH, SIDE, WIDTH * 4};
    const bfloat16 *packed = (const bfloat16 *)of.packed + first / of.panel * of.panel * in + first % of.panel * 2;
    const Factor right{packed, packed + 2 * SIDE, of.panel * 4, DEPTH * of.panel};
    for (long row = 0; row < rows; row += 2 * SIDE) {
        const Factor left{tiles + row * in, tiles + (row + SIDE) * in, LINE, TILE};
        if (row + SIDE < rows)
            multiply_tiles<true, BESIDE, false, true>(left, right, in / DEPTH, sums);
        else
            multiply_tiles<false, BESIDE, false, true>(left, right, in / DEPTH, sums);
        for (long r = row; r < rows && r < row + 2 * SIDE; r++)
            for (int v = 0; v < WIDTH; v += LANES) {
                const floats offset = of.bias ? load(of.bias + first + v) : floats{};
                store(load(found + (r - row) * WIDTH + v) + offset, of.out + r * of.outputs + first + v);
            }
    }
}

void multiply_panel(const bfloat16 *tiles, long rows, long in, const Panel<bfloat16> &panel)
{
    const Product<bfloat16> &of = *panel.of;
    long done = 0;
    for (; done + 2 * SIDE <= of.panel; done += 2 * SIDE)
        multiply_part<true>(tiles, rows, in, of, panel.first + done);
    for (; done < of.panel; done += SIDE)
        multiply_part<false>(tiles, rows, in, of, panel.first + done);
}

// ---- The soft token: softmax(h·Eᵀ) · E, with one pass over the table ----

struct Share {           // what a thread has found in its part of the vocabulary, each of (tiles of rows, ...)
    float *most, *total; // (SIDE): the largest logit, and the sum of e^(logit - most)
    float *mixed;        // (tiles of the width, SIDE, SIDE): the sum of e^(logit - most) times E
};

struct Block {         // what a thread needs for WORDS words
    float *scores;     // (tiles of rows, WORDS, SIDE): logits, then e^(logit - most)
    bfloat16 *weights; // (tiles of rows, tiles of words, SIDE, DEPTH): the same as the left factor of the mix
    bfloat16 *vectors; // (tiles of words, tiles of the width, DEPTH / 2, SIDE, 2): E as its right factor
    bfloat16 *last;    // (WORDS, width): the end of the table, and zeros
};

// Hidden states as the right factor of logits, (tiles of rows, tiles of the width, DEPTH / 2, SIDE, 2).
void tile_hidden(const bfloat16 *hidden, long rows, long width, bfloat16 *tiles)
{
    memset((void *)tiles, 0, tiles_of(rows) * SIDE * width * sizeof(bfloat16));
    for (long row = 0; row < rows; row++)
        for (long d = 0; d < width; d += 2)
            memcpy(tiles + row / SIDE * SIDE * width + d * SIDE + row % SIDE * 2, hidden + row * width + d, 4);
}

INLINE void score_words(const bfloat16 *hidden, long tiles, long width, const bfloat16 *table, float *scores)
{
    for (long word = 0; word < WORDS; word += 2 * SIDE) {
        const Factor left{table + word * width, table + (word + SIDE) * width, width * 2, DEPTH};
        for (long tile = 0; tile < tiles; tile += 2) {
            const Factor right{hidden + tile * SIDE * width, hidden + (tile + 1) * SIDE * width, LINE, TILE};
            const Sums sums{scores + (tile * WORDS + word) * SIDE, SUMS, WORDS * SIDE, LINE};
            if (tile + 1 < tiles)
                multiply_tiles<true, true>(left, right, width / DEPTH, sums);
            else
                multiply_tiles<true, false>(left, right, width / DEPTH, sums);
        }
    }
}

// Scores to e^(scale · score - most) of a tile of rows, once more as numbers of bfloat16 by rows.
INLINE void soften_tile(float *scores, float scale, bfloat16 *weights, float *most, float *total, float *mixed,
                        long width)
{
    const floats before = load(most);
    floats largest = before, sum = {};
    for (long word = 0; word < WORDS; word++) {
        floats x = load(scores + word * SIDE) * scale;
        largest = x > largest ? x : largest;
    }
    for (long word = 0; word < WORDS; word += 2) {
        const floats even = exponential(load(scores + word * SIDE) * scale - largest);
        const floats odd = exponential(load(scores + (word + 1) * SIDE) * scale - largest);
        sum += even + odd;
        const words pairs = rounded(even) >> 16 | (rounded(odd) & 0xffff0000);
        bfloat16 *to = weights + word / DEPTH * TILE + word % DEPTH;
        for (int row = 0; row < SIDE; row++, to += DEPTH) {
            const uint32_t pair = pairs[row];
            memcpy(to, &pair, sizeof pair);
        }
    }
    const floats shrink = exponential(before - largest);
    store(largest, most);
    store(load(total) * shrink + sum, total);
    bool shrinks = false;
    for (int row = 0; row < SIDE; row++)
        shrinks |= shrink[row] < 1;
    for (long i = 0; shrinks && i < width; i++) // (tiles of the width, SIDE) rows of SIDE numbers
        store(load(mixed + i * SIDE) * shrink[i % SIDE], mixed + i * SIDE);
}

INLINE void tile_words(const bfloat16 *table, long width, bfloat16 *vectors)
{
    for (long word = 0; word < WORDS; word += 2)
        for (long d = 0; d < width; d += SIDE) {
            const words even = (words)load(table + word * width + d), odd = (words)load(table + (word + 1) * width + d);
            const words pairs = even >> 16 | odd;
            memcpy(vectors + word / DEPTH * DEPTH * width + d * DEPTH + word % DEPTH * SIDE, &pairs, sizeof pairs);
        }
}

INLINE void mix_words(const Block &block, long tiles, long width, float *mixed)
{
    for (long d = 0; d < width; d += 2 * SIDE) {
        const Factor right{block.vectors + d * DEPTH, block.vectors + (d + SIDE) * DEPTH, LINE, DEPTH * width};
        for (long tile = 0; tile < tiles; tile += 2) {
            const bfloat16 *weights = block.weights + tile * SIDE * WORDS;
            const Factor left{weights, weights + SIDE * WORDS, LINE, TILE};
            const Sums sums{mixed + (tile * width + d) * SIDE, width * SIDE, SUMS, LINE};
            if (tile + 1 < tiles)
                multiply_tiles<true, true, true>(left, right, WORDS / DEPTH, sums);
            else
                multiply_tiles<false, true, true>(left, right, WORDS / DEPTH, sums);
        }
    }
}

INLINE void soften_words(const bfloat16 *hidden, long tiles, long width, const bfloat16 *table, long words_left,
                         float scale, const Block &block, const Share &share)
{
    if (words_left < WORDS) {
        memset((void *)block.last, 0, WORDS * width * sizeof(bfloat16));
        memcpy((void *)block.last, table, words_left * width * sizeof(bfloat16));
        table = block.last;
    }
    tile_words(table, width, block.vectors); // first, as it reads in the order of memory
    score_words(hidden, tiles, width, table, block.scores);
    for (long tile = 0; tile < tiles; tile++) {
        float *scores = block.scores + tile * WORDS * SIDE;
        for (long word = words_left; word < WORDS; word++)
            store(floats{} - 1e30f, scores + word * SIDE);
        soften_tile(scores, scale, block.weights + tile * SIDE * WORDS, share.most + tile * SIDE,
                    share.total + tile * SIDE, share.mixed + tile * SIDE * width, width);
    }
    mix_words(block, tiles, width, share.mixed);
}

void join_shares(const std::vector<Share> &shares, long row, long width, bfloat16 *out)
{
    float most = -1e30f, total = 0;
    for (const Share &share : shares)
        most = share.most[row] > most ? share.most[row] : most;
    std::vector<float> shrink;
    for (const Share &share : shares) {
        shrink.push_back(exponential(floats{} + (share.most[row] - most))[0]);
        total += shrink.back() * share.total[row];
    }
    for (long d = 0; d < width; d += SIDE) {
        floats mixed = {};
        for (size_t i = 0; i < shares.size(); i++)
            mixed += shrink[i] * load(shares[i].mixed + (row / SIDE * width + d + row % SIDE) * SIDE);
        store(mixed / total, out + row * width + d);
    }
}

Share new_share(long tiles, long width, char *room)
{
    const long rows = tiles * SIDE;
    Share share{(float *)room, (float *)room + rows, (float *)room + 2 * rows};
    for (long row = 0; row < rows; row++)
        share.most[row] = -1e30f;
    memset(share.total, 0, rows * (1 + width) * sizeof(float));
    return share;
}

Block new_block(long tiles, long width, char *room)
{
    float *scores = (float *)room;
    bfloat16 *weights = (bfloat16 *)(scores + tiles * WORDS * SIDE), *vectors = weights + tiles * WORDS * SIDE;
    return {scores, weights, vectors, vectors + WORDS * width};
}

} // namespace

// ---- What Python calls ----

extern "C" void multiply_bfloat16(const bfloat16 *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                  int threads)
{
    static thread_local Room room;
    bfloat16 *tiles = (bfloat16 *)room.take(tiles_of(rows) * SIDE * in * sizeof(bfloat16));
    const std::vector<Panel<bfloat16>> panels = panels_of((const Product<bfloat16> *)products, count, rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < tiles_of(rows) * SIDE; row++)
            tile_row(x, row, rows, in, tiles);
        Tiles used;
#pragma omp for schedule(static)
        for (long i = 0; i < (long)panels.size(); i++)
            multiply_panel(tiles, rows, in, panels[i]);
    }
}

extern "C" void multiply_int8_bfloat16(const bfloat16 *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                       int threads)
{
    multiply_int8(x, rows, in, (const Product<bfloat16> *)products, count, threads);
}

extern "C" void multiply_int8_float32(const float *x, int64_t rows, int64_t in, const void *products, int64_t count,
                                      int threads)
{
    multiply_int8(x, rows, in, (const Product<float> *)products, count, threads);
}

extern "C" void soft_tokens_bfloat16(const bfloat16 *hidden, int64_t rows, int64_t width, const bfloat16 *table,
                                     int64_t vocabulary, float scale, bfloat16 *out, int threads)
{
    static thread_local Room shared, own; // the latter every thread's
    const long tiles = tiles_of(rows), blocks = (vocabulary + WORDS - 1) / WORDS;
    bfloat16 *tiled = (bfloat16 *)shared.take(tiles * SIDE * width * sizeof(bfloat16));
    tile_hidden(hidden, rows, width, tiled);
    std::vector<Share> shares(threads);
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        const long found = tiles * SIDE * (2 + width) * 4, each = tiles * SIDE * WORDS * 6 + 2 * WORDS * width * 2;
        char *room = own.take(found + each);
        const Share share = new_share(tiles, width, room);
        const Block block = new_block(tiles, width, room + found);
        Tiles used;
        for (long i = blocks * me / all; i < blocks * (me + 1) / all; i++)
            soften_words(tiled, tiles, width, table + i * WORDS * width, vocabulary - i * WORDS, scale, block, share);
#pragma omp single
        shares.resize(all);
        shares[me] = share;
#pragma omp barrier
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            join_shares(shares, row, width, out);
    }
}

extern "C" int version()
{
    return VERSION;
}
