// Paged causal attention: see attention.cpp.
#pragma once

#include "vectors.h"

// A step's sequences and one layer's shape.
struct Problem {
    int64_t query_stride, out_stride;  // elements from row to row
    int64_t block_stride;              // elements of the cache from block to block
    int64_t value_offset;              // and from the layer's keys to its values
    const int32_t *row_starts, *starts, *tables;
    int64_t table_stride;
    int32_t num_sequences, num_heads, num_kv_heads, head_dim, block_size, window;
    int32_t fixed_order;  // not 0: the bits of a row depend on its own sequence alone
    float scale;
};

// out[row] of every query row; run by all threads of a team, which have all when it returns. Numbers
// are float or BFloat16, keys and values of the same type or int8 (kv_rows.h).
template <typename T, typename K>
void attend(const Problem& problem, const T* queries, const K* keys, T* out);
