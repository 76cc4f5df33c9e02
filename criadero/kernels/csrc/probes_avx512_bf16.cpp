#include "probes.h"

#include <immintrin.h>

namespace criadero {

namespace {

double bf16(int rounds) {
    constexpr int CHAINS = 16;
    __m512 sums[CHAINS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3c00);
    for (int r = 0; r < rounds; ++r) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b);
    }
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
    return 64.0 * CHAINS * rounds;
}

}  // namespace

Probes probes_avx512_bf16() { return {nullptr, nullptr, bf16, nullptr}; }

}  // namespace criadero
