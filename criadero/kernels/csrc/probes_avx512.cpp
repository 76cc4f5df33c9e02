#include "probes.h"

#include <immintrin.h>

#include "cpu.h"

namespace criadero {

namespace {

template <_mm_hint HINT>
uint64_t read(const uint8_t* p, size_t bytes) {
    __m512i sums[4];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    // Four loads a turn: of sixteen, each 1 KiB from its last, the processor's own prefetching makes a third of this.
    for (const uint8_t* end = p + bytes; p < end; p += 256) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            _mm_prefetch((const char*)p + 4096 + 64 * i, HINT);
            sums[i] = _mm512_xor_si512(sums[i], _mm512_loadu_si512(p + 64 * i));
        }
    }
    uint64_t words[8], all = 0;
    for (auto& sum : sums) {
        _mm512_storeu_si512(words, sum);
        for (uint64_t word : words) all ^= word;
    }
    return all;
}

constexpr int CHAINS = 16;

double int8(int rounds) {
    __m512i sums[CHAINS];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    for (int r = 0; r < rounds; ++r) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    }
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
    return 128.0 * CHAINS * rounds;
}

double f32(int rounds) {
    __m512 sums[CHAINS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512 a = _mm512_set1_ps(1.5f), b = _mm512_set1_ps(1e-3f);
    for (int r = 0; r < rounds; ++r) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
    }
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
    return 32.0 * CHAINS * rounds;
}

}  // namespace

// Fetching past the caches halves what Intel's processors read (17 GB/s of one Emerald Rapids core, 8 so); AMD's it helps.
Probes probes_avx512() { return {cpu().amd ? read<_MM_HINT_NTA> : read<_MM_HINT_T0>, int8, nullptr, f32}; }

}  // namespace criadero
