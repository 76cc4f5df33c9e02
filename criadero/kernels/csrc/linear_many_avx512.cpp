// Many rows of activations at once, for long prompts: the products of linear_avx512.cpp, to the bit, in another order of work.
//
// A tile that meets a block of 16 rows over all columns reads the block's activations again for each tile: with the weights they overflow the
// first-level cache, and Intel's processors lose half of their peak to it (Emerald Rapids, one core: 337 of 706 GOP/s; 560 were all in that
// cache). Here a chunk of 512 columns of two tiles, unpacked to bytes, stays there while all rows pass by; their float sums wait in memory
// from chunk to chunk. A load of weights serves eight rows, and one of activations two tiles.
#include "linear.h"
#include "linear_avx512.h"
#include "mapped_avx512.h"
#include "vec.h"

namespace criadero {

namespace {

constexpr int CHUNK = 4;  // spans unpacked at a time: 16 KiB for two tiles
constexpr int SLICES = SPAN / SLICE;

// One span of T tiles, unpacked.
struct Unpacked {
    alignas(64) uint8_t numbers[SPAN * TILE];
    alignas(64) float scales[2 * SLICES][TILE];  // of each group
    alignas(64) float mins[SLICES][TILE];
};

template <Kind KIND, int GROUP>
void unpack_span(const uint8_t* p, int slices, Unpacked& to) {
    constexpr int STEP = KIND == Kind::int8 ? 512 : 256;
    for (int s = 0; s < slices; ++s) {
        __m512i w[8];
        unpack<KIND>(p + s * STEP, w);
        UNROLL
        for (int j = 0; j < 8; ++j) _mm512_store_si512(to.numbers + s * 512 + 64 * j, w[j]);
    }
    if (GROUP == 0) return;
    const int groups = GROUP == 128 ? 1 : slices * SLICE / (GROUP ? GROUP : 1);
    const uint8_t* scales = p + slices * STEP;
    for (int g = 0; g < groups; ++g) _mm512_store_ps(to.scales[g], half16(scales + 32 * g));
    if (KIND != Kind::int4_mins) return;
    for (int g = 0; g < groups; ++g) _mm512_store_ps(to.mins[g], _mm512_mul_ps(half16(scales + 32 * (groups + g)), _mm512_set1_ps(0.125f)));
}

// Span `span` of mapped rows of Q8_0.
void unpack_mapped(const uint8_t* const* rows, int span, int slices, Unpacked& to) {
    for (int s = 0; s < slices; ++s) {
        __m512i w[8];
        _mm512_store_ps(to.scales[s], q8_block(rows, ((size_t)span * SLICES + s) * Q8_BYTES, w));
        UNROLL
        for (int j = 0; j < 8; ++j) _mm512_store_si512(to.numbers + s * 512 + 64 * j, w[j]);
    }
}

// sums[m * row_stride + t * TILE ..] += what a span gives, for rows [row, row + M) of the block and T tiles. The same operations on each
// output as span_product in linear_avx512.cpp.
template <Kind KIND, int GROUP, int T, int M>
inline void span_rows(const Unpacked* const* w, int slices, const Block& b, int span, int row, float* sums, size_t row_stride) {
    __m512 f[T][M];
    __m512i c[T][M];
    const int8_t* q = b.q + ((size_t)span * SLICES * b.width + row) * SLICE;
    auto start = [&](const int32_t* stored) __attribute__((always_inline)) {
        UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i value = offset<KIND>(stored + m);
            UNROLL
            for (int t = 0; t < T; ++t) c[t][m] = value;
        }
    };
    auto multiply = [&](int s, int from, int to) __attribute__((always_inline)) {
        UNROLL
        for (int j = from; j < to; ++j) {
            __m512i v[T];
            UNROLL
            for (int t = 0; t < T; ++t) v[t] = _mm512_load_si512(w[t]->numbers + s * 512 + 64 * j);
            UNROLL
            for (int m = 0; m < M; ++m) {
                const __m512i x = four(q + m * SLICE + 4 * j);
                UNROLL
                for (int t = 0; t < T; ++t) c[t][m] = _mm512_dpbusd_epi32(c[t][m], v[t], x);
            }
        }
    };
    auto scaled = [&](int group, const int32_t* eights, bool fresh) __attribute__((always_inline)) {
        UNROLL
        for (int t = 0; t < T; ++t) {
            const __m512 scale = _mm512_load_ps(w[t]->scales[group]);
            UNROLL
            for (int m = 0; m < M; ++m) {
                const __m512 whole = _mm512_cvtepi32_ps(c[t][m]);
                f[t][m] = fresh ? _mm512_mul_ps(whole, scale) : _mm512_fmadd_ps(whole, scale, f[t][m]);
                if (KIND == Kind::int4_mins) {
                    f[t][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(eights[m])), _mm512_load_ps(w[t]->mins[group]), f[t][m]);
                }
            }
        }
    };
    if (GROUP == 128 || GROUP == 0) start(b.totals + (size_t)span * b.width + row);
    if (GROUP == 16 || GROUP == 32) {
        UNROLL
        for (int t = 0; t < T; ++t) {
            UNROLL
            for (int m = 0; m < M; ++m) f[t][m] = _mm512_setzero_ps();
        }
    }
    for (int s = 0; s < slices; ++s) {
        const size_t slice = (size_t)span * SLICES + s;
        if (GROUP == 32) {
            const int32_t* eights = b.sums + slice * b.width + row;
            start(eights);
            multiply(s, 0, 8);
            scaled(s, eights, false);
        } else if (GROUP == 16) {
            const int32_t* eights = b.fine + slice * 2 * b.width + row;
            start(eights);
            multiply(s, 0, 4);
            scaled(2 * s, nullptr, false);
            start(eights + b.width);
            multiply(s, 4, 8);
            scaled(2 * s + 1, nullptr, false);
        } else {
            multiply(s, 0, 8);
        }
        q += b.width * SLICE;
    }
    if (GROUP == 128) scaled(0, b.totals + (size_t)span * b.width + row, true);
    const float* scale = b.scales + (size_t)span * b.width + row;
    UNROLL
    for (int m = 0; m < M; ++m) {
        UNROLL
        for (int t = 0; t < T; ++t) {
            if (GROUP == 0) f[t][m] = _mm512_cvtepi32_ps(c[t][m]);
            float* to = sums + m * row_stride + t * TILE;
            _mm512_store_ps(to, _mm512_fmadd_ps(f[t][m], _mm512_set1_ps(scale[m]), _mm512_load_ps(to)));
        }
    }
}

template <Kind KIND, int GROUP, int T, int M>
inline void rows(const Unpacked (*w)[CHUNK], int spans, int rest, const Block& b, int span, int row, float* sums, size_t row_stride) {
    for (int i = 0; i < spans; ++i) {
        const Unpacked* part[T];
        UNROLL
        for (int t = 0; t < T; ++t) part[t] = &w[t][i];
        const int slices = rest && i + 1 == spans ? rest : SLICES;
        span_rows<KIND, GROUP, T, M>(part, slices, b, span + i, row, sums, row_stride);
    }
}

// What is read next: two tiles from this one, a chunk from this span.
struct Coming {
    bool there;
    int tile, span;
};

// Tiles [tile, tile + T) of spans [from, from + spans); `rest`: slices of the last of them if it is short. Meanwhile `ahead`, what the next
// call reads, comes into the caches: so many bytes of each of two tiles, or, MAPPED, of each of 32 rows.
template <Kind KIND, int GROUP, int T, bool MAPPED>
void chunk(const Weights& w, const Block* blocks, int count, int tile, int from, int spans, int rest, Coming ahead, float* sums, size_t row_stride) {
    const int lines = (int)(w.span_bytes * CHUNK / 64);
    Unpacked room[T][CHUNK];
    for (int t = 0; t < T; ++t) {
        Rows rows;
        if (MAPPED) find_rows(w, tile + t, tile + t + 1, 0, rows);
        for (int i = 0; i < spans; ++i) {
            if (MAPPED) {
                unpack_mapped(rows.at, from + i, rest && i + 1 == spans ? rest : SLICES, room[t][i]);
                continue;
            }
            const uint8_t* p = w.data + (size_t)(tile + t) * w.tile_bytes + (size_t)(from + i) * w.span_bytes;
            unpack_span<KIND, GROUP>(p, rest && i + 1 == spans ? rest : SLICES, room[t][i]);
        }
    }
    for (int n = 0; n < count; ++n) {
        const Block& b = blocks[n];
        float* to = sums + (size_t)n * BLOCK * row_stride;
        if (ahead.there && MAPPED) {
            for (int i = 2 * TILE * n / count; i < 2 * TILE * (n + 1) / count; ++i) {
                const char* p = (const char*)mapped_row(w, least(ahead.tile * TILE + i, w.rows - 1)) + ahead.span * SLICES * Q8_BYTES;
                UNROLL
                for (size_t line = 0; line < CHUNK * SLICES * Q8_BYTES + 63; line += 64) _mm_prefetch(p + line, _MM_HINT_T1);
            }
        } else if (ahead.there) {
            const char* p = (const char*)w.data + (size_t)ahead.tile * w.tile_bytes + (size_t)ahead.span * w.span_bytes;
            for (int i = lines * n / count; i < lines * (n + 1) / count; ++i) {
                _mm_prefetch(p + 64 * i, _MM_HINT_T1);
                _mm_prefetch(p + w.tile_bytes + 64 * i, _MM_HINT_T1);
            }
        }
        int row = 0;
        for (; row + 8 <= b.width && row < b.rows; row += 8) rows<KIND, GROUP, T, 8>(room, spans, rest, b, from, row, to + row * row_stride, row_stride);
        for (; row + 4 <= b.width && row < b.rows; row += 4) rows<KIND, GROUP, T, 4>(room, spans, rest, b, from, row, to + row * row_stride, row_stride);
        for (; row + 2 <= b.width && row < b.rows; row += 2) rows<KIND, GROUP, T, 2>(room, spans, rest, b, from, row, to + row * row_stride, row_stride);
        for (; row < b.rows; ++row) rows<KIND, GROUP, T, 1>(room, spans, rest, b, from, row, to + row * row_stride, row_stride);
    }
}

template <Kind KIND, int GROUP, bool MAPPED = false>
void many(const Weights& w, const Block* blocks, int count, int first, int last, float* sums, float* y, size_t stride, bool add) {
    const int spans = (w.padded + SPAN - 1) / SPAN, short_one = w.padded % SPAN / SLICE;
    const size_t row_stride = (size_t)(last - first) * TILE;
    memset(sums, 0, (size_t)count * BLOCK * row_stride * sizeof(float));
    for (int from = 0; from < spans; from += CHUNK) {
        const int here = least(CHUNK, spans - from), rest = from + here == spans ? short_one : 0;
        for (int t = first; t < last; t += 2) {
            const int next = t + 2 < last ? t + 2 : first, then = t + 2 < last ? from : from + CHUNK;
            const Coming ahead{then < spans, next, then};
            float* to = sums + (size_t)(t - first) * TILE;
            if (t + 1 < last) chunk<KIND, GROUP, 2, MAPPED>(w, blocks, count, t, from, here, rest, ahead, to, row_stride);
            else chunk<KIND, GROUP, 1, MAPPED>(w, blocks, count, t, from, here, rest, ahead, to, row_stride);
        }
    }
    for (int n = 0; n < count; ++n) {
        for (int row = 0; row < blocks[n].rows; ++row) {
            const size_t m = (size_t)n * BLOCK + row;
            for (int t = first; t < last; ++t) {
                const __m512 scale = GROUP ? _mm512_set1_ps(w.unit) : _mm512_loadu_ps(w.data + (size_t)t * w.tile_bytes + (size_t)w.padded * TILE);
                const __m512 one = _mm512_load_ps(sums + m * row_stride + (size_t)(t - first) * TILE);
                Block alone;
                alone.rows = 1;
                store_tile<1>(w, alone, t, &one, &scale, y + m * stride, stride, add);
            }
        }
    }
}

}  // namespace

void avx512_many(const Weights& w, const Block* blocks, int count, int first, int last, float* sums, float* y, size_t stride, bool add) {
    auto* kernel = &many<Kind::int4, 32>;
    if (w.mapped) kernel = many<Kind::int8, 32, true>;
    else if (w.kind == Kind::int4) kernel = w.group == 32 ? many<Kind::int4, 32> : many<Kind::int4, 128>;
    else if (w.kind == Kind::int4_mins) kernel = w.group == 32 ? many<Kind::int4_mins, 32> : many<Kind::int4_mins, 128>;
    else if (w.group == 16) kernel = many<Kind::int8, 16>;
    else if (w.group == 32) kernel = many<Kind::int8, 32>;
    else kernel = w.group == 128 ? many<Kind::int8, 128> : many<Kind::int8, 0>;
    kernel(w, blocks, count, first, last, sums, y, stride, add);
}

}  // namespace criadero
