// The linear kernels for AVX2, included by linear_avx2.cpp and by linear_avx_vnni.cpp, which defines LINEAR_VNNI: the 256-bit form of vpdpbusd
// that laptops without AVX-512 have. A tile's 16 outputs are two halves of 8.
//
// Without it, `vpmaddubsw` multiplies unsigned by signed bytes and adds two products in int16, saturating:
//   int4  0..15 x -127..127, 16 products added in int16: at most 30480, no saturation;
//   int8  |w| x (x with the sign of w): at most 2 x 128 x 127 = 32512; then widened at once.
#include "linear.h"
#include "vec.h"

namespace criadero {

namespace {

#define UNROLL _Pragma("GCC unroll 16")

inline __m256i four(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}

inline __m256 half8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

template <int LINES>
inline void fetch(const uint8_t* p) {  // see linear_avx512.cpp
    UNROLL
    for (int i = 0; i < LINES; ++i) _mm_prefetch((const char*)p + 4096 + 64 * i, _MM_HINT_T0);
}

// Sums over one slice of 32 columns, of both halves and M rows `apart` bytes from each other: whole[half][m] += products.
// Of int8 weights without VNNI they are of the signed numbers; else of the stored unsigned ones, and the offset is to be taken out.
template <Kind KIND, int M, int COLUMNS>
inline void dots(const uint8_t* p, const int8_t* q, __m256i (*whole)[M]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    (void)ones;
    (void)low;
    if (KIND == Kind::int8) {
        UNROLL
        for (int j = 0; j < COLUMNS / 4; ++j) {
            UNROLL
            for (int h = 0; h < 2; ++h) {
                const __m256i stored = _mm256_loadu_si256((const __m256i*)(p + 64 * j + 32 * h));
#ifdef LINEAR_VNNI
                UNROLL
                for (int m = 0; m < M; ++m) whole[h][m] = DPBUSD(whole[h][m], stored, four(q + m * SLICE + 4 * j));
#else
                const __m256i w = _mm256_xor_si256(stored, _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(w);
                UNROLL
                for (int m = 0; m < M; ++m) {
                    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(q + m * SLICE + 4 * j), w));
                    whole[h][m] = _mm256_add_epi32(whole[h][m], _mm256_madd_epi16(pairs, ones));
                }
#endif
            }
        }
        return;
    }
#ifndef LINEAR_VNNI
    __m256i short_sums[2][M];
    UNROLL
    for (int m = 0; m < M; ++m) short_sums[0][m] = short_sums[1][m] = _mm256_setzero_si256();
#endif
    UNROLL
    for (int j = 0; j < COLUMNS / 8; ++j) {
        __m256i w[2][2];
        UNROLL
        for (int h = 0; h < 2; ++h) {
            const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 64 * j + 32 * h));
            w[0][h] = _mm256_and_si256(both, low);
            w[1][h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
        UNROLL
        for (int i = 0; i < 2; ++i) {
            UNROLL
            for (int m = 0; m < M; ++m) {
                const __m256i x = four(q + m * SLICE + 8 * j + 4 * i);
                UNROLL
                for (int h = 0; h < 2; ++h) {
#ifdef LINEAR_VNNI
                    whole[h][m] = DPBUSD(whole[h][m], w[i][h], x);
#else
                    short_sums[h][m] = _mm256_add_epi16(short_sums[h][m], _mm256_maddubs_epi16(w[i][h], x));
#endif
                }
            }
        }
    }
#ifndef LINEAR_VNNI
    UNROLL
    for (int h = 0; h < 2; ++h) {
        UNROLL
        for (int m = 0; m < M; ++m) whole[h][m] = _mm256_add_epi32(whole[h][m], _mm256_madd_epi16(short_sums[h][m], ones));
    }
#endif
}

// The offset's part of a sum: `stored` is -8 x the sum of the activations.
template <Kind KIND>
inline __m256i offset(int32_t stored) {
#ifdef LINEAR_VNNI
    if (KIND == Kind::int8) return _mm256_set1_epi32(stored * 16);
#endif
    return KIND == Kind::int4 ? _mm256_set1_epi32(stored) : _mm256_setzero_si256();
}

// f[half][m] += whole x scale, and what the mins take away
template <Kind KIND, int M>
inline void add_group(__m256i (*whole)[M], const uint8_t* scales, const uint8_t* mins, const int32_t* eights, __m256 (*f)[M]) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256 scale = half8(scales + 16 * h);
        const __m256 minimum = KIND == Kind::int4_mins ? _mm256_mul_ps(half8(mins + 16 * h), _mm256_set1_ps(0.125f)) : scale;
        UNROLL
        for (int m = 0; m < M; ++m) {
            f[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[h][m]), scale, f[h][m]);
            if (KIND == Kind::int4_mins) f[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_set1_epi32(eights[m])), minimum, f[h][m]);
        }
    }
}

template <int M>
inline void store_tile(const Weights& w, int rows, int t, const __m256 (*sums)[M], float* y, size_t stride, bool add) {
    const int there = least(TILE, w.rows - t * TILE);
    UNROLL
    for (int m = 0; m < M; ++m) {
        if (m >= rows) break;
        float* to = y + (size_t)m * stride + (size_t)t * TILE;
        if (there == TILE) {
            UNROLL
            for (int h = 0; h < 2; ++h) _mm256_storeu_ps(to + 8 * h, add ? _mm256_add_ps(_mm256_loadu_ps(to + 8 * h), sums[h][m]) : sums[h][m]);
            continue;
        }
        float all[TILE];
        _mm256_storeu_ps(all, sums[0][m]);
        _mm256_storeu_ps(all + 8, sums[1][m]);
        for (int r = 0; r < there; ++r) to[r] = add ? to[r] + all[r] : all[r];
    }
}

// One tile for rows [row, row + M) of the block.
template <Kind KIND, int GROUP, int M>
void quantised(const Weights& w, const Block& b, int t, int row, float* y, size_t stride, bool add) {
    constexpr int STEP = KIND == Kind::int8 ? 512 : 256;  // bytes of a slice
    const uint8_t* tile = w.data + (size_t)t * w.tile_bytes;
    __m256 sums[2][M];
    UNROLL
    for (int m = 0; m < M; ++m) sums[0][m] = sums[1][m] = _mm256_setzero_ps();
    for (int from = 0, span = 0; from < w.padded; from += SPAN, ++span) {
        const int slices = least(SPAN, w.padded - from) / SLICE;
        const uint8_t* p = tile + (size_t)span * w.span_bytes;
        const uint8_t* scales = p + slices * STEP;
        const uint8_t* mins = scales + slices * (SLICE * TILE * 2 / (GROUP ? GROUP : SLICE));
        __m256 f[2][M];
        __m256i whole[2][M];
        UNROLL
        for (int m = 0; m < M; ++m) {
            f[0][m] = f[1][m] = _mm256_setzero_ps();
            whole[0][m] = whole[1][m] = offset<KIND>(b.totals[span * b.width + row + m]);  // of wide groups
        }
        for (int s = 0; s < slices; ++s) {
            fetch<KIND == Kind::int8 ? 9 : 5>(p + s * (w.span_bytes / 4));
            const int slice = from / SLICE + s;
            const int8_t* q = b.q + ((size_t)slice * b.width + row) * SLICE;
            if (GROUP == 32) {
                const int32_t* eights = b.sums + (size_t)slice * b.width + row;
                UNROLL
                for (int m = 0; m < M; ++m) whole[0][m] = whole[1][m] = offset<KIND>(eights[m]);
                dots<KIND, M, 32>(p + s * STEP, q, whole);
                add_group<KIND, M>(whole, scales + 32 * s, mins + 32 * s, eights, f);
            } else if (GROUP == 16) {
                UNROLL
                for (int part = 0; part < 2; ++part) {
                    const int32_t* eights = b.fine + ((size_t)slice * 2 + part) * b.width + row;
                    UNROLL
                    for (int m = 0; m < M; ++m) whole[0][m] = whole[1][m] = offset<KIND>(eights[m]);
                    dots<KIND, M, 16>(p + s * STEP + 256 * part, q + 16 * part, whole);
                    add_group<KIND, M>(whole, scales + 64 * s + 32 * part, nullptr, nullptr, f);
                }
            } else {
                dots<KIND, M, 32>(p + s * STEP, q, whole);
            }
        }
        if (GROUP == 128) add_group<KIND, M>(whole, scales, mins, b.totals + (size_t)span * b.width + row, f);
        const float* x = b.scales + (size_t)span * b.width + row;
        UNROLL
        for (int h = 0; h < 2; ++h) {
            UNROLL
            for (int m = 0; m < M; ++m) {
                if (GROUP == 0) f[h][m] = _mm256_cvtepi32_ps(whole[h][m]);
                sums[h][m] = _mm256_fmadd_ps(f[h][m], _mm256_set1_ps(x[m]), sums[h][m]);
            }
        }
    }
    UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256 scale = GROUP ? _mm256_set1_ps(w.unit) : _mm256_loadu_ps((const float*)(tile + (size_t)w.padded * TILE) + 8 * h);
        UNROLL
        for (int m = 0; m < M; ++m) sums[h][m] = _mm256_mul_ps(sums[h][m], scale);
    }
    store_tile<M>(w, b.rows - row, t, sums, y + (size_t)row * stride, stride, add);
}

template <Kind KIND, int M>
void dense(const Weights& w, const Block& b, int t, int row, float* y, size_t stride, bool add) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    const uint8_t* p = w.data + (size_t)t * w.tile_bytes;
    __m256 sums[2][M];
    UNROLL
    for (int m = 0; m < M; ++m) sums[0][m] = sums[1][m] = _mm256_setzero_ps();
    for (int k = 0; k < w.padded; k += 2, p += KIND == Kind::bf16 ? 64 : 128) {
        fetch<KIND == Kind::bf16 ? 1 : 2>(p);
        const float* x = b.f32 + ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE;
        UNROLL
        for (int h = 0; h < 2; ++h) {
            __m256 v[2];
            if (KIND == Kind::bf16) {
                const __m256i pair = _mm256_loadu_si256((const __m256i*)(p + 32 * h));
                v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                v[1] = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
            } else {
                v[0] = _mm256_loadu_ps((const float*)(p + 32 * h));
                v[1] = _mm256_loadu_ps((const float*)(p + 64 + 32 * h));
            }
            UNROLL
            for (int m = 0; m < M; ++m) {
                sums[h][m] = _mm256_fmadd_ps(v[0], _mm256_set1_ps(x[m * SLICE]), sums[h][m]);
                sums[h][m] = _mm256_fmadd_ps(v[1], _mm256_set1_ps(x[m * SLICE + 1]), sums[h][m]);
            }
        }
    }
    store_tile<M>(w, b.rows - row, t, sums, y + (size_t)row * stride, stride, add);
}

using Kernel = void (*)(const Weights&, const Block&, int, int, float*, size_t, bool);

template <int M>
Kernel kernel_of(const Weights& w) {
    switch (w.kind) {
        case Kind::int4: return w.group == 32 ? quantised<Kind::int4, 32, M> : quantised<Kind::int4, 128, M>;
        case Kind::int4_mins: return w.group == 32 ? quantised<Kind::int4_mins, 32, M> : quantised<Kind::int4_mins, 128, M>;
        case Kind::int8:
            return w.group == 16    ? quantised<Kind::int8, 16, M>
                   : w.group == 32  ? quantised<Kind::int8, 32, M>
                   : w.group == 128 ? quantised<Kind::int8, 128, M>
                                    : quantised<Kind::int8, 0, M>;
        case Kind::bf16: return dense<Kind::bf16, M>;
        default: return dense<Kind::f32, M>;
    }
}

// 16 registers hold 4 rows' sums at most; a wider block goes over the tile, which then lies in the first cache, several times.
void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    const Kernel one = kernel_of<1>(w), two = kernel_of<2>(w), quad = kernel_of<4>(w);
    for (int t = first; t < last; ++t) {
        int row = 0;
        for (; row + 4 <= b.width && row < b.rows; row += 4) quad(w, b, t, row, y, stride, add);
        for (; row + 2 <= b.width && row < b.rows; row += 2) two(w, b, t, row, y, stride, add);
        for (; row < b.rows; ++row) one(w, b, t, row, y, stride, add);
    }
}

inline __m256 read8(const float* x, int count) { return count >= 8 ? _mm256_loadu_ps(x) : count <= 0 ? _mm256_setzero_ps() : load_first(x, count, 0.0f); }

inline int32_t add_up(__m256i a) {
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}

inline uint32_t largest_of(__m256i a) {
    __m128i b = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epu32(b, _mm_shuffle_epi32(b, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(b, _mm_shuffle_epi32(b, 0xb1)));
}

void prepare_row(const Block& b, int row, int from, int to, int columns, const float* x) {
    const int end = to == columns ? b.padded : to;  // the last piece also writes the padding
    if (b.q) {
        const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
        for (int span = from; span < end; span += SPAN) {
            const int stop = least(span + SPAN, end);
            __m256i top = _mm256_setzero_si256();  // compared as bits, a NaN is the largest: it is not hidden
            for (int k = span; k < stop; k += 8) {
                top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(read8(x + k - from, to - k)), magnitude_bits));
            }
            const float most_of = bits_to_float(largest_of(top));
            const bool tiny = most_of < 1e-30f;
            // Of what is not finite only the scale says so, and the rest is zero.
            const bool finite = most_of <= 3.4028235e38f;
            const int there = finite ? to : span;
            const __m256 inverse = _mm256_set1_ps(tiny || !finite ? 0.0f : 127.0f / most_of);
            b.scales[span / SPAN * b.width + row] = tiny ? 0.0f : most_of / 127.0f;
            int32_t total = 0;
            for (int slice = span; slice < stop; slice += SLICE) {
                const size_t place = (size_t)(slice / SLICE) * b.width + row;
                __m256i n[4];
                UNROLL
                for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(read8(x + slice + 8 * i - from, there - slice - 8 * i), inverse));
                const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
                // the packs work within 128 bits: put the words of 4 back in order
                const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                _mm256_storeu_si256((__m256i*)(b.q + place * SLICE), ordered);
                const int32_t left = add_up(_mm256_add_epi32(n[0], n[1])), right = add_up(_mm256_add_epi32(n[2], n[3]));
                b.sums[place] = -8 * (left + right);
                total += left + right;
                if (b.fine) {
                    int32_t* fine = b.fine + (size_t)(slice / SLICE) * 2 * b.width + row;
                    fine[0] = -8 * left;
                    fine[b.width] = -8 * right;
                }
            }
            b.totals[span / SPAN * b.width + row] = -8 * total;
        }
    }
    if (!b.f32) return;
    for (int k = from; k < end; k += 8) {
        _mm256_storeu_ps(b.f32 + ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE, read8(x + k - from, to - k));
    }
}

}  // namespace
}  // namespace criadero
