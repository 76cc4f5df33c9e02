// The linear kernels for AVX-512 with VNNI. `vpdpbusd` multiplies unsigned by signed bytes and adds four products to each int32; weights are
// the unsigned side (int4 as 0..15, int8 plus 128), and the sum of the activations, which `prepare` keeps, takes the offset out again.
//
// One kernel serves up to 16 rows (linear_many_avx512.cpp has more): a tile of 16 outputs is unpacked in registers, 32 columns at a time, and
// multiplied with the rows of a block. For few rows it waits for memory; for many, unpacking costs three instructions for each 2 x 16
// products, and what limits it is vpdpbusd itself. A row's result has the same float operations in the same order whatever else is there.
#include "linear.h"
#include "linear_avx512.h"
#include "mapped_avx512.h"
#include "vec.h"

namespace criadero {

namespace {

// Fetches cache lines ahead, through the caches (KEEP) or past those that nobody needs them in (NTA). Which is faster is the processor's
// habit. Intel's (Emerald Rapids, one core) read 8 GB/s past the caches and 16 through them; asked for 8 KiB ahead into the second-level cache
// and 1 KiB ahead into the first, a whole step of one row reads 29 GB/s with two cores, 26 with 4 KiB ahead into the first alone, 20 without.
// On Zen 4, with a row or two, the processor fetches ahead by itself and these would only be in its way (25 GB/s with them, 30 without);
// where much is computed between two loads it does not look far enough (int4, four rows: 21 GB/s with, 18 without).
// The three of the innermost loops are inlined by force: GCC stops when a file has grown, and eight or sixteen rows lose a seventh then.
template <bool KEEP, int LINES>
__attribute__((always_inline)) inline void fetch(const uint8_t* p) {
    UNROLL
    for (int i = 0; i < LINES; ++i) {
        if (KEEP) {
            _mm_prefetch((const char*)p + 8192 + 64 * i, _MM_HINT_T1);
            _mm_prefetch((const char*)p + 1024 + 64 * i, _MM_HINT_T0);
        } else {
            _mm_prefetch((const char*)p + 4096 + 64 * i, _MM_HINT_NTA);
        }
    }
}

// c[m] += 4 J products of each lane, for R rows. One row or two get two sums each: a single chain would wait for itself. The rows' chains
// go side by side, for a chain after the other fills Intel's scheduler with what has to wait (16 rows, one core of Emerald Rapids:
// 345 GOP/s so, 425 side by side).
template <int J, int R>
__attribute__((always_inline)) inline void dots(__m512i* c, const __m512i* w, const int8_t* q) {
    if (R <= 2) {
        __m512i d[R];
        UNROLL
        for (int m = 0; m < R; ++m) d[m] = _mm512_setzero_si512();
        UNROLL
        for (int j = 0; j < J; j += 2) {
            UNROLL
            for (int m = 0; m < R; ++m) {
                c[m] = _mm512_dpbusd_epi32(c[m], w[j], four(q + m * SLICE + 4 * j));
                d[m] = _mm512_dpbusd_epi32(d[m], w[j + 1], four(q + m * SLICE + 4 * j + 4));
            }
        }
        UNROLL
        for (int m = 0; m < R; ++m) c[m] = _mm512_add_epi32(c[m], d[m]);
        return;
    }
    UNROLL
    for (int j = 0; j < J; ++j) {
        UNROLL
        for (int m = 0; m < R; ++m) c[m] = _mm512_dpbusd_epi32(c[m], w[j], four(q + m * SLICE + 4 * j));
    }
}

// One span of `slices` x 32 columns, at p or, MAPPED, in rows: sums[m] += (what the span gives) x (the scale of the span's activations).
template <Kind KIND, int GROUP, int M, bool KEEP, bool WHOLE, bool MAPPED>
__attribute__((always_inline)) inline void span_product(const uint8_t* p, size_t bytes, const Rows& rows, size_t row_bytes, int slices,
                                                        const Block& b, int span, __m512* sums) {
    if (WHOLE) slices = SPAN / SLICE;
    constexpr int R = M > 8 ? M / 2 : M;  // rows side by side
    constexpr int STEP = KIND == Kind::int8 ? 512 : 256;              // bytes of a slice
    constexpr int LINES = KIND == Kind::int8 ? (GROUP == 0 ? 8 : 9) : 5;  // that a quarter of a span touches
    const int8_t* q = b.q + (size_t)span * (SPAN / SLICE) * M * SLICE;
    const uint8_t* scales = p + slices * STEP;
    const uint8_t* mins = scales + slices * (SLICE * TILE * 2 / (GROUP ? GROUP : SLICE));
    const size_t quarter = bytes / 4;
    __m512 f[M];   // groups of 16 and 32: the float sum over the span's groups
    __m512i c[M];  // wider groups: the whole number for the span
    if (GROUP == 16 || GROUP == 32) {
        UNROLL
        for (int m = 0; m < M; ++m) f[m] = _mm512_setzero_ps();
    } else {
        UNROLL
        for (int m = 0; m < M; ++m) c[m] = offset<KIND>(b.totals + span * M + m);
    }
    auto slice = [&](int s) __attribute__((always_inline)) {
        __m512i w[8];
        __m512 scale;
        if (MAPPED) {
            const size_t begin = (size_t)span * (SPAN / SLICE) * Q8_BYTES;
            if (s < 3) fetch_rows(rows, begin + 64 * s + AHEAD, row_bytes);  // a span is 136 bytes
            scale = q8_block(rows.at, begin + s * Q8_BYTES, w);
        } else {
            if (KEEP || M > (KIND == Kind::int8 ? 4 : 2)) fetch<KEEP, LINES>(p + s * quarter);
            unpack<KIND>(p + s * STEP, w);
            if (GROUP == 32) scale = half16(scales + s * 32);
        }
        if (GROUP == 32) {
            const int32_t* eights = b.sums + ((size_t)span * (SPAN / SLICE) + s) * M;
            const __m512 minimum = KIND == Kind::int4_mins ? _mm512_mul_ps(half16(mins + s * 32), _mm512_set1_ps(0.125f)) : scale;
            UNROLL
            for (int from = 0; from < M; from += R) {
                __m512i whole[R];
                UNROLL
                for (int m = 0; m < R; ++m) whole[m] = offset<KIND>(eights + from + m);
                dots<8, R>(whole, w, q + from * SLICE);
                UNROLL
                for (int i = 0; i < R; ++i) {
                    const int m = from + i;
                    f[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]), scale, f[m]);
                    if (KIND == Kind::int4_mins) f[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(eights[m])), minimum, f[m]);
                }
            }
        } else if (GROUP == 16) {
            const int32_t* eights = b.fine + ((size_t)span * (SPAN / SLICE) + s) * 2 * M;
            const __m512 left = half16(scales + s * 64), right = half16(scales + s * 64 + 32);
            UNROLL
            for (int from = 0; from < M; from += R) {
                __m512i first[R], second[R];
                UNROLL
                for (int m = 0; m < R; ++m) first[m] = offset<KIND>(eights + from + m);
                dots<4, R>(first, w, q + from * SLICE);
                UNROLL
                for (int m = 0; m < R; ++m) second[m] = offset<KIND>(eights + M + from + m);
                dots<4, R>(second, w + 4, q + from * SLICE + 16);
                UNROLL
                for (int m = 0; m < R; ++m) {
                    f[from + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first[m]), left, f[from + m]);
                    f[from + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second[m]), right, f[from + m]);
                }
            }
        } else {
            UNROLL
            for (int from = 0; from < M; from += R) dots<8, R>(c + from, w, q + from * SLICE);
        }
        q += M * SLICE;
    };
    if (WHOLE && M <= 2) {  // the loop itself would cost a tenth
        UNROLL
        for (int s = 0; s < SPAN / SLICE; ++s) slice(s);
    } else {
        for (int s = 0; s < slices; ++s) slice(s);
    }
    if (GROUP == 128) {
        const __m512 scale = half16(scales);
        const __m512 minimum = KIND == Kind::int4_mins ? _mm512_mul_ps(half16(mins), _mm512_set1_ps(0.125f)) : scale;
        UNROLL
        for (int m = 0; m < M; ++m) {
            f[m] = _mm512_mul_ps(_mm512_cvtepi32_ps(c[m]), scale);
            if (KIND == Kind::int4_mins) f[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(b.totals[span * M + m])), minimum, f[m]);
        }
    }
    if (GROUP == 0) {
        UNROLL
        for (int m = 0; m < M; ++m) f[m] = _mm512_cvtepi32_ps(c[m]);
    }
    const float* x = b.scales + span * M;
    UNROLL
    for (int m = 0; m < M; ++m) sums[m] = _mm512_fmadd_ps(f[m], _mm512_set1_ps(x[m]), sums[m]);
    // With many rows the sums belong into memory, or the compiler would keep them in registers that the loop above needs.
    if (M > 8) __asm__ volatile("" ::: "memory");
}

template <Kind KIND, int GROUP, int M, bool KEEP, bool MAPPED = false>
void quantised(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    const int whole = w.padded / SPAN, rest = w.padded % SPAN / SLICE;
    Rows rows;
    for (int t = first; t < last; ++t) {
        const uint8_t* tile = w.data + (MAPPED ? 0 : (size_t)t * w.tile_bytes);
        if (MAPPED) find_rows(w, first, last, t - first, rows);
        __m512 sums[M];
        UNROLL
        for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
        if (M > 8) __asm__ volatile("" : : "r"(sums) : "memory");
        for (int s = 0; s < whole; ++s) {
            const uint8_t* p = MAPPED ? nullptr : tile + s * w.span_bytes;
            span_product<KIND, GROUP, M, KEEP, true, MAPPED>(p, w.span_bytes, rows, w.row_bytes, SPAN / SLICE, b, s, sums);
        }
        const uint8_t* p = MAPPED ? nullptr : tile + whole * w.span_bytes;
        if (rest) span_product<KIND, GROUP, M, KEEP, false, MAPPED>(p, w.span_bytes, rows, w.row_bytes, rest, b, whole, sums);
        const __m512 scale = GROUP ? _mm512_set1_ps(w.unit) : _mm512_loadu_ps(tile + (size_t)w.padded * TILE);
        if (MAPPED) store_rows<M>(rows, b, sums, &scale, y + rows.first * TILE, stride, add);
        else store_tile<M>(w, b, t, sums, &scale, y, stride, add);
    }
}

// bf16 on a processor without vdpbf16ps, and f32: plain float products, in one chain for each output.
template <Kind KIND, int M, bool KEEP, bool MAPPED = false>
void dense(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    constexpr int STEP = KIND == Kind::bf16 ? 1024 : 2048;
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    Rows rows;
    __m512i slice[16];
    for (int t = first; t < last; ++t) {
        const uint8_t* p = MAPPED ? (const uint8_t*)slice : w.data + (size_t)t * w.tile_bytes;
        if (MAPPED) find_rows(w, first, last, t - first, rows);
        __m512 sums[M];
        UNROLL
        for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
        for (int s = 0; s < w.padded / SLICE; ++s, p += MAPPED ? 0 : STEP) {
            if (MAPPED) {
                fetch_rows(rows, (size_t)s * SLICE * 2 + AHEAD, w.row_bytes);
                bf16_slice(w, rows.at, s, slice);
            }
            const float* x = b.f32 + (size_t)s * M * SLICE;
            auto four = [&](int k) __attribute__((always_inline)) {
                __m512 v[4];
                if (KIND == Kind::bf16) {
                    if (!MAPPED) fetch<KEEP, 2>(p + k * 32);
                    UNROLL
                    for (int i = 0; i < 2; ++i) {
                        const __m512i pair = MAPPED ? slice[k / 2 + i] : _mm512_loadu_si512(p + k * 32 + 64 * i);
                        v[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
                        v[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
                    }
                } else {
                    fetch<KEEP, 4>(p + k * 64);
                    UNROLL
                    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_ps(p + k * 64 + 64 * i);
                }
                UNROLL
                for (int m = 0; m < M; ++m) {
                    UNROLL
                    for (int i = 0; i < 4; ++i) sums[m] = _mm512_fmadd_ps(v[i], _mm512_set1_ps(x[m * SLICE + k + i]), sums[m]);
                }
            };
            if (MAPPED && M <= 4) {
                UNROLL
                for (int k = 0; k < SLICE; k += 4) four(k);
            } else {
                for (int k = 0; k < SLICE; k += 4) four(k);
            }
        }
        if (MAPPED) store_rows<M>(rows, b, sums, nullptr, y + rows.first * TILE, stride, add);
        else store_tile<M>(w, b, t, sums, nullptr, y, stride, add);
    }
}

using Kernel = void (*)(const Weights&, const Block&, int, int, float*, size_t, bool);

template <int M, bool KEEP>
Kernel kernel_of(const Weights& w) {
    switch (w.kind) {
        case Kind::int4: return w.group == 32 ? quantised<Kind::int4, 32, M, KEEP> : quantised<Kind::int4, 128, M, KEEP>;
        case Kind::int4_mins: return w.group == 32 ? quantised<Kind::int4_mins, 32, M, KEEP> : quantised<Kind::int4_mins, 128, M, KEEP>;
        case Kind::int8:
            return w.group == 16    ? quantised<Kind::int8, 16, M, KEEP>
                   : w.group == 32  ? quantised<Kind::int8, 32, M, KEEP>
                   : w.group == 128 ? quantised<Kind::int8, 128, M, KEEP>
                                    : quantised<Kind::int8, 0, M, KEEP>;
        case Kind::bf16: return dense<Kind::bf16, M, KEEP>;
        default: return dense<Kind::f32, M, KEEP>;
    }
}

template <int M>
Kernel kernel_of(const Weights& w, const Block& b) {
    if (w.mapped) return w.kind == Kind::bf16 ? dense<Kind::bf16, M, true, true> : quantised<Kind::int8, 32, M, true, true>;
    return b.keep ? kernel_of<M, true>(w) : kernel_of<M, false>(w);
}

Kernel kernel_for(const Weights& w, const Block& b) {
    switch (b.width) {
        case 1: return kernel_of<1>(w, b);
        case 2: return kernel_of<2>(w, b);
        case 4: return kernel_of<4>(w, b);
        case 6: return kernel_of<6>(w, b);
        case 8: return kernel_of<8>(w, b);
        case 12: return kernel_of<12>(w, b);
        default: return kernel_of<16>(w, b);
    }
}

void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    kernel_for(w, b)(w, b, first, last, y, stride, add);
}

void tiles_bf16(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    if (w.kind == Kind::bf16) avx512_bf16_tiles(w, b, first, last, y, stride, add);
    else kernel_for(w, b)(w, b, first, last, y, stride, add);
}

inline __m512 read16(const float* x, int count) {  // up to 16; the rest is zero
    if (count >= 16) return _mm512_loadu_ps(x);
    return _mm512_maskz_loadu_ps(count <= 0 ? 0 : (__mmask16)((1u << count) - 1), x);
}

void prepare_row(const Block& b, int row, int from, int to, int columns, const float* x) {
    const int end = to == columns ? b.padded : to;  // the last piece also writes the padding
    if (b.q) {
        const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
        for (int span = from; span < end; span += SPAN) {
            const int stop = least(span + SPAN, end);
            // compared as bits, a NaN is the largest and makes the scale NaN: it is not hidden
            __m512i top = _mm512_setzero_si512();
            for (int k = span; k < stop; k += 16) {
                top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(read16(x + k - from, to - k)), magnitude_bits));
            }
            const float most_of = bits_to_float(_mm512_reduce_max_epu32(top));
            const bool tiny = most_of < 1e-30f;
            // Of what is not finite only the scale says so, and the rest is zero.
            const bool finite = most_of <= 3.4028235e38f;
            const int there = finite ? to : span;
            const __m512 inverse = _mm512_set1_ps(tiny || !finite ? 0.0f : 127.0f / most_of);
            b.scales[span / SPAN * b.width + row] = tiny ? 0.0f : most_of / 127.0f;
            int32_t total = 0;
            for (int slice = span; slice < stop; slice += SLICE) {
                const size_t place = (size_t)(slice / SLICE) * b.width + row;
                const __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(read16(x + slice - from, there - slice), inverse));
                const __m512i right = _mm512_cvtps_epi32(_mm512_mul_ps(read16(x + slice + 16 - from, there - slice - 16), inverse));
                _mm_storeu_si128((__m128i*)(b.q + place * SLICE), _mm512_cvtsepi32_epi8(left));
                _mm_storeu_si128((__m128i*)(b.q + place * SLICE + 16), _mm512_cvtsepi32_epi8(right));
                const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(left, right));
                b.sums[place] = -8 * sum;
                total += sum;
                if (b.fine) {
                    int32_t* fine = b.fine + (size_t)(slice / SLICE) * 2 * b.width + row;
                    fine[0] = -8 * _mm512_reduce_add_epi32(left);
                    fine[b.width] = -8 * _mm512_reduce_add_epi32(right);
                }
            }
            b.totals[span / SPAN * b.width + row] = -8 * total;
        }
    }
    if (!b.bf16 && !b.f32) return;
    for (int k = from; k < end; k += 16) {
        const __m512 value = read16(x + k - from, to - k);
        const size_t place = ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE;
        if (b.f32) _mm512_storeu_ps(b.f32 + place, value);
        if (b.bf16) {  // to nearest, ties to even; a NaN stays one
            const __m512i bits = _mm512_castps_si512(value);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
            high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256((__m256i*)(b.bf16 + place), _mm512_cvtepi32_epi16(high));
        }
    }
}

}  // namespace

const LinearKernels& linear_avx512() {
    static const LinearKernels table{prepare_row, tiles, false, avx512_many, true};
    return table;
}

const LinearKernels& linear_avx512_bf16() {
    static const LinearKernels table{prepare_row, tiles_bf16, true, avx512_many, true};
    return table;
}

}  // namespace criadero
