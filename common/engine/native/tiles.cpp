// The innermost loops of matrix products: a tile of rows goes through one panel of packed weights.
//
// By themselves here, for every number of rows once: they are half of what there is to compile.
#include "product.h"

namespace {

// sum_rows for exactly R rows.
template <int P, typename W, int R, typename O>
__attribute__((noinline)) void sum_tile(const O* x, int64_t stride, const W* panel, int64_t steps,
                                        const char* ahead, int64_t ahead_step, float* out,
                                        int64_t out_stride) {
    const int64_t panel_size = steps * DEPTH<W> * PANEL;
    Sum<O> sums[P][R][2] = {};
    TileRows<O, R> rows(x, stride);
    const W* const end = panel + panel_size;
    while (panel < end) {
        for (int line = 0; line < P * STEP_BYTES; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += ahead_step;
        for (int p = 0; p < P; p++) add_step<R>(sums[p], rows, panel + p * panel_size);
        rows.advance(DEPTH<W>);
        panel += DEPTH<W> * PANEL;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)  // unrolled, or the sums would be kept in memory; rows are at their ends
#pragma GCC unroll 4
        for (int v = 0; v < 2 * P; v++)
            store(out + r * out_stride + v * LANES, total(sums[v / 2][r][v % 2], rows[r]));
}

template <int P, int R, typename W, typename O>
void sum_up_to(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps,
               const char* ahead, int64_t ahead_step, float* out, int64_t out_stride) {
    if constexpr (R > 1)
        if (rows < R)
            return sum_up_to<P, R - 1>(rows, x, stride, panel, steps, ahead, ahead_step, out, out_stride);
    sum_tile<P, W, R>(x, stride, panel, steps, ahead, ahead_step, out, out_stride);
}

}  // namespace

template <int P, typename W, typename O>
void sum_rows(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps, const char* ahead,
              int64_t ahead_step, float* out, int64_t out_stride) {
    sum_up_to<P, P == 1 ? TILE_ROWS : PAIRED_ROWS>(rows, x, stride, panel, steps, ahead, ahead_step, out, out_stride);
}

#define INSTANTIATE_FOR(P, W, O)                                                                        \
    template void sum_rows<P>(int64_t, const O*, int64_t, const W*, int64_t, const char*, int64_t, float*, \
                              int64_t);
#if defined(__AVX512F__) || defined(__aarch64__)
#define INSTANTIATE(W, O) INSTANTIATE_FOR(1, W, O)
#else
#define INSTANTIATE(W, O) INSTANTIATE_FOR(1, W, O) INSTANTIATE_FOR(2, W, O)
#endif
INSTANTIATE(float, float)
INSTANTIATE(int8_t, float)
INSTANTIATE(int8_t, Rounded)
INSTANTIATE(BFloat16, Operand<BFloat16>)
#if BFLOAT16_PRODUCTS
INSTANTIATE(int8_t, BFloat16)
#endif
