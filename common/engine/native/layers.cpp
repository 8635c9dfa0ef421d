// The element-wise parts of a layer, one by one. Plain C ABI, no headers but the standard library's.
#include "elementwise.h"

namespace {

constexpr int64_t SERIAL_NUMBERS = 32768;  // below this many, starting threads costs more

template <typename F>
void with_threads(int64_t rows, int64_t width, int threads, F&& part) {
#ifndef _OPENMP
    (void)width, (void)threads;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * width > SERIAL_NUMBERS)
    each_row(rows, part);
}

}  // namespace

extern "C" void kvbaton_rms_norm(void* x, void* weight, void* out, int64_t rows, int64_t width,
                                 float eps, int32_t bfloat16, int32_t threads) {
    with_type(bfloat16, [&](auto* x, auto* weight, auto* out) {
        with_threads(rows, width, threads, [&](int64_t row) {
            rms_norm(x + row * width, weight, out + row * width, width, eps);
        });
    }, x, weight, out);
}

extern "C" void kvbaton_swiglu(void* gate_up, void* out, int64_t rows, int64_t inner,
                               int32_t bfloat16, int32_t threads) {
    with_type(bfloat16, [&](auto* gate_up, auto* out) {
        with_threads(rows, inner, threads, [&](int64_t row) {
            swiglu(gate_up + 2 * row * inner, out + row * inner, inner);
        });
    }, gate_up, out);
}

extern "C" void kvbaton_place(const Placement* placement, void* qkv, void* norm, void* cos, void* sin,
                              void* keys, int64_t rows, int32_t bfloat16, int32_t int8_kv,
                              int32_t threads) {
    const Placement& p = *placement;
    const int64_t width = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim;
    with_types(bfloat16, int8_kv, [&](auto* keys, auto* qkv, auto* norm, auto* cos, auto* sin) {
        with_threads(rows, width, threads, [&](int64_t row) {
            place_row(p, qkv, norm, cos + row * p.head_dim, sin + row * p.head_dim, keys, row);
        });
    }, keys, qkv, norm, cos, sin);
}
