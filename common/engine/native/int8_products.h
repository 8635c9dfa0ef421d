// Products of int8 with int8. Their sums are exact, of up to 133,000 products, and so the same on any
// processor.
//
// A row of x is rounded by itself, as a row of int8 KV is (int8_rows.h). Its numbers lie as the
// processor multiplies them, and after them what turns a sum of products into the product.
#pragma once

#include "int8_rows.h"
#include "wide.h"

#if (defined(__AVX512VNNI__) && defined(__AVX512F__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define INT8_PRODUCTS 1
using Rounded = int8_t;
#else  // pmaddwd adds the products of two neighbours
#define INT8_PRODUCTS 0
using Rounded = int16_t;
#endif

struct RowEnd {
    float scale;
    uint32_t excess;  // of each of its sums, where weights have no sign: see add_fours
};

// Whole numbers of a row where they belong; fours as 0, 2, 1, 3 where a panel's even and odd ones are
// split by shifts.
inline void store_rounded(Rounded* row, IntVec whole) {
#if INT8_PRODUCTS
    store(row, whole);
#else
    HalfVec split;
    for (int i = 0; i < LANES; i++) split[i] = (i & ~3) + (i & 1) * 2 + (i >> 1 & 1);
    const HalfVec halves = __builtin_shuffle(narrow(whole), split);
    std::memcpy(row, &halves, sizeof halves);
#endif
}

// `dim` numbers of x as a row for products: then zeros up to a whole step, and the row's end.
template <typename T>
void round_row(const T* x, Rounded* row, int64_t dim) {
    RowEnd end = {scale_for(x, dim), 0};
    IntVec sums = {};
    for (int64_t d = 0; d < dim; d += LANES) {  // there is room for a cache line
        const IntVec whole = nearest(load_some(x + d, dim - d) / end.scale);
        store_rounded(row + d, whole);
        sums += whole;
    }
    if (INT8_PRODUCTS)
        for (int i = 0; i < LANES; i++) end.excess += 128 * uint32_t(sums[i]);
    constexpr int64_t step = DEPTH<int8_t>;
    std::memcpy(row + (dim + step - 1) / step * step, &end, sizeof end);
}

// What a tile adds to, for operands of type O, and what it comes to for a row that ends at `end`.
template <typename O>
using Sum = std::conditional_t<std::is_same_v<O, Rounded>, IntVec, Vec>;
template <typename O>
inline Vec total(Vec sum, const O*) {
    return sum;
}
inline Vec total(IntVec sum, const Rounded* end) {
    RowEnd row;
    std::memcpy(&row, end, sizeof row);
    const BitVec whole = reinterpret_cast<BitVec>(sum) - row.excess;
    return __builtin_convertvector(reinterpret_cast<IntVec>(whole), Vec) * row.scale;
}

inline IntVec four_bytes(const void* p) {  // in every lane
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return IntVec{} + bytes;
}

#if INT8_PRODUCTS
// The instruction takes weights without a sign: with 128 more than they are, a sum has 128 times its row.
inline IntVec add_fours(IntVec sum, IntVec weights, IntVec x) {
#if defined(__AVX512F__)
    const auto bits = [](IntVec v) { return reinterpret_cast<__m512i>(v); };
    return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(bits(sum), bits(weights), bits(x)));
#else
    const auto bits = [](IntVec v) { return reinterpret_cast<__m256i>(v); };
    return reinterpret_cast<IntVec>(_mm256_dpbusd_avx_epi32(bits(sum), bits(weights), bits(x)));
#endif
}

template <int R>
inline void add_step(IntVec (&sums)[R][2], const TileRows<Rounded, R>& x, const int8_t* panel) {
    const int32_t signs = int32_t(0x80808080);
    const IntVec first = load_wide(panel) ^ signs, second = load_wide(panel + 4 * LANES) ^ signs;
    for (int r = 0; r < R; r++) {
        const IntVec row = four_bytes(x[r]);
        sums[r][0] = add_fours(sums[r][0], first, row);
        sums[r][1] = add_fours(sums[r][1], second, row);
    }
}
#else
// sum gains a and b's products, of both int16 in each lane. See add_product.
inline void add_short_pairs(IntVec& sum, IntVec a, IntVec b) {
#if defined(__AVX512BW__)
    const auto bits = [](IntVec v) { return reinterpret_cast<__m512i>(v); };
    sum += reinterpret_cast<IntVec>(_mm512_madd_epi16(bits(a), bits(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    IntVec both;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=x"(both) : "x"(a), "x"(b));
#else
    sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

template <int R>
inline void add_step(IntVec (&sums)[R][2], const TileRows<Rounded, R>& x, const int8_t* panel) {
    typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {  // the even ones first
        const auto pairs = [&](const int8_t* from) {
            const auto fours = reinterpret_cast<Shorts>(load_wide(from));
            return reinterpret_cast<IntVec>((odd ? fours : fours << 8) >> 8);
        };
        const IntVec first = pairs(panel), second = pairs(panel + 4 * LANES);
        for (int r = 0; r < R; r++) {
            const IntVec row = four_bytes(x[r] + 2 * odd);
            add_short_pairs(sums[r][0], first, row);
            add_short_pairs(sums[r][1], second, row);
        }
    }
}
#endif
