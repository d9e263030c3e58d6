// A soft token of every row through all layers, of Llama and families like it.
//
// gircse/fast/whole_steps.py has the same structures.
#pragma once

#include "attention.h"
#include "products.h"
#include "rows.h"

namespace
{

template <typename T> struct Norm {
    const T *weight; // null where there is none
    float epsilon;
};

template <typename T> struct Layer {
    Norm<T> input, queries, keys, between;                // queries and keys have one in some families
    Product<T> query, key, value, output, gate, up, down; // without `out`
    float scaling;
};

struct Group { // rows whose prompts are of similar length
    const int64_t *starts;
    int64_t rows, capacity, length, prefix;
};

template <typename T> struct Cache { // of a layer and a group
    T *keys, *values;
    const T *prefix_keys, *prefix_values;
};

template <typename T> struct Room {
    T *states, *normed, *query, *key, *value, *mixed, *gate, *up, *added;
};

template <typename T> struct Step {
    const Layer<T> *layers;
    const Group *groups;
    const Cache<T> *caches; // (layers, groups)
    Norm<T> last;
    Room<T> room;
    const float *cosines, *sines; // (rows, width)
    T *out;                       // (rows, size)
    int64_t count, group_count, rows, size, inner, heads, shared, width;
    void (*multiply)(const T *x, int64_t rows, int64_t in, const void *products, int64_t count, int threads);
};

template <typename T> Product<T> into(Product<T> product, T *out)
{
    product.out = out;
    return product;
}

template <typename T> void attend_groups(const Step<T> &s, const Layer<T> &layer, const Cache<T> *caches, int threads)
{
    const long of_query = s.heads * s.width, of_key = s.shared * s.width;
    long row = 0;
    for (long i = 0; i < s.group_count; row += s.groups[i++].rows) {
        const Group &group = s.groups[i];
        const Cache<T> &cache = caches[i];
        if (group.rows)
            attend_all(Attention<T>{s.room.query + row * of_query, s.room.key + row * of_key,
                                    s.room.value + row * of_key, cache.keys, cache.values, group.starts,
                                    cache.prefix_keys, cache.prefix_values, s.room.mixed + row * of_query, group.rows,
                                    s.heads, s.shared, s.width, group.capacity, group.length, group.prefix,
                                    layer.scaling},
                       threads);
    }
}

template <typename T>
void attend_layer(const Step<T> &s, const Layer<T> &layer, const T *added, const Cache<T> *caches, int threads)
{
    const Room<T> &room = s.room;
    norm_all(room.states, added, layer.input.weight, layer.input.epsilon, s.rows, s.size, room.normed, threads);
    const Product<T> projected[] = {into(layer.query, room.query), into(layer.key, room.key),
                                    into(layer.value, room.value)};
    s.multiply(room.normed, s.rows, s.size, projected, 3, threads);
    const T *nothing = nullptr;
    if (layer.queries.weight)
        norm_all(room.query, nothing, layer.queries.weight, layer.queries.epsilon, s.rows * s.heads, s.width,
                 room.query, threads);
    if (layer.keys.weight)
        norm_all(room.key, nothing, layer.keys.weight, layer.keys.epsilon, s.rows * s.shared, s.width, room.key,
                 threads);
    turn_all(room.query, s.cosines, s.sines, s.rows, s.heads, s.width, threads);
    turn_all(room.key, s.cosines, s.sines, s.rows, s.shared, s.width, threads);
    attend_groups(s, layer, caches, threads);
    const Product<T> output = into(layer.output, room.added);
    s.multiply(room.mixed, s.rows, s.heads * s.width, &output, 1, threads);
}

template <typename T> void gate_layer(const Step<T> &s, const Layer<T> &layer, int threads)
{
    const Room<T> &room = s.room;
    norm_all(room.states, (const T *)room.added, layer.between.weight, layer.between.epsilon, s.rows, s.size,
             room.normed, threads);
    const Product<T> projected[] = {into(layer.gate, room.gate), into(layer.up, room.up)};
    s.multiply(room.normed, s.rows, s.size, projected, 2, threads);
    gate_all(room.gate, room.up, s.rows * s.inner, room.gate, threads);
    const Product<T> down = into(layer.down, room.added);
    s.multiply(room.gate, s.rows, s.inner, &down, 1, threads);
}

template <typename T> void step_all(const Step<T> &s, int threads)
{
    const T *added = nullptr; // what the layer before adds to the states
    for (long i = 0; i < s.count; i++) {
        attend_layer(s, s.layers[i], added, s.caches + i * s.group_count, threads);
        gate_layer(s, s.layers[i], threads);
        added = s.room.added;
    }
    norm_all(s.room.states, added, s.last.weight, s.last.epsilon, s.rows, s.size, s.out, threads);
}

} // namespace
