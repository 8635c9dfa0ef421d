// Rows of int8: numbers, and after them one float, their scale.
#pragma once

#include <cfloat>

#include "vectors.h"

inline float scale_of(const int8_t* row, int64_t dim) {
    float scale;
    std::memcpy(&scale, row + dim, sizeof scale);
    return scale;
}

// As quantise() of quantization.py: a row with a number that is not finite gets a scale that is not.
template <typename T>
float scale_for(const T* x, int64_t dim) {
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
    return scale < FLT_MIN ? FLT_MIN : scale;
}

template <typename T>
void store_row(const T* x, int8_t* row, int64_t dim) {
    const float scale = scale_for(x, dim);
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
