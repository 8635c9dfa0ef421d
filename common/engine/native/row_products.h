// The arithmetic of attention of few queries: rows of keys and values where they lie, each with several
// rows of queries or weights.
#pragma once

#include "ahead.h"
#include "softmax.h"

constexpr int PAIR = 2 * LANES;    // numbers of a row that are taken at once
constexpr int MOST = 4;            // rows at once

// Vectors of sums for each of R rows, by how many registers there are.
#if defined(__AVX512VL__) || defined(__aarch64__)
template <int R>
constexpr int WIDEST = 4;
#else
template <int R>
constexpr int WIDEST = R < 3 ? 4 : 2;
#endif

// PAIR numbers as two vectors. bfloat16 is the upper half of a float, so a vector of them splits into
// its even and its odd numbers by a shift and a mask; `place` gives the order that makes.
struct WidePair {
    Vec first, second;
};
inline WidePair load_pair(const float* p) { return {load(p), load(p + LANES)}; }
inline WidePair load_pair(const BFloat16* p) {
    const IntVec both = load_wide(p);
    return {reinterpret_cast<Vec>(both << 16),
            reinterpret_cast<Vec>(both & int32_t(0xffff0000))};
}
inline WidePair load_pair(const int8_t* p) { return {load(p), load(p + LANES)}; }
inline int place(const float*, int d) { return d; }
inline int place(const int8_t*, int d) { return d; }
inline int place(const BFloat16*, int d) {
    return (d & ~(PAIR - 1)) + (d & 1) * LANES + (d >> 1 & (LANES - 1));
}

// sums[i][r] gains the products of PAIR numbers of query r and key i, lane by lane.
template <int R, typename K>
inline void add_products(Vec (*sums)[R], const float* queries, int width, const K* const* keys, int d) {
    const WidePair one = load_pair(keys[0] + d), other = load_pair(keys[1] + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const Vec query = load(queries + d + r * width);
        add_product(sums[0][r], query, one.first);
        add_product(sums[1][r], query, other.first);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const Vec query = load(queries + d + r * width + LANES);
        add_product(sums[0][r], query, one.second);
        add_product(sums[1][r], query, other.second);
    }
}

// OF_VALUES<O> rows of values are taken at once.
template <typename O>
constexpr int OF_VALUES = std::is_same_v<O, BFloat16> ? 2 : 1;

template <typename V>
inline WidePair load_values(const float*, const V* const* values, int d) {
    return load_pair(values[0] + d);
}
inline void add_weighted(Vec& sum, Vec values, const float* weight) {
    add_product(sum, values, splat(*weight));
}

#if BFLOAT16_PRODUCTS
// Two products go to each lane: of neighbouring dimensions for keys, and, once two rows are
// interleaved, of neighbouring positions for values.
template <int R>
inline void add_products(Vec (*sums)[R], const BFloat16* queries, int width, const BFloat16* const* keys,
                         int d) {
    const IntVec one = load_wide(keys[0] + d), other = load_wide(keys[1] + d);
    for (int r = 0; r < R; r++) {
        const IntVec query = load_wide(queries + d + r * width);
        sums[0][r] = add_pairs(sums[0][r], query, one);
        sums[1][r] = add_pairs(sums[1][r], query, other);
    }
}
struct WideIntPair {
    IntVec first, second;
};
inline WideIntPair load_values(const BFloat16*, const BFloat16* const* values, int d) {
    const auto row = [&](int i) { return _mm512_loadu_si512(values[i] + d); };
    return {reinterpret_cast<IntVec>(_mm512_unpacklo_epi16(row(0), row(1))),
            reinterpret_cast<IntVec>(_mm512_unpackhi_epi16(row(0), row(1)))};
}
inline void add_weighted(Vec& sum, IntVec values, const BFloat16* weights) {
    int32_t both;
    std::memcpy(&both, weights, 4);
    sum = add_pairs(sum, values, IntVec{} + both);
}
#endif

// Where dimension d of a query, and of the weighted sums of values, is kept.
template <typename K>
inline int query_place(int d) {
    return std::is_same_v<Operand<K>, BFloat16> ? d : place(static_cast<const K*>(nullptr), d);
}
template <typename K>
inline int sum_place(int d) {
    if (std::is_same_v<Operand<K>, float>) return place(static_cast<const K*>(nullptr), d);
    return (d & ~(PAIR - 1)) + (d >> 2 & 1) * LANES + (d >> 3 & 3) * 4 + (d & 3);  // unpacklo, -hi
}

// Scores of R rows for `count` keys.
template <int R, typename O, typename K, typename Width, typename A>
void score_span(const O* queries, Width width, const K* const* keys, int count, float* scores,
                A& ahead) {
    for (int s = 0; s < count; s += LANES) {
        Vec fours[R][LANES / 4];
        for (int i = 0; i < LANES; i += 4) {
            Vec sums[4][R] = {};
#pragma GCC unroll 2
            for (int key = 0; key < 4; key += 2) {
                ahead.fetch();
                ahead.fetch();
                asm("" : "+r"(queries));  // or the compiler would copy what it read
                for (int d = 0; d < width; d += PAIR)
                    add_products<R>(sums + key, queries, width, keys + s + i + key, d);
            }
            for (int r = 0; r < R; r++)
                fours[r][i / 4] = add_crosswise<4>(add_crosswise<2>(sums[0][r], sums[1][r]),
                                                   add_crosswise<2>(sums[2][r], sums[3][r]));
        }
        for (int r = 0; r < R; r++) store(scores + r * SPAN + s, sum_fours(fours[r]));
    }
}

// sums[r] = sums[r] * shrink + weights[r][0..count) . values[0..count) for R rows and the W vectors
// from `d` on.
template <typename O, typename V, int R, int W, typename A>
void add_values(const O* weights, const Running* rows, int width, const V* const* values, int count,
                float* sums, int d, A& ahead) {
    Vec acc[R][W];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++)
            acc[r][w] = load(sums + r * width + d + w * LANES) * rows[r].shrink;
    for (int s = 0; s < count; s += OF_VALUES<O>) {
        if (d == 0)
            for (int i = 0; i < OF_VALUES<O>; i++) ahead.fetch();
#pragma GCC unroll 2
        for (int w = 0; w < W; w += 2) {  // unrolled, or the sums would be kept in memory
            const auto pair = load_values(weights, values + s, d + w * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                add_weighted(acc[r][w], pair.first, weights + r * SPAN + s);
                add_weighted(acc[r][w + 1], pair.second, weights + r * SPAN + s);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) store(sums + r * width + d + w * LANES, acc[r][w]);
}

template <int R, typename O, typename V, typename A>
void add_span(const O* weights, const Running* rows, int width, const V* const* values, int count,
              float* sums, A& ahead) {
    int d = 0;
    for (; d + WIDEST<R> * LANES <= width; d += WIDEST<R> * LANES)
        add_values<O, V, R, WIDEST<R>>(weights, rows, width, values, count, sums, d, ahead);
    if constexpr (WIDEST<R> > 2)
        if (d < width) add_values<O, V, R, 2>(weights, rows, width, values, count, sums, d, ahead);
}

// Rows as operands, each `width` long, in the order that load_pair makes.
template <typename T>
void copy_rows(const T* const* rows, int count, int head_dim, int width, float* out,
               const float** copies) {
    for (int s = 0; s < SPAN; s++) {
        float* line = out + s * width;
        copies[s] = line;
        if (s >= count) continue;
        int d = 0;
        for (; d + PAIR <= head_dim; d += PAIR) {
            const WidePair pair = load_pair(rows[s] + d);
            store(line + d, pair.first);
            store(line + d + LANES, pair.second);
        }
        for (; d < head_dim; d++) line[place(rows[s], d)] = widen(rows[s][d]);
    }
}
[[maybe_unused]] inline void copy_rows(const BFloat16* const* rows, int count, int head_dim, int width,
                                       BFloat16* out, const BFloat16** copies) {
    for (int s = 0; s < SPAN; s++) {
        copies[s] = out + s * width;
        if (s < count) std::memcpy(out + s * width, rows[s], head_dim * sizeof(BFloat16));
    }
}
