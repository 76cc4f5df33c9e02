// bf16 weights with AVX512_BF16: `vdpbf16ps` multiplies pairs of bf16, so the activations are rounded to bf16 too.
#include "linear_avx512.h"
#include "mapped_avx512.h"

namespace criadero {

namespace {

template <int M, bool KEEP, bool MAPPED>
void product(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    Rows rows;
    __m512i slice[16];
    for (int t = first; t < last; ++t) {
        const uint8_t* p = MAPPED ? (const uint8_t*)slice : w.data + (size_t)t * w.tile_bytes;
        if (MAPPED) find_rows(w, first, last, t - first, rows);
        __m512 sums[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
        const uint16_t* x = b.bf16;
        for (int s = 0; s < w.padded / SLICE; ++s, x += M * SLICE) {
            if (MAPPED) {
                fetch_rows(rows, (size_t)s * SLICE * 2 + AHEAD, w.row_bytes);
                bf16_slice(w, rows.at, s, slice);
                p = (const uint8_t*)slice;
            }
#pragma GCC unroll 4
            for (int k = 0; k < SLICE; k += 2, p += 64) {
                if (!MAPPED) _mm_prefetch((const char*)p + 4096, KEEP ? _MM_HINT_T0 : _MM_HINT_NTA);
                const __m512bh v = (__m512bh)_mm512_loadu_si512(p);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
                    int32_t pair;
                    __builtin_memcpy(&pair, x + m * SLICE + k, 4);
                    sums[m] = _mm512_dpbf16_ps(sums[m], v, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        }
        if (MAPPED) store_rows<M>(rows, b, sums, nullptr, y + rows.first * TILE, stride, add);
        else store_tile<M>(w, b, t, sums, nullptr, y, stride, add);
    }
}

template <int M>
void product_of(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    if (w.mapped) product<M, true, true>(w, b, first, last, y, stride, add);
    else if (b.keep) product<M, true, false>(w, b, first, last, y, stride, add);
    else product<M, false, false>(w, b, first, last, y, stride, add);
}

}  // namespace

void avx512_bf16_tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    switch (b.width) {
        case 1: return product_of<1>(w, b, first, last, y, stride, add);
        case 2: return product_of<2>(w, b, first, last, y, stride, add);
        case 4: return product_of<4>(w, b, first, last, y, stride, add);
        case 6: return product_of<6>(w, b, first, last, y, stride, add);
        case 8: return product_of<8>(w, b, first, last, y, stride, add);
        case 12: return product_of<12>(w, b, first, last, y, stride, add);
        default: return product_of<16>(w, b, first, last, y, stride, add);
    }
}

}  // namespace criadero
