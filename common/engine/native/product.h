// Matrix products with packed weights: y = x W^T + b for a few rows or many.
//
// Weights lie in panels of PANEL columns (rows of W), each panel in one run from its first step to
// its last, so that a product of one row is a stream through memory. Every element of y is one sum
// in one fixed order: its bits depend neither on the rows beside it nor on the threads.
#pragma once

#include <algorithm>

#include "wide.h"

// A packed matrix: `weights` is [ceil(out / PANEL), ceil(in / DEPTH), PANEL, DEPTH], with zeros
// beyond `out` and `in`; `bias` is [out] or null.
struct Product {
    const void *weights, *bias;
    int64_t in, out;
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 12;  // 24 sums, of 32 registers
#else
constexpr int TILE_ROWS = 4;
#endif
constexpr int64_t CACHED_BYTES = 512 * 1024;  // of x, kept in the second cache beside a panel
constexpr int64_t MAX_BLOCK_ROWS = 96;

// Elements from row to row of a matrix of operands: whole steps, and a cache line more, so that the
// rows of a tile never fall into one cache set.
template <typename T>
inline int64_t operand_stride(int64_t width) {
    constexpr int64_t line = 64 / sizeof(Operand<T>);
    return (width + line - 1) / line * line + line;
}

template <typename T>
inline int64_t num_steps(const Product& p) {
    return (p.in + DEPTH<T> - 1) / DEPTH<T>;
}

// out[r][0..PANEL) = x[r] . panel for R rows, while cache lines are fetched: two a step from `ahead`
// on, ahead_step bytes from step to step.
template <typename T, int R>
__attribute__((noinline)) void sum_tile(const Operand<T>* x, int64_t stride, const T* panel,
                                        int64_t steps, const char* ahead, int64_t ahead_step,
                                        float* out, int64_t out_stride) {
    WideVec sums[R][2] = {};
    for (int64_t step = 0; step < steps; step++) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + 64, 0, 2);
        ahead += ahead_step;
        add_step<R>(sums, x, stride, panel);
        x += DEPTH<T>;
        panel += DEPTH<T> * PANEL;
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++)
            store_wide(out + r * out_stride + v * WIDE, sums[r][v]);
}

template <typename T, int R = TILE_ROWS>
void sum_rows(int64_t rows, const Operand<T>* x, int64_t stride, const T* panel, int64_t steps,
              const char* ahead, int64_t ahead_step, float* out, int64_t out_stride = PANEL) {
    if constexpr (R > 1)
        if (rows < R)
            return sum_rows<T, R - 1>(rows, x, stride, panel, steps, ahead, ahead_step, out, out_stride);
    sum_tile<T, R>(x, stride, panel, steps, ahead, ahead_step, out, out_stride);
}

// Calls store(row, first column, number of columns, sums of that run) for every part of the product
// of x [rows, p.in], whose rows are operand_stride apart. Run by all threads of a team, which have
// all the results when it returns.
template <typename T, typename Store>
void multiply(const Product& p, const Operand<T>* x, int64_t rows, Store&& store) {
    const int64_t stride = operand_stride<T>(p.in), steps = num_steps<T>(p);
    const int64_t panels = (p.out + PANEL - 1) / PANEL, panel_size = steps * DEPTH<T> * PANEL;
    const int64_t fitting = CACHED_BYTES / (stride * int64_t(sizeof(Operand<T>)));
    const int64_t block = std::clamp(fitting / TILE_ROWS * TILE_ROWS, int64_t(TILE_ROWS), MAX_BLOCK_ROWS);
    const auto weights = static_cast<const T*>(p.weights);
    for (int64_t begin = 0; begin < rows; begin += block) {
        const int64_t end = std::min(begin + block, rows);
#pragma omp for schedule(static) nowait
        for (int64_t index = 0; index < panels; index++) {
            const T* panel = weights + index * panel_size;
            const bool last = index + 1 == panels;
            alignas(64) float sums[TILE_ROWS * PANEL];
            for (int64_t row = begin; row < end; row += TILE_ROWS) {
                const int64_t count = std::min<int64_t>(TILE_ROWS, end - row);
                const bool fetches = row == begin && !last;
                sum_rows<T>(count, x + row * stride, stride, panel, steps,
                            reinterpret_cast<const char*>(fetches ? panel + panel_size : panel),
                            fetches ? 128 : 0, sums);
                const int64_t column = index * PANEL, columns = std::min<int64_t>(PANEL, p.out - column);
                for (int64_t r = 0; r < count; r++) store(row + r, column, columns, sums + r * PANEL);
            }
        }
    }
#pragma omp barrier
}
