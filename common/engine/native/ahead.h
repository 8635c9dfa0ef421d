// Asking for keys and values before they are used.
#pragma once

#include <algorithm>

#include "spans.h"

// The keys and values that will be wanted next, of some heads. They are asked for in the order in which
// they lie, a block's keys of one head after another and then its values, a row's bytes at a time.
template <typename K>
class Ahead {
  public:
    // Positions [begin, end) of a block table; `head` is the first of num_heads.
    void set(const Problem& p, const int32_t* table, const K* head, int num_heads, int64_t begin,
             int64_t end) {
        stride = row_stride<K>(p.head_dim), head_size = p.block_size * stride;
        block_stride = p.block_stride, value_offset = p.value_offset, block_size = p.block_size;
        heads = num_heads, keys = head, left = end - begin;
        blocks = table + begin / block_size, offset = begin % block_size;
        lines = int((stride * int64_t(sizeof(K)) + 63) / 64);
        run = 0, at = stop = nullptr;
    }
    void clear() { left = 0, at = stop = nullptr; }
    inline __attribute__((always_inline)) void fetch() {
        if (at >= stop && !find_run()) return;
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }

  private:
    const K* keys;
    const int32_t* blocks;
    int64_t stride, head_size, block_stride, value_offset, block_size, offset, left = 0;
    int heads, lines, run;  // of a block: keys of each head, values of each head
    const char *at = nullptr, *stop = nullptr;

    // Seldom, and not inlined: it would take registers from the loops that fetch.
    __attribute__((noinline)) bool find_run() {
        if (left <= 0) return false;
        const int64_t count = std::min(block_size - offset, left);
        const K* first = keys + *blocks * block_stride + run / heads * value_offset + run % heads * head_size;
        at = reinterpret_cast<const char*>(first + offset * stride);
        stop = reinterpret_cast<const char*>(first + (offset + count) * stride);
        if (++run == 2 * heads) run = 0, blocks++, left -= count, offset = 0;
        return true;
    }
};
