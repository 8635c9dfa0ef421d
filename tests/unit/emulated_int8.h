// The instructions that multiply int8, in others that all processors with such vectors have: included
// before the kernels' sources, it makes them take the way of AVX512-VNNI, or of AVX-VNNI.
#pragma once

#include <immintrin.h>

#if defined(__AVX512F__)
#define __AVX512VNNI__ 1
#define EMULATED_BYTES 64
typedef __m512i EmulatedInts;
#else
#define __AVXVNNI__ 1
#define EMULATED_BYTES 32
typedef __m256i EmulatedInts;
#endif

// Fours of bytes of `a` without a sign times those of `b` with one, all four added to each sum.
inline EmulatedInts emulated_fours(EmulatedInts sums, EmulatedInts a, EmulatedInts b) {
    typedef int Ints __attribute__((vector_size(EMULATED_BYTES)));
    typedef unsigned Unsigned __attribute__((vector_size(EMULATED_BYTES)));
    Ints total = (Ints)sums;
    for (int i = 0; i < 32; i += 8)
        total += (Ints)((Unsigned)a << (24 - i) >> 24) * ((Ints)b << (24 - i) >> 24);
    return (EmulatedInts)total;
}

#define _mm512_dpbusd_epi32 emulated_fours
#define _mm256_dpbusd_avx_epi32 emulated_fours
