// Spans of positions and where their keys and values lie.
#pragma once

#include "attention.h"
#include "kv_rows.h"

constexpr int SPAN = 128;  // positions, from a multiple of as many on
constexpr float UNSEEN = -1e30f;

// Where the keys and values of a span's positions lie.
template <typename T, int N = SPAN>
struct Rows {
    int count;
    const T *keys[N], *values[N];
};

// The rows of positions [begin, min(begin + N, end)); past the end any row that may be read.
template <typename T, int N>
void find_rows(const Problem& p, const int32_t* table, const T* head, int64_t begin, int64_t end,
               Rows<T, N>* out) {
    out->count = int(end - begin < N ? end - begin : N);
    int64_t block = begin / p.block_size, offset = begin % p.block_size;
    for (int s = 0; s < out->count; block++, offset = 0) {
        const T* rows = head + table[block] * p.block_stride;
        for (; offset < p.block_size && s < out->count; offset++, s++) {
            out->keys[s] = rows + offset * row_stride<T>(p.head_dim);
            out->values[s] = out->keys[s] + p.value_offset;
        }
    }
    for (int s = out->count; s < N; s++) out->keys[s] = out->keys[0], out->values[s] = out->values[0];
}

// The scales of a span's keys and values: they multiply a score, and a weight, once each.
template <typename K>
struct Scales {  // of numbers that have none
    void read(const Rows<K>&, int64_t) {}
    template <typename O>
    void apply_to_scores(O*) const {}
    template <typename O>
    void apply_to_weights(O*) const {}
};
template <>
struct Scales<int8_t> {
    float keys[SPAN], values[SPAN];

    void read(const Rows<int8_t>& at, int64_t dim) {
        for (int s = 0; s < SPAN; s++) {
            keys[s] = scale_of(at.keys[s], dim);
            values[s] = scale_of(at.values[s], dim);
        }
    }
    void apply_to_scores(float* line) const { apply(keys, line); }
    void apply_to_weights(float* line) const { apply(values, line); }

  private:
    static void apply(const float* scales, float* line) {
        for (int s = 0; s < SPAN; s += LANES) store(line + s, load(line + s) * load(scales + s));
    }
};
