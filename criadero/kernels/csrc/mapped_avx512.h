// Rows as they lie in a mapped file, turned into the order of packed tiles in registers: 16 rows, 32 columns at a time. Internal linkage,
// for the reason given in vec.h.
//
// A tile is read along 16 rows at once. Where these begin at a multiple of 4 KiB from each other they meet in one set of the first cache,
// which has fewer than 16 ways: each line is therefore used whole before another is touched, and what is fetched ahead goes to the second
// cache. One core of Emerald Rapids reads 15.5 GB/s of Q8_0 so and 14.5 of bf16, of packed tiles 16 and 15.7.
#pragma once
#include "linear_avx512.h"
#include "mapped.h"

namespace criadero {
namespace {

constexpr size_t AHEAD = 512;  // bytes of each row, of 128 to 2048 the fastest or nearly so with rows of 2 to 12 KB (Emerald Rapids)

// 16 rows of some tiles, shared out so that each lane goes through neighbouring rows: lane l has, at step i, row i of the l-th sixteenth. So
// 16 streams run through whole pages, which the processor's own fetching ahead can follow; of 16 neighbouring short rows two and more lie in
// a page, and it cannot. The last row is repeated where there are no more.
struct Rows {
    const uint8_t* at[TILE];
    const uint8_t* next[TILE];
    __m512i place;    // counted from the first row of tile `first`
    __mmask16 there;
    int first, end;   // tiles
};

constexpr int RUN = 43;  // tiles that are shared out together, at most: a number that does not bring all lanes into the same sets of the second cache

// The next 16 rows of tiles [first, last), `step` of them being done.
inline void find_rows(const Weights& w, int first, int last, int step, Rows& rows) {
    const bool fresh = step == 0 || first + step == rows.end;
    if (fresh) {
        rows.first = first + step;
        rows.end = least(rows.first + RUN, last);
    }
    const int i = first + step - rows.first, each = rows.end - rows.first, from = rows.first * TILE, most = w.rows - 1 - from;
    alignas(64) int place[TILE];
    for (int r = 0; r < TILE; ++r) {
        place[r] = r * each + i;
        rows.at[r] = fresh ? mapped_row(w, from + least(place[r], most)) : rows.next[r];
        // at the end of a run the next one begins: a row each of it, or nearly so
        const int then = i + 1 < each ? place[r] + 1 : each * TILE + r * least(RUN, last - rows.end);
        rows.next[r] = mapped_row(w, from + least(then, most));
    }
    rows.place = _mm512_load_si512(place);
    rows.there = _mm512_cmple_epi32_mask(rows.place, _mm512_set1_epi32(most));
}

// y = sums * scale (or sums) of these rows; y belongs to the first row.
template <int M>
inline void store_rows(const Rows& rows, const Block& b, const __m512* sums, const __m512* scale, float* y, size_t stride, bool add) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        if (m >= b.rows) break;
        float* to = y + (size_t)m * stride;
        __m512 value = scale ? _mm512_mul_ps(sums[m], *scale) : sums[m];
        if (add) value = _mm512_add_ps(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), rows.there, rows.place, to, 4), value);
        _mm512_mask_i32scatter_ps(to, rows.there, rows.place, value, 4);
    }
}

// A line of each row, so many bytes from its beginning, or, beyond its end, of the lane's next row. Inlined by
// force: a function that only does this is to GCC one that does nothing, and its calls go.
__attribute__((always_inline)) inline void fetch_rows(const Rows& rows, size_t at, size_t row_bytes) {
    const bool here = at < row_bytes;
    const uint8_t* const* from = here ? rows.at : rows.next;
    if (!here) at -= row_bytes;
    UNROLL
    for (int r = 0; r < TILE; ++r) _mm_prefetch((const char*)from[r] + at, _MM_HINT_T1);
}

// 16 bytes of each of the rows r, r + 4, r + 8 and r + 12.
inline __m512i quarter_rows(const uint8_t* const* rows, int r, size_t at) {
    __m512i z = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(rows[r] + at)));
    z = _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)(rows[r + 4] + at)), 1);
    z = _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)(rows[r + 8] + at)), 2);
    return _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)(rows[r + 12] + at)), 3);
}

// 16 G bytes of each row -> 4 G registers, each with one word of every row.
template <int G>
inline void interleave(const uint8_t* const* rows, size_t at, __m512i* words) {
    __m512i z[G][4];
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int g = 0; g < G; ++g) z[g][r] = quarter_rows(rows, r, at + 16 * g);
    }
    UNROLL
    for (int g = 0; g < G; ++g) {
        const __m512i a = _mm512_unpacklo_epi32(z[g][0], z[g][1]), b = _mm512_unpackhi_epi32(z[g][0], z[g][1]);
        const __m512i c = _mm512_unpacklo_epi32(z[g][2], z[g][3]), d = _mm512_unpackhi_epi32(z[g][2], z[g][3]);
        words[4 * g] = _mm512_unpacklo_epi64(a, c);
        words[4 * g + 1] = _mm512_unpackhi_epi64(a, c);
        words[4 * g + 2] = _mm512_unpacklo_epi64(b, d);
        words[4 * g + 3] = _mm512_unpackhi_epi64(b, d);
    }
}

// The last slice of rows that end in it: the columns beyond are zero, and nothing behind a row is read.
__attribute__((noinline)) void bf16_tail(const uint8_t* const* rows, size_t at, size_t there, __m512i* words) {
    uint8_t spare[TILE][SLICE * 2];
    const uint8_t* spares[TILE];
    for (int r = 0; r < TILE; ++r) {
        memset(spare[r], 0, sizeof spare[r]);
        memcpy(spare[r], rows[r] + at, there);
        spares[r] = spare[r];
    }
    interleave<4>(spares, 0, words);
}

// Slice s of bf16 rows, 2 columns a register.
inline void bf16_slice(const Weights& w, const uint8_t* const* rows, int s, __m512i* words) {
    const size_t at = (size_t)s * SLICE * 2;
    if (at + SLICE * 2 <= w.row_bytes) interleave<4>(rows, at, words);
    else bf16_tail(rows, at, w.row_bytes - at, words);
}

// A block of each Q8_0 row: the numbers as unsigned bytes, 4 columns a register, and the scales.
inline __m512 q8_block(const uint8_t* const* rows, size_t at, __m512i* w) {
    interleave<2>(rows, at + 2, w);
    UNROLL
    for (int j = 0; j < 8; ++j) w[j] = _mm512_xor_si512(w[j], _mm512_set1_epi8((char)0x80));
    // the first word of each block: its scale, and two numbers that go
    const __m512i a = _mm512_unpacklo_epi32(quarter_rows(rows, 0, at), quarter_rows(rows, 1, at));
    const __m512i b = _mm512_unpacklo_epi32(quarter_rows(rows, 2, at), quarter_rows(rows, 3, at));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_unpacklo_epi64(a, b)));
}

}  // namespace
}  // namespace criadero
