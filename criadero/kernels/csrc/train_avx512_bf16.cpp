// bf16 products with AVX512_BF16: six rows by 64 columns of sums at a time, which fills 24 of the 32 registers.
#include "train_avx512_bf16.h"

namespace criadero {

void avx512_bf16_panel(const PanelTask& t) { panel_of(t); }

void avx512_bf16_pack_b(const uint16_t* b, size_t stride, bool across, int n, int k, int n0, int k0, int pairs, uint16_t* to) {
    if (!across) {
        for (int p = 0; p < pairs; ++p) {
            const int even = k0 + 2 * p;
            for (int j = 0; j < PANEL_COLUMNS; j += 16) {
                const uint16_t* from = b + (size_t)even * stride + n0 + j;
                const int there = n - n0 - j;
                _mm512_storeu_si512(to + 2 * ((size_t)p * PANEL_COLUMNS + j),
                                    beside(row_part(from, even < k, there), row_part(from + stride, even + 1 < k, there)));
            }
        }
        return;
    }
    for (int p0 = 0; p0 < pairs; p0 += 16) {
        const int here = least(16, pairs - p0), left = most(0, least(32, k - k0 - 2 * p0));
        const __mmask32 mask = (__mmask32)((1ull << left) - 1);
        for (int j = 0; j < PANEL_COLUMNS; j += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                const bool there = n0 + j + i < n && left > 0;
                r[i] = there ? _mm512_maskz_loadu_epi16(mask, b + (size_t)(n0 + j + i) * stride + k0 + 2 * p0) : _mm512_setzero_si512();
            }
            transpose16(r);
            for (int i = 0; i < here; ++i) _mm512_storeu_si512(to + 2 * ((size_t)(p0 + i) * PANEL_COLUMNS + j), r[i]);
        }
    }
}

void avx512_bf16_pack_a(const uint16_t* a, size_t stride, int m0, int rows, int k, int k0, int pairs, uint16_t* to) {
    const size_t panel_size = (size_t)pairs * PANEL_ROWS * 2;
    for (int p = 0; p < pairs; ++p) {
        const int even = k0 + 2 * p;
        for (int m = 0; m < rows; m += 48) {  // 48 rows are 8 panels
            uint32_t line[48];
            for (int j = 0; j < 48; j += 16) {
                const uint16_t* from = a + (size_t)even * stride + m0 + m + j;
                const int there = rows - m - j;
                _mm512_storeu_si512(line + j, beside(row_part(from, even < k, there), row_part(from + stride, even + 1 < k, there)));
            }
            for (int i = 0; i < 8 && m + 6 * i < rows; ++i) {
                memcpy(to + (size_t)(m / 6 + i) * panel_size + (size_t)p * PANEL_ROWS * 2, line + 6 * i, 24);
            }
        }
    }
}

}  // namespace criadero
