// What linear_avx512.cpp and linear_avx512_bf16.cpp share. Internal linkage, for the reason given in vec.h.
#pragma once
#include <immintrin.h>

#include "linear.h"
#include "vec.h"

namespace criadero {

// See LinearKernels::many.
void avx512_many(const Weights& w, const Block* blocks, int count, int first, int last, float* sums, float* y, size_t stride, bool add);
void avx512_bf16_tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add);

namespace {

#define UNROLL _Pragma("GCC unroll 16")

inline __m512i four(const int8_t* p) {  // 4 bytes in every lane: becomes an embedded broadcast
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

inline __m512 half16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// 32 columns of 16 rows as unsigned bytes, 4 columns a register.
template <Kind KIND>
inline void unpack(const uint8_t* p, __m512i* w) {
    if (KIND == Kind::int8) {
        UNROLL
        for (int j = 0; j < 8; ++j) w[j] = _mm512_loadu_si512(p + 64 * j);
        return;
    }
    const __m512i low = _mm512_set1_epi8(15);
    UNROLL
    for (int j = 0; j < 4; ++j) {
        const __m512i both = _mm512_loadu_si512(p + 64 * j);
        w[2 * j] = _mm512_and_si512(both, low);
        w[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

// The offset's part of a sum: `stored` is -8 x the sum of the activations.
template <Kind KIND>
inline __m512i offset(const int32_t* stored) {
    if (KIND == Kind::int4_mins) return _mm512_setzero_si512();  // the mins take care of it
    const __m512i eight = _mm512_set1_epi32(*stored);
    return KIND == Kind::int8 ? _mm512_slli_epi32(eight, 4) : eight;
}

// Rows m of tile t: y = sums * scale (or sums), without what lies beyond the last output or the last row.
template <int M>
inline void store_tile(const Weights& w, const Block& b, int t, const __m512* sums, const __m512* scale, float* y, size_t stride, bool add) {
    const int there = w.rows - t * TILE;
    const __mmask16 mask = there >= TILE ? (__mmask16)0xffff : (__mmask16)((1u << there) - 1);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        if (m >= b.rows) break;
        float* to = y + (size_t)m * stride + (size_t)t * TILE;
        __m512 value = scale ? _mm512_mul_ps(sums[m], *scale) : sums[m];
        if (add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value);
        _mm512_mask_storeu_ps(to, mask, value);
    }
}

}  // namespace
}  // namespace criadero
