// The innermost loops of matrix products: a tile of rows goes through one panel of packed weights.
//
// By themselves here, for every number of rows once: they are half of what there is to compile.
#include "product.h"

namespace {

// sum_rows for exactly R rows.
template <typename W, int R, typename O>
__attribute__((noinline)) void sum_tile(const O* x, int64_t stride, const W* panel, int64_t steps,
                                        const char* ahead, int64_t ahead_step, float* out,
                                        int64_t out_stride) {
    Vec sums[R][2] = {};
    TileRows<O, R> rows(x, stride);
    const W* const end = panel + steps * DEPTH<W> * PANEL;
    while (panel < end) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + 64, 0, 2);
        ahead += ahead_step;
        add_step<R>(sums, rows, panel);
        rows.advance(DEPTH<W>);
        panel += DEPTH<W> * PANEL;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)  // unrolled, or the sums would be kept in memory
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            store(out + r * out_stride + v * LANES, sums[r][v]);
}

template <int R, typename W, typename O>
void sum_up_to(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps,
               const char* ahead, int64_t ahead_step, float* out, int64_t out_stride) {
    if constexpr (R > 1)
        if (rows < R)
            return sum_up_to<R - 1>(rows, x, stride, panel, steps, ahead, ahead_step, out, out_stride);
    sum_tile<W, R>(x, stride, panel, steps, ahead, ahead_step, out, out_stride);
}

}  // namespace

template <typename W, typename O>
void sum_rows(int64_t rows, const O* x, int64_t stride, const W* panel, int64_t steps, const char* ahead,
              int64_t ahead_step, float* out, int64_t out_stride) {
    sum_up_to<TILE_ROWS>(rows, x, stride, panel, steps, ahead, ahead_step, out, out_stride);
}

#define INSTANTIATE(W, O)                                                                             \
    template void sum_rows(int64_t, const O*, int64_t, const W*, int64_t, const char*, int64_t, float*, \
                           int64_t);
INSTANTIATE(float, float)
INSTANTIATE(int8_t, float)
INSTANTIATE(BFloat16, Operand<BFloat16>)
#if BFLOAT16_PRODUCTS
INSTANTIATE(int8_t, BFloat16)
#endif
