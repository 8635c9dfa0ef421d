// The two AVX512-BF16 instructions of the kernels in AVX-512's own, for processors without them:
// included before their sources, it makes them take the way that multiplies bfloat16.
//
// A sum here is rounded twice for each pair of products; the instruction flushes denormal numbers and
// does not round between the two. Both differ by less than what bfloat16 itself rounds away.
#pragma once

#include <immintrin.h>

#define __AVX512BF16__ 1

// The second numbers of all pairs, then the first ones, are added to the sums.
inline __m512 emulated_products(__m512 sums, __m512bh a, __m512bh b) {
    const __m512i x = (__m512i)a, y = (__m512i)b, upper = _mm512_set1_epi32(0xffff0000);
    sums = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, upper), (__m512)_mm512_and_si512(y, upper), sums);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), sums);
}

// Sixteen floats rounded to nearest, ties to even.
inline __m256bh emulated_rounding(__m512 floats) {
    const __m512i bits = (__m512i)floats, one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    return (__m256bh)_mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

#define _mm512_dpbf16_ps emulated_products
#define _mm512_cvtneps_pbh emulated_rounding
