// Matrix products with packed weights: y = x W^T + b for a few rows or many.
//
// Weights lie in panels of PANEL columns (rows of W), each panel in one run from its first step to
// its last, so that a product of one row is a stream through memory. Every element of y is one sum
// in one fixed order: its bits depend neither on the rows beside it nor on the threads.
#pragma once

#include <algorithm>

#include "int8_products.h"
#include "own.h"

// A packed matrix: `weights` is [ceil(out / PANEL), ceil(in / DEPTH), PANEL, DEPTH], with zeros
// beyond `out` and `in`; `bias` is [out] or null. With `scales`, [out], weights are int8 and each row
// of W is a multiple of its scale; without, they are of the model's type. x is rounded to int8 too
// where `rounds` is not 0.
struct Product {
    const void* weights;
    const float* scales;
    const void* bias;
    int64_t in, out, rounds;
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 12;  // 24 sums, of 32 registers
constexpr int PAIRED_ROWS = 0;
#else
constexpr int TILE_ROWS = 6;    // 12 sums, of 16 registers
constexpr int PAIRED_ROWS = 3;  // up to here two panels go at once: one has too few sums to add to meanwhile
#endif
constexpr int64_t CACHED_BYTES = 512 * 1024;  // of x, kept in the second cache beside a panel
constexpr int64_t MAX_BLOCK_ROWS = 96;

// Elements from row to row of a matrix of operands: whole steps, and a cache line more, so that the
// rows of a tile never fall into one cache set; a RowEnd fits there.
template <typename O>
inline int64_t operand_stride(int64_t width) {
    constexpr int64_t line = 64 / sizeof(O);
    return (width + line - 1) / line * line + line;
}

template <typename W>
inline int64_t num_steps(const Product& p) {
    return (p.in + DEPTH<W> - 1) / DEPTH<W>;
}

// out[r][0..P * PANEL) = x[r] . P panels for up to TILE_ROWS rows (PAIRED_ROWS, if P is 2), while a step's
// worth of cache lines is fetched with each, from `ahead` on, ahead_step bytes from step to step. See
// tiles.cpp.
template <int P, typename W, typename O>
void sum_rows(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps, const char* ahead,
              int64_t ahead_step, float* out, int64_t out_stride);

// Calls store(row, sums) for every row of the product of P panels, tile by tile, of about as many rows
// each; each fetches its share.
template <int P, typename W, typename O, typename Store>
void sum_panels(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps,
                const char* ahead, int64_t ahead_step, Store&& store) {
    alignas(64) float sums[TILE_ROWS * P * PANEL];
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, share = (ahead_step + tiles - 1) / tiles;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
        sum_rows<P, W>(count, x + row * stride, stride, panel, steps, ahead, share, sums, P * PANEL);
        for (int64_t r = 0; r < count; r++) store(row + r, sums + r * P * PANEL);
        ahead += share * steps;
    }
}

// A panel of int8 as one of T, in memory of the thread's own.
template <typename T>
struct Widened {
    Buffer<T> panel;
};
template <typename T>
const T* widened(const int8_t* panel, int64_t steps) {
    constexpr int64_t step_size = DEPTH<int8_t> * PANEL;
    T* out = own<Widened<T>>().panel.of(steps * step_size);
    for (int64_t at = 0; at < steps * step_size; at += step_size)
        for (int d = 0; d < DEPTH<int8_t>; d += DEPTH<T>) widen_step(panel + at, d, out + at + d * PANEL);
    return out;
}

// See multiply, for weights packed as W.
template <typename T, typename W, typename O, typename Store>
void multiply_packed(const Product& p, const O* x, int64_t rows, Store&& store) {
    const int64_t stride = operand_stride<O>(p.in), steps = num_steps<W>(p), panels = (p.out + PANEL - 1) / PANEL;
    const int64_t panel_size = steps * DEPTH<W> * PANEL;
    const int64_t fitting = CACHED_BYTES / (stride * int64_t(sizeof(O)));
    const int64_t block = std::clamp(fitting / TILE_ROWS * TILE_ROWS, int64_t(TILE_ROWS), MAX_BLOCK_ROWS);
    const auto weights = static_cast<const W*>(p.weights);
    for (int64_t begin = 0; begin < rows; begin += block) {
        const int64_t count = std::min(block, rows - begin);
        const int64_t together = count <= PAIRED_ROWS ? 2 : 1;
#pragma omp for schedule(static) nowait
        for (int64_t index = 0; index < panels; index += together) {
            const W* panel = weights + index * panel_size;
            const int64_t num = std::min(together, panels - index);
            const bool last = index + num == panels;
            const auto ahead = reinterpret_cast<const char*>(last ? panel : panel + num * panel_size);
            const int64_t column = index * PANEL, columns = std::min(num * PANEL, p.out - column);
            const auto sum = [&](auto P, const auto* weights_of, int64_t num_steps, int64_t ahead_step) {
                sum_panels<P()>(count, x + begin * stride, stride, weights_of, num_steps, ahead,
                                last ? 0 : ahead_step,
                                [&](int64_t row, const float* sums) { store(begin + row, column, columns, sums); });
            };
            if constexpr (std::is_same_v<W, int8_t> && !std::is_same_v<O, Rounded>) {
                if (count > TILE_ROWS) {  // each tile would widen it anew
                    sum(Number<1>{}, widened<T>(panel, steps), steps * DEPTH<W> / DEPTH<T>, DEPTH<T> * PANEL);
                    continue;
                }
            }
            if constexpr (PAIRED_ROWS > 0)
                if (num == 2) {
                    sum(Number<2>{}, panel, steps, 2 * STEP_BYTES);
                    continue;
                }
            sum(Number<1>{}, panel, steps, STEP_BYTES);
        }
    }
#pragma omp barrier
}

// Calls store(row, first column, number of columns, sums of that run) for every part of the product
// of x [rows, p.in], whose rows are operand_stride apart: Rounded where p.rounds, else Operand<T>. Run
// by all threads of a team, which have all the results when it returns.
template <typename T, typename Store>
void multiply(const Product& p, const void* x, int64_t rows, Store&& store) {
    if (p.rounds)
        multiply_packed<T, int8_t>(p, static_cast<const Rounded*>(x), rows, store);
    else if (p.scales)
        multiply_packed<T, int8_t>(p, static_cast<const Operand<T>*>(x), rows, store);
    else
        multiply_packed<T, T>(p, static_cast<const Operand<T>*>(x), rows, store);
}
