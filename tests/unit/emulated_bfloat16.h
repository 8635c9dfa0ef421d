// The three AVX512-BF16 instructions of the kernels in AVX-512's own, for processors without them:
// included before their sources, it makes them take the way that multiplies bfloat16.
//
// A sum here is rounded twice for each pair of products; the instruction flushes denormal numbers and
// does not round between the two. Both differ by less than what bfloat16 itself rounds away.
#pragma once

#include <immintrin.h>

#define __AVX512BF16__ 1

// The second numbers of all pairs, then the first ones, are added to the sums.
inline __m512 emulated_512(__m512 sums, __m512bh a, __m512bh b) {
    const __m512i x = (__m512i)a, y = (__m512i)b, upper = _mm512_set1_epi32(0xffff0000);
    sums = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, upper), (__m512)_mm512_and_si512(y, upper), sums);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), sums);
}
inline __m256 emulated_256(__m256 sums, __m256bh a, __m256bh b) {
    const __m256i x = (__m256i)a, y = (__m256i)b, upper = _mm256_set1_epi32(0xffff0000);
    sums = _mm256_fmadd_ps((__m256)_mm256_and_si256(x, upper), (__m256)_mm256_and_si256(y, upper), sums);
    return _mm256_fmadd_ps((__m256)_mm256_slli_epi32(x, 16), (__m256)_mm256_slli_epi32(y, 16), sums);
}

// Eight floats rounded to nearest, ties to even.
inline __m128bh emulated_rounding(__m256 floats) {
    const __m256i bits = (__m256i)floats, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    return (__m128bh)_mm256_cvtepi32_epi16(_mm256_srli_epi32(up, 16));
}

#define _mm512_dpbf16_ps emulated_512
#define _mm256_dpbf16_ps emulated_256
#define _mm256_cvtneps_pbh emulated_rounding
