// Paged causal attention: see attention.cpp.
#pragma once

#include "vectors.h"

// A step's sequences and one layer's shape.
struct Problem {
    int64_t query_stride, out_stride;  // elements from row to row
    int64_t block_stride;              // elements from block to block
    int64_t value_offset;              // elements from the layer's keys to its values
    const int32_t *row_starts, *starts, *tables;
    int64_t table_stride;
    int32_t num_sequences, num_heads, num_kv_heads, head_dim, block_size, window;
    int32_t fixed_order;  // not 0: the bits of a row depend on its own sequence alone
    float scale;
};

// out[row] of every query row; run by all threads of a team, which have all when it returns.
void attend(const Problem& problem, const float* queries, const float* keys, float* out);
void attend(const Problem& problem, const BFloat16* queries, const BFloat16* keys, BFloat16* out);
