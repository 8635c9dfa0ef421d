// Rows of keys and values as the cache holds them: numbers of the model's type, or int8 with a scale.
//
// A row of int8 is the numbers of one position and head, and after them one float, their scale: so a
// block stays one run of bytes, whoever copies it.
#pragma once

#include <cfloat>
#include <type_traits>

#include "vectors.h"

template <typename K>
constexpr bool HAS_SCALES = std::is_same_v<K, int8_t>;

// Calls part with what the cache holds and the other arguments as pointers to their numbers.
template <typename F, typename... Pointers>
void with_types(int32_t bfloat16, int32_t int8_kv, F&& part, void* kept, Pointers... pointers) {
    with_type(bfloat16, [&](auto* numbers, auto*... others) {
        if (int8_kv)
            part(static_cast<int8_t*>(kept), others...);
        else
            part(numbers, others...);
    }, kept, pointers...);
}

// Elements from a row of `dim` numbers to the next.
template <typename K>
constexpr int64_t row_stride(int64_t dim) {
    return HAS_SCALES<K> ? dim + int64_t(sizeof(float)) : dim;
}

inline float scale_of(const int8_t* row, int64_t dim) {
    float scale;
    std::memcpy(&scale, row + dim, sizeof scale);
    return scale;
}

template <typename T>
void store_row(const T* x, T* row, int64_t dim) {
    std::memcpy(row, x, dim * sizeof(T));
}

// As quantise() of quantization.py: a row with a number that is not finite gets a scale that is not.
template <typename T>
void store_row(const T* x, int8_t* row, int64_t dim) {
    IntVec tops = {};
    for (int64_t d = 0; d < dim; d += LANES) {  // magnitudes as integers, of which NaN is the largest
        const IntVec bits = reinterpret_cast<IntVec>(load_some(x + d, dim - d)) & 0x7fffffff;
        tops = bits > tops ? bits : tops;
    }
    int32_t top = 0;
    for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    float scale;
    std::memcpy(&scale, &top, sizeof scale);
    scale /= 127.0f;
    if (scale < FLT_MIN) scale = FLT_MIN;
    for (int64_t d = 0; d < dim; d += LANES)
        store_some(row + d, load_some(x + d, dim - d) / scale, dim - d);
    std::memcpy(row + dim, &scale, sizeof scale);
}

// The numbers of a row, rounded to T.
template <typename T>
void load_row(const int8_t* row, int64_t dim, T* out) {
    const float scale = scale_of(row, dim);
    for (int64_t d = 0; d < dim; d += LANES)
        store_some(out + d, load_some(row + d, dim - d) * scale, dim - d);
}
