// Attention's operations on keys and values, by what the processor multiplies: floats, or bfloat16.
#pragma once

#include <type_traits>

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BFLOAT16_PRODUCTS 1
#else
#define BFLOAT16_PRODUCTS 0
#endif

constexpr int PAIR = 2 * LANES;  // numbers that the operations take of a row
typedef int32_t PairVec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// What queries and softmax weights are held in beside keys and values of type T: bfloat16 where the
// processor multiplies it, else float.
template <typename T>
using Operand = std::conditional_t<BFLOAT16_PRODUCTS && std::is_same_v<T, BFloat16>, BFloat16, float>;

// PAIR numbers as two vectors. bfloat16 is the upper half of a float, so a vector of them splits into
// its even and its odd numbers by a shift and a mask; `place` gives the order that makes.
struct VecPair {
    Vec first, second;
};
inline VecPair load_pair(const float* p) { return {load(p), load(p + LANES)}; }
inline VecPair load_pair(const BFloat16* p) {
    const IntVec both = *reinterpret_cast<const PairVec*>(p);
    return {reinterpret_cast<Vec>(both << 16), reinterpret_cast<Vec>(both & int32_t(0xffff0000))};
}
inline VecPair load_pair(const int8_t* p) { return {load(p), load(p + LANES)}; }
inline int place(const float*, int d) { return d; }
inline int place(const int8_t*, int d) { return d; }
inline int place(const BFloat16*, int d) {
    return (d & ~(PAIR - 1)) + (d & 1) * LANES + (d >> 1 & (LANES - 1));
}

// The operations on keys and values, first with float operands. `sum` gains the products of PAIR
// numbers of a query and a key, lane by lane.
template <typename K>
inline Vec add_products(Vec sum, const float* query, const K* key) {
    const VecPair pair = load_pair(key);
    sum += load(query) * pair.first;
    sum += load(query + LANES) * pair.second;
    return sum;
}

// ROWS<Operand> rows of values are taken at once; PAIR numbers of each, from `d` on.
template <typename O>
constexpr int ROWS = std::is_same_v<O, BFloat16> ? 2 : 1;

template <typename V>
inline VecPair load_values(const float*, const V* const* values, int d) {
    return load_pair(values[0] + d);
}
inline Vec add_weighted(Vec sum, Vec values, const float* weights) { return sum + values * *weights; }
inline void store_weights(float* p, Vec weights) { store(p, weights); }

#if BFLOAT16_PRODUCTS
// vdpbf16ps adds two products to each lane: of neighbouring dimensions for keys, and, once two rows
// are interleaved, of neighbouring positions for values.
inline Vec add_bfloat16_products(Vec sum, IntVec a, IntVec b) {
    return reinterpret_cast<Vec>(_mm256_dpbf16_ps(reinterpret_cast<__m256>(sum),
                                                  reinterpret_cast<__m256bh>(a),
                                                  reinterpret_cast<__m256bh>(b)));
}
inline Vec add_products(Vec sum, const BFloat16* query, const BFloat16* key) {
    return add_bfloat16_products(sum, *reinterpret_cast<const PairVec*>(query),
                                 *reinterpret_cast<const PairVec*>(key));
}
struct IntVecPair {
    IntVec first, second;
};
inline IntVecPair load_values(const BFloat16*, const BFloat16* const* values, int d) {
    const auto row = [&](int i) { return _mm256_loadu_si256((const __m256i*)(values[i] + d)); };
    return {reinterpret_cast<IntVec>(_mm256_unpacklo_epi16(row(0), row(1))),
            reinterpret_cast<IntVec>(_mm256_unpackhi_epi16(row(0), row(1)))};
}
inline Vec add_weighted(Vec sum, IntVec values, const BFloat16* weights) {
    int32_t both;
    std::memcpy(&both, weights, 4);
    return add_bfloat16_products(sum, values, IntVec{} + both);
}
inline void store_weights(BFloat16* p, Vec weights) {
    const auto narrow = _mm256_cvtneps_pbh(reinterpret_cast<__m256>(weights));
    std::memcpy(p, &narrow, sizeof narrow);
}
#endif

// Where dimension d of a query, and of the weighted sums of values, is kept.
template <typename T>
inline int query_place(int d) {
    return std::is_same_v<Operand<T>, BFloat16> ? d : place(static_cast<const T*>(nullptr), d);
}
template <typename T>
inline int sum_place(int d) {
    if (std::is_same_v<Operand<T>, float>) return place(static_cast<const T*>(nullptr), d);
    return (d & ~(PAIR - 1)) + (d >> 2 & 1) * LANES + (d >> 3 & 1) * 4 + (d & 3);  // unpacklo, -hi
}
