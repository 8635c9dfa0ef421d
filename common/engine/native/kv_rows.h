// Rows of keys and values as the cache holds them: numbers of the model's type, or int8 with a scale.
//
// A row is the numbers of one position and head; of int8 its scale lies with it, so a block stays one
// run of bytes, whoever copies it.
#pragma once

#include <type_traits>

#include "int8_rows.h"

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

template <typename T>
void store_row(const T* x, T* row, int64_t dim) {
    std::memcpy(row, x, dim * sizeof(T));
}
