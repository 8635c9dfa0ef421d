// Floats in the compiler's vectors: 512 bits with AVX-512, 256 with AVX2, else 128.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>

constexpr int LANES = 16;
#elif defined(__AVX2__)
#include <immintrin.h>

constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));  // shifts bring zeros, sums may wrap
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
typedef int8_t ByteVec __attribute__((vector_size(LANES)));

constexpr float LOG2_E = 1.4426950408889634f;

struct BFloat16 {
    uint16_t bits;
};

// A number that the compiler knows, as an argument.
template <int N>
struct Number {
    constexpr int operator()() const { return N; }
    constexpr operator int() const { return N; }
};

// Calls part with the arguments as pointers to the numbers they point to.
template <typename F, typename... Pointers>
void with_type(int32_t bfloat16, F&& part, Pointers... pointers) {
    if (bfloat16)
        part(static_cast<BFloat16*>(pointers)...);
    else
        part(static_cast<float*>(pointers)...);
}

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 is no copy of -0, and takes an addition

// sum += a * b. Of 16 registers compilers lose some by keeping what was in others' place, so there they
// are told where the sum stays.
inline void add_product(Vec& sum, Vec a, Vec b) {
#if defined(__FMA__) && !defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum += a * b;
#endif
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void convert(float x, float* out) { *out = x; }
inline void convert(BFloat16 x, float* out) { *out = widen(x); }
inline void convert(BFloat16 x, BFloat16* out) { *out = x; }
inline void convert(float x, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec pick(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// Halves of 32 bits, and back: what the compiler does not find by itself for 512 bits.
inline IntVec widen(HalfVec halves) {
#if defined(__AVX512F__)
    return reinterpret_cast<IntVec>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#else
    return __builtin_convertvector(halves, IntVec);
#endif
}
inline HalfVec narrow(IntVec whole) {
#if defined(__AVX512F__)
    return reinterpret_cast<HalfVec>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(whole)));
#else
    return __builtin_convertvector(whole, HalfVec);
#endif
}

// LANES numbers as floats, and floats rounded to nearest, ties to even; NaN stays NaN.
inline Vec load(const BFloat16* p) {
    HalfVec halves;
    std::memcpy(&halves, p, sizeof halves);
    return reinterpret_cast<Vec>(widen(halves) << 16);
}
inline IntVec rounded_bits(Vec v) {  // of which the upper halves count
    const IntVec bits = reinterpret_cast<IntVec>(v);
    return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : IntVec{} + 0x7fc00000;
}
inline Vec round_as(const float*, Vec v) { return v; }
inline Vec round_as(const BFloat16*, Vec v) {
    return reinterpret_cast<Vec>(rounded_bits(v) & int32_t(0xffff0000));
}
inline void store(BFloat16* p, Vec v) {
    const HalfVec halves = narrow(rounded_bits(v) >> 16);
    std::memcpy(p, &halves, sizeof halves);
}

// int8 from floats up to 127 in magnitude, to nearest, ties to even; NaN becomes 0.
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)  // which the compiler does not find by itself
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const auto whole = reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const auto whole = reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(bytes));
#else
    ByteVec bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const IntVec whole = __builtin_convertvector(bytes, IntVec);
#endif
    return __builtin_convertvector(whole, Vec);
}
inline IntVec nearest(Vec v) {
    const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23
    const IntVec whole = reinterpret_cast<IntVec>(v + magic) - reinterpret_cast<IntVec>(magic);
    return whole & reinterpret_cast<IntVec>(v == v);
}
inline void store(int8_t* p, IntVec whole) {
    const ByteVec bytes = __builtin_convertvector(whole, ByteVec);
    std::memcpy(p, &bytes, sizeof bytes);
}
inline void store(int8_t* p, Vec v) { store(p, nearest(v)); }

// LANES numbers, of which the first `count` are there; the others are 0, and are not stored.
template <typename T>
inline Vec load_some(const T* p, int64_t count) {
    if (count >= LANES) return load(p);
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <typename T>
inline void store_some(T* p, Vec v, int64_t count) {
    if (count >= LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    std::memcpy(p, part, count * sizeof(T));
}

// One number from all lanes, in a fixed order.
template <int HALF = LANES / 2, typename F>
inline float reduce(Vec v, F&& combine) {
    IntVec other;
    for (int i = 0; i < LANES; i++) other[i] = i ^ HALF;
    v = combine(v, __builtin_shuffle(v, other));
    if constexpr (HALF > 1) return reduce<HALF / 2>(v, combine);
    return v[0];
}
inline float sum_all(Vec v) {
    return reduce(v, [](Vec a, Vec b) { return a + b; });
}

// 2^x for x <= 0: nearest integer by the rounding trick, then a polynomial on [-0.5, 0.5] (Cephes
// exp2f). Below -126 the result is the smallest normal number, which nothing here can see. NaN stays
// NaN, whatever its payload.
inline Vec exp2_negative(Vec exact) {
    const Vec least = Vec{} - 126.0f;
    const Vec x = least > exact ? least : exact;
    const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec y = Vec{} + 1.535336188319500e-4f;
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
    return exact == exact ? reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) + exponent) : exact;
}
