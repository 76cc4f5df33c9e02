// Attention of training with AVX512_BF16: as train_impl.h has it, but the products multiply pairs of bf16 with f32 sums, so that the
// rotated queries and keys, softmax and its gradient are rounded to bf16 on their way into the next product.
#include "train_impl.h"
#include "train_avx512_bf16.h"

namespace criadero {

namespace {

constexpr int BLOCK = 48;  // query rows that are worked on together: eight panels of six

// to[2 i], to[2 i + 1] = even[i], odd[i]: two rows of f32 as pairs of bf16, n of them (a multiple of 16)
inline void store_pairs(const float* even, const float* odd, int n, uint16_t* to) {
    for (int i = 0; i < n; i += 16) {
        const __m256i e = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + i)), o = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + i));
        _mm512_storeu_si512(to + 2 * i, beside(e, o));
    }
}
inline void store_narrow(const float* from, int n, uint16_t* to) {  // n a multiple of 16
    for (int i = 0; i < n; i += 16) _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

// sums [6][stride] (+)= a [6 rows, pairs] b [pairs][columns], columns a multiple of 16
inline void six_rows(const uint16_t* a, size_t row_stride, size_t pair_stride, int rows, int pairs, const uint16_t* b, size_t b_step, int columns,
                     float* sums, size_t stride, bool more) {
    PanelTask t;
    t.a = a;
    t.row_stride = row_stride;
    t.pair_stride = pair_stride;
    t.rows = rows;
    t.pairs = pairs;
    t.b_step = b_step;
    t.sums_stride = stride;
    t.more = more;
    for (int n = 0; n < columns; n += PANEL_COLUMNS) {
        t.b = b + 2 * n;
        t.sums = sums + n;
        t.columns = least(PANEL_COLUMNS, columns - n);
        panel_of(t);
    }
}

// bf16 rows [16][padded] (zeros beyond the head) as pairs: to[d / 2][stride] of 32 bits, 16 tokens side by side
inline void store_across(const uint16_t* rows, int padded, uint32_t* to, size_t stride) {
    for (int d = 0; d < padded; d += 32) {
        __m512i r[16];
        const __mmask32 mask = padded - d >= 32 ? 0xffffffffu : 0xffffu;
        for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi16(mask, rows + i * padded + d);
        transpose16(r);
        for (int i = 0; i < least(16, (padded - d) / 2); ++i) _mm512_storeu_si512(to + (size_t)(d / 2 + i) * stride, r[i]);
    }
}

struct Room {  // cut from one piece, each part on a cache line
    uint8_t* at;
    template <class T>
    T* take(size_t n) {
        T* p = (T*)at;
        at += (n * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

struct Keys {
    uint32_t *k_across, *v_across;  // [padded / 2][keys], pairs of d
    uint16_t *k_pairs, *v_pairs;    // [keys / 2][padded][2], pairs of tokens
};

// Keys and values of the document in the orders that the products want; what is null is left out
inline void load_keys(const AttendDocument& t, const Cut& c, const Keys& to, float* rows, uint16_t* narrow) {
    const int half = t.head_dim / 2;
    const uint16_t* k = (const uint16_t*)t.qkv + (size_t)(t.heads + t.kv_head) * t.head_dim;
    const uint16_t* v = k + (size_t)t.kv_heads * t.head_dim;
    for (int i0 = 0; i0 < c.keys; i0 += 16) {
        for (int which = 0; which < 2; ++which) {
            uint32_t* across = which ? to.v_across : to.k_across;
            uint16_t* pairs = which ? to.v_pairs : to.k_pairs;
            if (!across && !pairs) continue;
            for (int i = 0; i < 16; ++i) {
                float* row = rows + (size_t)i * c.padded;
                const size_t token = (size_t)(i0 + i);
                if (i0 + i >= c.n) clear(row, (size_t)c.padded);
                else if (which) load_plain(v + token * c.token, t.head_dim, c.padded, row);
                else load_rotated(k + token * c.token, t.cosine + token * half, t.sine + token * half, t.head_dim, c.padded, 1.0f, row);
            }
            if (across) {
                for (int i = 0; i < 16; ++i) store_narrow(rows + (size_t)i * c.padded, c.padded, narrow + (size_t)i * c.padded);
                store_across(narrow, c.padded, across + i0, (size_t)c.keys);
            }
            if (pairs) {
                for (int i = 0; i < 16; i += 2) {
                    store_pairs(rows + (size_t)i * c.padded, rows + (size_t)(i + 1) * c.padded, c.padded, pairs + (size_t)(i0 + i) * c.padded);
                }
            }
        }
    }
}

inline int columns_seen(int row, int keys) { return least(keys, up_to(row + 1, 64)); }

}  // namespace

void avx512_bf16_attend(const AttendDocument& t, float* memory) {
    const Cut c(t);
    const int half = t.head_dim / 2;
    const size_t padded = (size_t)c.padded, keys = (size_t)c.keys;
    Room room{(uint8_t*)memory};
    const Keys kv{room.take<uint32_t>(padded / 2 * keys), nullptr, nullptr, room.take<uint16_t>(padded * keys)};
    float* rows = room.take<float>(16 * padded);
    uint16_t* narrow = room.take<uint16_t>(16 * padded);
    uint16_t* q = room.take<uint16_t>(BLOCK * padded);
    float* o = room.take<float>(BLOCK * padded);
    float* s = room.take<float>(BLOCK * keys);
    uint16_t* p = room.take<uint16_t>(BLOCK * keys);
    load_keys(t, c, kv, rows, narrow);
    for (int h = t.first; h < t.last; ++h) {
        const uint16_t* q_from = (const uint16_t*)t.qkv + (size_t)h * t.head_dim;
        uint16_t* to = (uint16_t*)t.out + (size_t)h * t.head_dim;
        float* lse = t.lse + (size_t)h * t.lse_stride;
        for (int i0 = 0; i0 < c.n; i0 += BLOCK) {
            const int here = least(BLOCK, c.n - i0);
            float under[BLOCK];
            for (int r = 0; r < here; ++r) {
                const size_t i = (size_t)(i0 + r);
                load_rotated(q_from + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, rows);
                store_narrow(rows, c.padded, q + r * padded);
            }
            for (int r = 0; r < here; r += PANEL_ROWS) {
                const int six = least(PANEL_ROWS, here - r), seen = columns_seen(i0 + r + six - 1, c.keys);
                six_rows(q + r * padded, padded, 2, six, c.padded / 2, (const uint16_t*)kv.k_across, 2 * keys, seen, s + r * keys, keys, false);
                for (int i = r; i < r + six; ++i) {
                    const float* score = s + i * keys;
                    uint16_t* to_p = p + i * keys;
                    const int valid = i0 + i + 1;
                    vf top = set1(-INFINITY);
                    int j = 0;
                    for (; j + W <= valid; j += W) top = maximum(load(score + j), top);
                    if (j < valid) top = maximum(load_first(score + j, valid - j, -INFINITY), top);
                    const float m = largest(top);
                    const vf shift = set1(m);
                    vf total = zero();
                    for (j = 0; j < valid; j += W) {
                        const vf x = j + W <= valid ? load(score + j) : load_first(score + j, valid - j, -INFINITY);
                        const vf e = exp2v(sub(x, shift));
                        total = add(total, e);
                        _mm256_storeu_si256((__m256i*)(to_p + j), (__m256i)_mm512_cvtneps_pbh(e));
                    }
                    for (; j < seen; j += W) _mm256_storeu_si256((__m256i*)(to_p + j), _mm256_setzero_si256());
                    const float z = sum(total);
                    lse[i0 + i] = m + log2f(z);
                    under[i] = 1.0f / z;
                }
                six_rows(p + r * keys, keys, 2, six, (i0 + r + six + 1) / 2, kv.v_pairs, 2 * padded, c.padded, o + r * padded, padded, false);
                for (int i = r; i < r + six; ++i) {
                    for (int d = 0; d < t.head_dim; d += W) {
                        const int n = least(W, t.head_dim - d);
                        store_part(to + (size_t)(i0 + i) * c.out_token + d, n, mul(load(o + i * padded + d), set1(under[i])));
                    }
                }
            }
        }
    }
}

void avx512_bf16_attend_backward(const AttendDocument& t, float* memory) {
    const Cut c(t);
    const int half = t.head_dim / 2;
    const size_t padded = (size_t)c.padded, keys = (size_t)c.keys;
    Room room{(uint8_t*)memory};
    Keys kv;
    kv.k_across = room.take<uint32_t>(padded / 2 * keys);
    kv.v_across = room.take<uint32_t>(padded / 2 * keys);
    kv.k_pairs = room.take<uint16_t>(padded * keys);
    kv.v_pairs = nullptr;
    float *dk = room.take<float>(padded * (keys + PANEL_ROWS)), *dv = room.take<float>(padded * (keys + PANEL_ROWS));  // a panel reads six rows
    float *rows = room.take<float>(16 * padded), *x = room.take<float>(PANEL_ROWS * padded);
    uint16_t* narrow = room.take<uint16_t>(16 * padded);
    float *q_wide = room.take<float>(BLOCK * padded), *g_wide = room.take<float>(BLOCK * padded);
    uint16_t *q = room.take<uint16_t>(BLOCK * padded), *g = room.take<uint16_t>(BLOCK * padded);              // [BLOCK][padded]
    uint16_t *q_pairs = room.take<uint16_t>(BLOCK * padded), *g_pairs = room.take<uint16_t>(BLOCK * padded);  // [BLOCK / 2][padded][2]
    float *p = room.take<float>(PANEL_ROWS * keys), *s = room.take<float>(PANEL_ROWS * keys);
    uint16_t *ds = room.take<uint16_t>(PANEL_ROWS * keys);  // rows of six
    uint16_t *p_pairs = room.take<uint16_t>(BLOCK * keys), *ds_pairs = room.take<uint16_t>(BLOCK * keys);     // [BLOCK / 2][keys][2]
    const size_t k_at = (size_t)(t.heads + t.kv_head) * t.head_dim, v_at = k_at + (size_t)t.kv_heads * t.head_dim;
    const uint16_t* qkv = (const uint16_t*)t.qkv;
    uint16_t* d_qkv = (uint16_t*)t.d_qkv;
    load_keys(t, c, kv, rows, narrow);
    clear(dk, padded * keys);
    clear(dv, padded * keys);
    for (int h = t.first; h < t.last; ++h) {
        const size_t q_at = (size_t)h * t.head_dim;
        const float* lse = t.lse + (size_t)h * t.lse_stride;
        for (int i0 = 0; i0 < c.n; i0 += BLOCK) {
            const int here = least(BLOCK, c.n - i0), last_seen = columns_seen(i0 + here - 1, c.keys);
            float delta[BLOCK];
            const int even = up_to(here, 2);
            for (int r = 0; r < even; ++r) {
                if (r >= here) {
                    clear(q_wide + r * padded, padded);
                    clear(g_wide + r * padded, padded);
                    continue;
                }
                const size_t i = (size_t)(i0 + r);
                load_rotated(qkv + q_at + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, q_wide + r * padded);
                load_plain((const uint16_t*)t.d_out + q_at + i * c.out_token, t.head_dim, c.padded, g_wide + r * padded);
                load_plain((const uint16_t*)t.out + q_at + i * c.out_token, t.head_dim, c.padded, rows);
                vf both = zero();
                for (int d = 0; d < c.padded; d += W) both = fma(load(rows + d), load(g_wide + r * padded + d), both);
                delta[r] = sum(both);
                store_narrow(q_wide + r * padded, c.padded, q + r * padded);
                store_narrow(g_wide + r * padded, c.padded, g + r * padded);
            }
            for (int r = 0; r < even; r += 2) {
                store_pairs(q_wide + r * padded, q_wide + (r + 1) * padded, c.padded, q_pairs + r * padded);
                store_pairs(g_wide + r * padded, g_wide + (r + 1) * padded, c.padded, g_pairs + r * padded);
            }
            for (int r = 0; r < here; r += PANEL_ROWS) {
                const int six = least(PANEL_ROWS, here - r), seen = columns_seen(i0 + r + six - 1, c.keys);
                six_rows(q + r * padded, padded, 2, six, c.padded / 2, (const uint16_t*)kv.k_across, 2 * keys, seen, p, keys, false);
                six_rows(g + r * padded, padded, 2, six, c.padded / 2, (const uint16_t*)kv.v_across, 2 * keys, seen, s, keys, false);
                for (int i = 0; i < six; i += 2) {  // two rows at a time, for the pairs; an odd row more is nothing
                    const int valid = i0 + r + i + 1;
                    const bool second = i + 1 < six;
                    const vf shift0 = set1(lse[i0 + r + i]), less0 = set1(delta[r + i]);
                    const vf shift1 = set1(second ? lse[i0 + r + i + 1] : 0.0f), less1 = set1(second ? delta[r + i + 1] : 0.0f);
                    const float *p0 = p + i * keys, *p1 = p0 + keys, *s0 = s + i * keys, *s1 = s0 + keys;
                    for (int j = 0; j < last_seen; j += W) {
                        vf e0 = zero(), e1 = zero(), d0 = zero(), d1 = zero();
                        if (j < valid) {
                            e0 = exp2v(sub(j + W <= valid ? load(p0 + j) : load_first(p0 + j, valid - j, -INFINITY), shift0));
                            d0 = mul(e0, sub(load(s0 + j), less0));
                        }
                        if (second && j < valid + 1) {
                            e1 = exp2v(sub(j + W <= valid + 1 ? load(p1 + j) : load_first(p1 + j, valid + 1 - j, -INFINITY), shift1));
                            d1 = mul(e1, sub(load(s1 + j), less1));
                        }
                        const __m256i n0 = (__m256i)_mm512_cvtneps_pbh(d0), n1 = (__m256i)_mm512_cvtneps_pbh(d1);
                        const __m256i q0 = (__m256i)_mm512_cvtneps_pbh(e0), q1 = (__m256i)_mm512_cvtneps_pbh(e1);
                        _mm256_storeu_si256((__m256i*)(ds + i * keys + j), n0);
                        if (second) _mm256_storeu_si256((__m256i*)(ds + (i + 1) * keys + j), n1);
                        _mm512_storeu_si512(ds_pairs + (r + i) * keys + 2 * j, beside(n0, n1));
                        _mm512_storeu_si512(p_pairs + (r + i) * keys + 2 * j, beside(q0, q1));
                    }
                }
                six_rows(ds, keys, 2, six, (i0 + r + six + 1) / 2, kv.k_pairs, 2 * padded, c.padded, x, padded, false);
                for (int i = 0; i < six; ++i) {
                    const size_t token = (size_t)(i0 + r + i);
                    store_unrotated(x + i * padded, t.cosine + token * half, t.sine + token * half, t.head_dim, c.scale, d_qkv + q_at + token * c.token);
                }
            }
            for (int j = 0; j < i0 + here; j += PANEL_ROWS) {  // keys j to j + 5: rows before j see none of them
                const int from = most(0, j - i0) / 2, pairs = even / 2 - from, six = least(PANEL_ROWS, i0 + here - j);
                six_rows(ds_pairs + from * 2 * keys + 2 * j, 2, 2 * keys, six, pairs, q_pairs + from * 2 * padded, 2 * padded, c.padded, dk + j * padded, padded, true);
                six_rows(p_pairs + from * 2 * keys + 2 * j, 2, 2 * keys, six, pairs, g_pairs + from * 2 * padded, 2 * padded, c.padded, dv + j * padded, padded, true);
            }
        }
    }
    for (int i = 0; i < c.n; ++i) {  // q held log2(e) too: taken out again
        const size_t at = (size_t)i * half;
        store_unrotated(dk + i * padded, t.cosine + at, t.sine + at, t.head_dim, LN2, d_qkv + k_at + i * c.token);
        for (int d = 0; d < t.head_dim; d += W) store_part(d_qkv + v_at + i * c.token + d, least(W, t.head_dim - d), load(dv + i * padded + d));
    }
}

}  // namespace criadero
