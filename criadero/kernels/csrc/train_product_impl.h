// Products of training, and what packs their operands, included by train_*.cpp after train_impl.h (see vec.h on linkage).
#pragma once
#include "linear.h"
#include "train.h"
#include "vec.h"
#if VEC_AVX512
#include "transpose16.h"
#endif

namespace criadero {
namespace {

constexpr int ROWS = TALL;

inline float number(const void* table, bool half, size_t i) { return half ? half_to_float(((const uint16_t*)table)[i]) : ((const float*)table)[i]; }

// `count` packed numbers of one group, from an even column on if of 4 bits
inline void unpacked(const Lying& w, const uint8_t* row, int from, int count, float scale, float minimum, float* to) {
    if (w.form == Form::int8) {
        const int8_t* q = (const int8_t*)row + from;
        int i = 0;
        for (; i + W <= count; i += W) store(to + i, mul(load_i8(q + i), set1(scale)));
        for (; i < count; ++i) to[i] = (float)q[i] * scale;
        return;
    }
    const uint8_t* q = row + from / 2;
    const int zero = w.mins ? 0 : 8;
    int i = 0;
#if VEC_AVX512
    for (; i + 32 <= count; i += 32) {
        const __m128i both = _mm_loadu_si128((const __m128i*)(q + i / 2)), low = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(both, low), odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
        const __m512i less = _mm512_set1_epi32(zero);
        const __m128i parts[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int h = 0; h < 2; ++h) {
            const __m512 u = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(parts[h]), less));
            store(to + i + 16 * h, sub(mul(u, set1(scale)), set1(minimum)));
        }
    }
#endif
    for (; i < count; ++i) to[i] = (float)((q[i / 2] >> (i % 2 * 4) & 15) - zero) * scale - minimum;
}

void strip(const Lying& w, int row, int from, int count, float* to) {
    const uint8_t* p = w.data + (size_t)row * w.stride;
    if (w.form == Form::f32) {
        memcpy(to, (const float*)p + from, (size_t)count * sizeof(float));
        return;
    }
    if (w.form == Form::bf16) {
        const uint16_t* x = (const uint16_t*)p + from;
        int i = 0;
        for (; i + W <= count; i += W) store(to + i, load_bf16(x + i));
        for (; i < count; ++i) to[i] = bf16_to_float(x[i]);
        return;
    }
    const size_t place = (size_t)row * (size_t)(w.columns / w.group);
    for (int k = from; k < from + count;) {
        const int g = k / w.group, stop = least(from + count, (g + 1) * w.group);
        const float scale = number(w.scales, w.half, place + (size_t)g);
        const float minimum = w.mins ? number(w.mins, w.half, place + (size_t)g) : 0.0f;
        if (w.form == Form::int4 && k % 2) {  // an odd beginning: one alone
            const float u = (float)((p[k / 2] >> 4) - (w.mins ? 0 : 8));
            to[k - from] = u * scale - minimum;
            ++k;
            continue;
        }
        unpacked(w, p, k, stop - k, scale, minimum, to + (k - from));
        k = stop;
    }
}

// A few columns of each row are too short for the processor to see where it goes on: the row that is due in a while is asked for. Inlined
// by force, for to GCC a function that only does this has no effect, and its calls go.
constexpr int AHEAD = 16;
__attribute__((always_inline)) inline void ask(const Lying& w, int row, int from, int count) {
    if (row >= w.rows) return;
    const size_t bits = w.form == Form::f32 ? 32 : w.form == Form::bf16 ? 16 : w.form == Form::int8 ? 8 : 4;
    const uint8_t* const p = w.data + (size_t)row * w.stride + (size_t)from * bits / 8;
    for (size_t i = 0; i < (size_t)count * bits / 8; i += 64) __builtin_prefetch(p + i);
}

// to[k][stride] (16 columns of it) = rows [16][count], transposed
inline void turn16(const float* rows, int count, float* to, size_t stride) {
    int k = 0;
#if VEC_AVX512
    for (; k + 16 <= count; k += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + (size_t)i * count + k);
        transpose16(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (size_t)(k + i) * stride, r[i]);
    }
#endif
    for (; k < count; ++k) {
        for (int i = 0; i < 16; ++i) to[(size_t)k * stride + i] = rows[(size_t)i * count + k];
    }
}

// room: 8 times `count`, and 8 more
void pack_a(const Lying& a, bool across, int first, int count, int k, int depth, float* to, float* room) {
    const int whole = count / ROWS * ROWS;
    if (!across) {
        for (int m = 0; m < count; ++m) strip(a, first + m, k, depth, to + (size_t)m * depth);
        if (whole < count) memset(to + (size_t)count * depth, 0, (size_t)(whole + ROWS - count) * depth * sizeof(float));
        return;
    }
    // eight rows of depth at a time: panels lie so far from each other that many of their lines share a place in the first cache
    for (int k0 = 0; k0 < depth; k0 += 8) {
        const int here = least(8, depth - k0);
        const float* rows[8];
        for (int i = 0; i < here; ++i) {
            rows[i] = (const float*)(a.data + (size_t)(k + k0 + i) * a.stride) + first;
            if (a.form == Form::f32) continue;
            strip(a, k + k0 + i, first, count, room + (size_t)i * count);
            rows[i] = room + (size_t)i * count;
        }
        for (int m = 0; m < whole; m += ROWS) {
            float* panel = to + (size_t)m * depth + (size_t)k0 * ROWS;
            for (int i = 0; i < here; ++i, panel += ROWS) memcpy(panel, rows[i] + m, ROWS * sizeof(float));
        }
        if (whole == count) continue;
        float* panel = to + (size_t)whole * depth + (size_t)k0 * ROWS;
        for (int i = 0; i < here; ++i) {
            for (int r = 0; r < ROWS; ++r) *panel++ = whole + r < count ? rows[i][whole + r] : 0.0f;
        }
    }
}

void pack_b(const Lying& b, bool across, int n, int columns, int width, int k, int count, float* to, float* room) {
    if (!across) {
        for (int i = 0; i < count; ++i, to += width) {
            strip(b, k + i, n, columns, to);
            for (int j = columns; j < width; ++j) to[j] = 0.0f;
        }
        return;
    }
    for (int j = 0; j < width; j += 16) {
        const int here = least(16, width - j);  // a narrow vector may leave 8
        for (int i = 0; i < 16; ++i) {
            if (j + i < columns) strip(b, n + j + i, k, count, room + (size_t)i * count);
            else memset(room + (size_t)i * count, 0, (size_t)count * sizeof(float));
        }
        if (here == 16) {
            turn16(room, count, to + j, (size_t)width);
            continue;
        }
        for (int i = 0; i < count; ++i) {
            for (int c = 0; c < here; ++c) to[(size_t)i * width + j + c] = room[(size_t)c * count + i];
        }
    }
}

void panel(const float* a, size_t rs, size_t ks, const float* b, int depth, int width, float* sums, size_t stride, bool more) {
    tiles<ROWS>(a, rs, ks, 0, depth, b, (size_t)width, width, sums, stride, more);
}

void thin(const float* a, const float* b, int depth, int width, float* c) {
    for (int r = 0; r < 16; r += 4) {
        tiles<4>(a + (size_t)r * depth, (size_t)depth, 1, 0, depth, b, (size_t)width, width, c + (size_t)r * width, (size_t)width, true);
    }
}

template <class T>
inline void finish_row(const float* sums, int n, T* out, const T* residual, bool add_up) {
    for (int i = 0; i < n; i += W) {
        const int here = n - i;
        vf y = load_part(sums + i, here);
        if (residual) y = add(y, load_part(residual + i, here));
        if (add_up) y = add(y, load_part(out + i, here));
        store_part(out + i, here, y);
    }
}
void finish(const float* sums, int n, Element type, uint8_t* out, const uint8_t* residual, bool add) {
    if (type == Element::f32) finish_row(sums, n, (float*)out, (const float*)residual, add);
    else finish_row(sums, n, (uint16_t*)out, (const uint16_t*)residual, add);
}

// 16 scales of a span as f16, and what the columns are to be multiplied by
inline void scales16(const float* tops, uint16_t* halves, float* inverse) {
    for (int i = 0; i < 16; ++i) {
        const float scale = tops[i] * (1.0f / 127.0f / TILE_UNIT);
        halves[i] = float_to_half(scale < 65504.0f ? scale : 65504.0f);
        const float kept = half_to_float(halves[i]) * TILE_UNIT;
        inverse[i] = kept > 0.0f ? 1.0f / kept : 0.0f;
    }
}

inline vf magnitude(vf x) { return maximum(x, sub(zero(), x)); }
inline vf rounded(vf x, vf by) { return round_even(maximum(minimum(mul(x, by), set1(127.0f)), set1(-127.0f))); }

// numbers [16][128] as the tile has them: 4 columns of a row in a word, rows side by side, plus 128
inline void words_of(const float (*numbers)[128], int width, uint8_t* to) {
    alignas(64) uint8_t bytes[16][128];
    for (int r = 0; r < 16; ++r) {
#if VEC_AVX512
        for (int k = 0; k < width; k += 16) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_load_ps(numbers[r] + k));
            _mm_store_si128((__m128i*)(bytes[r] + k), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
        }
#else
        for (int k = 0; k < width; ++k) bytes[r][k] = (uint8_t)((int)numbers[r][k] + 128);
#endif
    }
    int k = 0;
#if VEC_AVX512
    for (; k + 64 <= width; k += 64) {
        __m512i w[16];
        for (int r = 0; r < 16; ++r) w[r] = _mm512_load_si512(bytes[r] + k);
        transpose16(w);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (size_t)(k + 4 * i) * 16, w[i]);
    }
#endif
    for (; k < width; k += 4) {
        for (int r = 0; r < 16; ++r) memcpy(to + (size_t)k * 16 + 4 * r, bytes[r] + k, 4);
    }
}

// Four rows of depth of 16 columns: a word a column
inline void words_across(const float* rows, size_t stride, const float* inverse, int there, uint8_t* to) {
#if VEC_AVX512
    __m512i word = _mm512_setzero_si512();
    const __m512 by = load(inverse);
    for (int i = 0; i < 4; ++i) {
        __m512i q = _mm512_set1_epi32(128);
        if (i < there) q = _mm512_add_epi32(q, _mm512_cvtps_epi32(rounded(load(rows + i * stride), by)));
        word = _mm512_or_si512(word, _mm512_sllv_epi32(q, _mm512_set1_epi32(8 * i)));
    }
    _mm512_storeu_si512(to, word);
#else
    float q[16];
    for (int i = 0; i < 4; ++i) {
        for (int c = 0; c < 16; c += W) store(q + c, i < there ? rounded(load(rows + i * stride + c), load(inverse + c)) : zero());
        for (int c = 0; c < 16; ++c) to[4 * c + i] = (uint8_t)((int)q[c] + 128);
    }
#endif
}

void build(const Lying& b, bool across, int n, int columns, int depth, uint8_t* to, size_t tile_bytes, float* room) {
    const int tiles = (columns + 15) / 16;
    alignas(64) float numbers[16][128];
    alignas(64) float tops[16], inverse[16];
    for (int from = 0; from < depth; from += SPAN) {
        const int there = least(SPAN, depth - from), width = (there + SLICE - 1) / SLICE * SLICE;
        uint8_t* const span = to + (size_t)from / SPAN * (SPAN * 16 + 32);
        if (!across) {  // b lies as [depth, columns]: a row of it is a vector of columns
            const size_t stride = (size_t)tiles * 16;
            for (int k = 0; k < there; ++k) {
                ask(b, from + k + AHEAD, n, columns);
                strip(b, from + k, n, columns, room + (size_t)k * stride);
                for (size_t c = (size_t)columns; c < stride; ++c) room[(size_t)k * stride + c] = 0.0f;
            }
            for (int t = 0; t < tiles; ++t) {
                const float* rows = room + 16 * t;
                for (int c = 0; c < 16; c += W) {
                    vf top = zero();
                    for (int k = 0; k < there; ++k) top = maximum(magnitude(load(rows + k * stride + c)), top);
                    store(tops + c, top);
                }
                uint8_t* tile = span + (size_t)t * tile_bytes;
                scales16(tops, (uint16_t*)(tile + (size_t)width * 16), inverse);
                for (int k = 0; k < width; k += 4) words_across(rows + k * stride, stride, inverse, there - k, tile + (size_t)k * 16);
            }
            continue;
        }
        for (int t = 0; t < tiles; ++t) {  // b lies as [columns, depth]
            for (int r = 0; r < 16; ++r) {
                float* row = room + r * SPAN;
                const int filled = 16 * t + r < columns ? there : 0;
                if (filled) strip(b, n + 16 * t + r, from, filled, row);
                for (int k = filled; k < width; ++k) row[k] = 0.0f;
                vf top = zero();
                for (int k = 0; k < width; k += W) top = maximum(magnitude(load(row + k)), top);
                tops[r] = largest(top);
            }
            uint8_t* tile = span + (size_t)t * tile_bytes;
            scales16(tops, (uint16_t*)(tile + (size_t)width * 16), inverse);
            for (int r = 0; r < 16; ++r) {
                for (int k = 0; k < width; k += W) store(numbers[r] + k, rounded(load(room + r * SPAN + k), set1(inverse[r])));
            }
            words_of(numbers, width, tile);
        }
    }
}

#if VEC_AVX512
// A block by NT tiles, span by span, so that a span of the tiles stays in the first cache for all rows. Four rows at a time: 4 NT sums take
// 4 + NT loads for each four columns, where one tile alone would wait for as many loads as it has rows.
template <int NT>
void whole_tiles(const uint8_t* tile, size_t tile_bytes, const Block& b, float* y, size_t stride, bool add_up) {
    __m512 sums[BLOCK][NT];
    for (int m = 0; m < b.width; ++m) {
        for (int t = 0; t < NT; ++t) sums[m][t] = _mm512_setzero_ps();
    }
    for (int from = 0, span = 0; from < b.padded; from += SPAN, ++span, tile += SPAN * TILE + 32) {
        const int slices = least(SPAN, b.padded - from) / SLICE;
        for (int row = 0; row < b.width; row += 4) {
            __m512i c[4][NT];
#pragma GCC unroll 4
            for (int m = 0; m < 4; ++m) {
                const __m512i offset = _mm512_slli_epi32(_mm512_set1_epi32(b.totals[span * b.width + row + m]), 4);
#pragma GCC unroll 4
                for (int t = 0; t < NT; ++t) c[m][t] = offset;
            }
            const int8_t* q = b.q + ((size_t)(span * (SPAN / SLICE)) * b.width + row) * SLICE;
            const uint8_t* p = tile;
            for (int s = 0; s < slices; ++s, q += (size_t)b.width * SLICE) {
#pragma GCC unroll 8
                for (int j = 0; j < SLICE / 4; ++j, p += 64) {
                    __m512i w[NT];
#pragma GCC unroll 4
                    for (int t = 0; t < NT; ++t) w[t] = _mm512_loadu_si512(p + t * tile_bytes);
#pragma GCC unroll 4
                    for (int m = 0; m < 4; ++m) {
                        int32_t word;
                        memcpy(&word, q + m * SLICE + 4 * j, 4);
                        const __m512i x = _mm512_set1_epi32(word);
#pragma GCC unroll 4
                        for (int t = 0; t < NT; ++t) c[m][t] = _mm512_dpbusd_epi32(c[m][t], w[t], x);
                    }
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < NT; ++t) {
                const __m512 scale = load_half((const uint16_t*)(p + t * tile_bytes));
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(c[m][t]), scale);
                    sums[row + m][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(b.scales[span * b.width + row + m]), sums[row + m][t]);
                }
            }
        }
    }
    for (int m = 0; m < b.width; ++m) {
        for (int t = 0; t < NT; ++t) {
            float* to = y + (size_t)m * stride + t * TILE;
            const __m512 value = _mm512_mul_ps(sums[m][t], _mm512_set1_ps(TILE_UNIT));
            _mm512_storeu_ps(to, add_up ? _mm512_add_ps(_mm512_loadu_ps(to), value) : value);
        }
    }
}

bool whole(const uint8_t* tile, size_t tile_bytes, int tiles, const Block& b, float* y, size_t stride, bool add) {
    if (b.width % 4) return false;
    for (int t = 0; t < tiles; t += 4) {
        const uint8_t* at = tile + (size_t)t * tile_bytes;
        float* to = y + t * TILE;
        switch (tiles - t) {
            case 1: whole_tiles<1>(at, tile_bytes, b, to, stride, add); break;
            case 2: whole_tiles<2>(at, tile_bytes, b, to, stride, add); break;
            case 3: whole_tiles<3>(at, tile_bytes, b, to, stride, add); break;
            default: whole_tiles<4>(at, tile_bytes, b, to, stride, add); break;
        }
    }
    return true;
}
#else
bool whole(const uint8_t*, size_t, int, const Block&, float*, size_t, bool) { return false; }
#endif

const ProductKernels products = {ROWS, WIDE * W, W, strip, pack_a, pack_b, panel, thin, finish, build, whole};

}  // namespace
}  // namespace criadero
