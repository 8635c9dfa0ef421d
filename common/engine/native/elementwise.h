// The element-wise parts of a transformer layer, rounded where transformers rounds them. A row is
// computed by itself, in one fixed order, so its bits do not depend on the rows beside it.
#pragma once

#include <cmath>

#include "kv_rows.h"

// One row after another, divided among the threads of a team, which have all when it returns.
template <typename F>
void each_row(int64_t rows, F&& part) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) part(row);
}

// Results are rounded to T, in whatever type they are kept.
template <typename T, typename Out>
void rms_norm(const T* x, const T* weight, Out* out, int64_t width, float eps) {
    Vec squares = {};
    for (int64_t d = 0; d < width; d += LANES) {
        const Vec v = load_some(x + d, width - d);
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_all(squares) / float(width) + eps);
    for (int64_t d = 0; d < width; d += LANES) {
        const Vec v = round_as(x, load_some(x + d, width - d) * scale);
        store_some(out + d, round_as(x, v * load_some(weight + d, width - d)), width - d);
    }
}

// silu(x) = x / (1 + exp(-x)), with an exponential that never overflows.
inline Vec silu(Vec x) {
    const Vec power = exp2_negative(pick(x < 0.0f, x, -x) * LOG2_E);
    return pick(x < 0.0f, x * power, x) / (power + 1.0f);
}

template <typename T, typename Out>
void swiglu(const T* gate_up, Out* out, int64_t inner) {
    for (int64_t d = 0; d < inner; d += LANES) {
        const Vec gate = round_as(gate_up, silu(load_some(gate_up + d, inner - d)));
        const Vec up = load_some(gate_up + inner + d, inner - d);
        store_some(out + d, round_as(gate_up, gate * up), inner - d);
    }
}

// One head turned in place by its position; both halves of cos and sin are the same.
template <typename T>
void rotate(T* x, const T* cos, const T* sin, int64_t half) {
    for (int64_t d = 0; d < half; d += LANES) {
        const int64_t count = half - d;
        const Vec first = load_some(x + d, count), second = load_some(x + half + d, count);
        const Vec c = load_some(cos + d, count), s = load_some(sin + d, count);
        store_some(x + d, round_as(x, first * c) - round_as(x, second * s), count);
        store_some(x + half + d, round_as(x, second * c) + round_as(x, first * s), count);
    }
}

struct Placement {
    const int64_t *slots, *offsets;  // where the keys and values of each row go
    int64_t block_stride;            // elements of the cache from block to block
    int64_t value_offset;            // and from the layer's keys to its values
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    float eps;
};

// Queries and keys of a row normalised (where there is a `norm`) and rotated by its cos and sin, keys
// and values stored.
template <typename T, typename K>
void place_row(const Placement& p, T* qkv, const T* norm, const T* cos, const T* sin, K* keys,
               int64_t row) {
    const int64_t dim = p.head_dim, num_turned = p.num_heads + p.num_kv_heads;
    T* heads = qkv + row * (num_turned + p.num_kv_heads) * dim;
    for (int64_t head = 0; head < num_turned; head++) {
        T* x = heads + head * dim;
        if (norm) rms_norm(x, norm + head * dim, x, dim, p.eps);
        rotate(x, cos, sin, dim / 2);
    }
    const int64_t stride = row_stride<K>(dim);
    K* target = keys + p.slots[row] * p.block_stride + p.offsets[row] * stride;
    for (int64_t head = 0; head < p.num_kv_heads; head++) {
        K* key = target + head * p.block_size * stride;
        store_row(heads + (p.num_heads + head) * dim, key, dim);
        store_row(heads + (num_turned + head) * dim, key + p.value_offset, dim);
    }
}
