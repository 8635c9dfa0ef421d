// Matrix products, step by step: a step along the inner dimension takes DEPTH numbers of each operand.
#pragma once

#include <type_traits>

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define BFLOAT16_PRODUCTS 1
#else
#define BFLOAT16_PRODUCTS 0
#endif

// What is multiplied with weights, keys and values of type T: bfloat16 where the processor multiplies
// it, else float.
template <typename T>
using Operand = std::conditional_t<BFLOAT16_PRODUCTS && std::is_same_v<T, BFloat16>, BFloat16, float>;

// A vector's worth of smaller numbers as they lie, pairs of bfloat16 or fours of int8 in each lane.
template <typename T>
inline IntVec load_wide(const T* p) {
    static_assert(sizeof(T) < 4, "floats fill a lane: load");
    IntVec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Lane by lane, sums of two of a's lanes, or of b's. Vectors are paired so again and again, N being of how
// many the result is (2, 4, then 8 and more): lane i of the last is then the sum of all lanes of vector i.
template <int N>
inline Vec add_crosswise(Vec a, Vec b) {
    IntVec one, other;
    for (int i = 0; i < LANES; i++) {
        const int four = i & ~3, at = i & 3;  // lanes of 128 bits are shuffled at once
        one[i] = N == 2   ? four + at / 2 + at % 2 * LANES
                 : N == 4 ? four + at % 2 + at / 2 * LANES
                          : 2 * four + at;
        other[i] = one[i] + (N > 4 ? 4 : 2);
    }
    return __builtin_shuffle(a, b, one) + __builtin_shuffle(a, b, other);
}

// The last of them, of COUNT vectors that are of four each, which are worked in.
template <int COUNT = LANES / 4>
inline Vec sum_fours(Vec* v) {
    if constexpr (COUNT == 1) {
        return v[0];
    } else {
        for (int i = 0; i < COUNT / 2; i++) v[i] = add_crosswise<8>(v[2 * i], v[2 * i + 1]);
        return sum_fours<COUNT / 2>(v);
    }
}

// Two vectors of columns side by side: what a panel of packed weights holds for one step.
constexpr int PANEL = 2 * LANES;
constexpr int STEP_BYTES = 4 * PANEL;

// A lane has 4 bytes of neighbours of the inner dimension: a float, a pair of bfloat16, four int8.
template <typename T>
constexpr int DEPTH = 4 / int(sizeof(T));

// A tile's rows of operands, `stride` apart. Three go by one pointer, as far as an address reaches by
// itself; compilers would else look up each row's distance in memory, and that took 6 % of a product.
template <typename O, int R>
class TileRows {
  public:
    TileRows(const O* x, int64_t stride) : stride(stride) {
        for (int i = 0; i < NUM; i++) firsts[i] = x + 3 * i * stride;
    }
    const O* operator[](int r) const { return firsts[r / 3] + r % 3 * stride; }
    TileRows operator+(int d) const {
        TileRows moved = *this;
        for (const O*& first : moved.firsts) first += d;
        return moved;
    }
    void advance(int d) {
        for (const O*& first : firsts) {
            const O* next = first + d;
            asm("" : "+r"(next));  // or the compiler would see how the four are related
            first = next;
        }
    }

  private:
    static constexpr int NUM = (R + 2) / 3;
    const O* firsts[NUM];
    int64_t stride;
};

// sums[r] gains the products of row r's next DEPTH numbers and the next numbers of PANEL columns.
template <int R>
inline void add_step(Vec (&sums)[R][2], const TileRows<float, R>& x, const float* panel) {
    const Vec first = load(panel), second = load(panel + LANES);
    for (int r = 0; r < R; r++) {
        const Vec row = splat(x[r][0]);
        add_product(sums[r][0], first, row);
        add_product(sums[r][1], second, row);
    }
}

template <int R>
inline void add_step(Vec (&sums)[R][2], const TileRows<float, R>& x, const BFloat16* panel) {
    const IntVec first = load_wide(panel), second = load_wide(panel + PANEL);
    const auto even = [](IntVec both) { return reinterpret_cast<Vec>(both << 16); };
    const auto odd = [](IntVec both) {
        return reinterpret_cast<Vec>(both & int32_t(0xffff0000));
    };
    const Vec even_first = even(first), even_second = even(second);
    for (int r = 0; r < R; r++) {
        const Vec row = splat(x[r][0]);
        add_product(sums[r][0], even_first, row);
        add_product(sums[r][1], even_second, row);
    }
    const Vec odd_first = odd(first), odd_second = odd(second);
    for (int r = 0; r < R; r++) {
        const Vec row = splat(x[r][1]);
        add_product(sums[r][0], odd_first, row);
        add_product(sums[r][1], odd_second, row);
    }
}

inline void store_weights(float* p, Vec weights) { store(p, weights); }

#if BFLOAT16_PRODUCTS
inline Vec add_pairs(Vec sum, IntVec a, IntVec b) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                      reinterpret_cast<__m512bh>(a),
                                                      reinterpret_cast<__m512bh>(b)));
}
inline void store_weights(BFloat16* p, Vec weights) {
    const auto narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(weights));
    std::memcpy(p, &narrow, sizeof narrow);
}

template <int R>
inline void add_step(Vec (&sums)[R][2], const TileRows<BFloat16, R>& x, const BFloat16* panel) {
    const IntVec first = load_wide(panel), second = load_wide(panel + PANEL);
    for (int r = 0; r < R; r++) {
        int32_t both;
        std::memcpy(&both, x[r], 4);
        const IntVec row = IntVec{} + both;
        sums[r][0] = add_pairs(sums[r][0], row, first);
        sums[r][1] = add_pairs(sums[r][1], row, second);
    }
}
#endif

// Number i of each four, exactly.
inline Vec number(IntVec fours, int i) {
    return __builtin_convertvector((fours << (24 - 8 * i)) >> 24, Vec);
}

// A step of an int8 panel holds several of a panel of another type: the one of its numbers from d on.
inline void widen_step(const int8_t* panel, int d, float* out) {
    for (int v = 0; v < 2; v++) store(out + v * LANES, number(load_wide(panel + v * 4 * LANES), d));
}
inline void widen_step(const int8_t* panel, int d, BFloat16* out) {
    for (int v = 0; v < 2; v++) {
        const IntVec fours = load_wide(panel + v * 4 * LANES);
        const auto bits = [&](int i) { return reinterpret_cast<BitVec>(number(fours, i)); };
        const BitVec pairs = bits(d) >> 16 | (bits(d + 1) & 0xffff0000);
        std::memcpy(out + v * 2 * LANES, &pairs, sizeof pairs);
    }
}

// The same sums, to the bit, as the steps of a widened panel give.
template <int R, typename O>
inline void add_step(Vec (&sums)[R][2], const TileRows<O, R>& x, const int8_t* panel) {
#pragma GCC unroll 4
    for (int d = 0; d < DEPTH<int8_t>; d += DEPTH<O>) {
        alignas(64) O wide[DEPTH<O> * PANEL];
        widen_step(panel, d, wide);
        add_step<R>(sums, x + d, wide);
    }
}
