// What train_avx512_bf16.cpp and train_attend_avx512_bf16.cpp share. Internal linkage, for the reason given in vec.h.
#pragma once
#include "train.h"
#include "transpose16.h"
#include "vec.h"

namespace criadero {
namespace {

template <int NV>
inline void panel(const PanelTask& t) {
    __m512 s[PANEL_ROWS][NV];
#pragma GCC unroll 6
    for (int r = 0; r < PANEL_ROWS; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) s[r][j] = t.more ? _mm512_loadu_ps(t.sums + r * t.sums_stride + 16 * j) : _mm512_setzero_ps();
    }
    const uint16_t* a[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; ++r) a[r] = t.a + (size_t)least(r, t.rows - 1) * t.row_stride;
    const uint16_t* b = t.b;
    const size_t step = t.pair_stride;
    for (int k = 0; k < t.pairs; ++k, b += t.b_step) {
        __m512bh v[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) v[j] = (__m512bh)_mm512_loadu_si512(b + 32 * j);
#pragma GCC unroll 6
        for (int r = 0; r < PANEL_ROWS; ++r) {
            int32_t pair;
            memcpy(&pair, a[r] + k * step, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) s[r][j] = _mm512_dpbf16_ps(s[r][j], x, v[j]);
        }
    }
    if (!t.last) {
#pragma GCC unroll 6
        for (int r = 0; r < PANEL_ROWS; ++r) {
            if (r >= t.rows) break;
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) _mm512_storeu_ps(t.sums + r * t.sums_stride + 16 * j, s[r][j]);
        }
        return;
    }
#pragma GCC unroll 6
    for (int r = 0; r < PANEL_ROWS; ++r) {
        if (r >= t.rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            const int there = least(16, t.columns - 16 * j);
            const __mmask16 mask = (__mmask16)((1u << there) - 1);
            __m512 y = s[r][j];
            if (t.residual) {
                const __m256i bits = _mm256_maskz_loadu_epi16(mask, t.residual + r * t.residual_stride + 16 * j);
                y = _mm512_add_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
            }
            if (t.out_f32) {
                float* to = (float*)t.out + r * t.out_stride + 16 * j;
                if (t.add) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to));
                _mm512_mask_storeu_ps(to, mask, y);
            } else {
                _mm256_mask_storeu_epi16((uint16_t*)t.out + r * t.out_stride + 16 * j, mask, (__m256i)_mm512_cvtneps_pbh(y));
            }
        }
    }
}

// Two rows of 16 numbers, one beside the other
inline __m512i beside(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __m256i row_part(const uint16_t* row, bool there, int n) {
    if (!there || n <= 0) return _mm256_setzero_si256();
    return _mm256_maskz_loadu_epi16((__mmask16)((1u << least(n, 16)) - 1), row);
}

inline void panel_of(const PanelTask& t) {
    switch ((t.columns + 15) / 16) {
        case 1: return panel<1>(t);
        case 2: return panel<2>(t);
        case 3: return panel<3>(t);
        default: return panel<4>(t);
    }
}

}  // namespace
}  // namespace criadero
