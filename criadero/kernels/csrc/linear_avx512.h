// What linear_avx512.cpp and linear_avx512_bf16.cpp share. Internal linkage, for the reason given in vec.h.
#pragma once
#include <immintrin.h>

#include "linear.h"

namespace criadero {

void avx512_bf16_tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add);

namespace {

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
