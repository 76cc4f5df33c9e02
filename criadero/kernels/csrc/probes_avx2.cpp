#include "probes.h"

#include <immintrin.h>

#include "cpu.h"

namespace criadero {

namespace {

template <_mm_hint HINT>
uint64_t read(const uint8_t* p, size_t bytes) {
    __m256i sums[8];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (const uint8_t* end = p + bytes; p < end; p += 256) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            if (i % 2 == 0) _mm_prefetch((const char*)p + 4096 + 32 * i, HINT);
            sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256((const __m256i*)(p + 32 * i)));
        }
    }
    uint64_t words[4], all = 0;
    for (auto& sum : sums) {
        _mm256_storeu_si256((__m256i*)words, sum);
        for (uint64_t word : words) all ^= word;
    }
    return all;
}

constexpr int CHAINS = 12;

double int8(int rounds) {  // products of pairs in int16, added up in int16: what int4 weights can use; int8 ones need more
    __m256i sums[CHAINS];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) {
            __asm__ volatile("" : "+x"(a), "+x"(b));
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(a, b));
        }
    }
    for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
    return 64.0 * CHAINS * rounds;
}

double f32(int rounds) {
    __m256 sums[CHAINS];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    __m256 a = _mm256_set1_ps(1.5f), b = _mm256_set1_ps(1e-3f);
    for (int r = 0; r < rounds; ++r) {
        __asm__ volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
    }
    for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
    return 16.0 * CHAINS * rounds;
}

}  // namespace

Probes probes_avx2() { return {cpu().amd ? read<_MM_HINT_NTA> : read<_MM_HINT_T0>, int8, nullptr, f32}; }

}  // namespace criadero
