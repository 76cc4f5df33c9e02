// Norms, SwiGLU, cross-entropy and attention of training, included by train_*.cpp (see vec.h on linkage). Everything is computed in an
// order that depends on the sizes only, so that a run that is repeated or resumed ends bit for bit the same.
#pragma once
#include "train.h"
#include "vec.h"
#if VEC_AVX512
#include "transpose16.h"
#endif

namespace criadero {
namespace {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr int QUERIES = 48;  // worked on together: a multiple of 16 and of TALL

inline vf load_any(const float* p) { return load(p); }
inline vf load_any(const uint16_t* p) { return load_bf16(p); }
inline void store_any(float* p, vf a) { store(p, a); }
#if VEC_AVX512
inline __m256i to_bf16(vf a) {  // to nearest, ties to even; NaN stays NaN
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
}
inline __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }
inline void store_any(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
inline vf load_less(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline vf load_less(const uint16_t* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
inline void store_less(float* p, int n, vf a) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
inline void store_less(uint16_t* p, int n, vf a) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
#else
inline void store_any(uint16_t* p, vf a) {
    float all[W];
    store(all, a);
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(all[i]);
}
template <class T>
inline vf load_less(const T* p, int n) {
    T all[W] = {};
    for (int i = 0; i < n; ++i) all[i] = p[i];
    return load_any(all);
}
template <class T>
inline void store_less(T* p, int n, vf a) {
    T all[W];
    store_any(all, a);
    for (int i = 0; i < n; ++i) p[i] = all[i];
}
#endif
template <class T>
inline vf load_part(const T* p, int n) {  // the first n, then zeros
    return n >= W ? load_any(p) : load_less(p, n);
}
template <class T>
inline void store_part(T* p, int n, vf a) {
    if (n >= W) store_any(p, a);
    else store_less(p, n, a);
}

inline vf sigmoid(vf x) {  // at most 2^126 below the line, which makes it 0 far to the left
    return divide(set1(1.0f), add(set1(1.0f), exp2v(minimum(mul(x, set1(-LOG2E)), set1(126.0f)))));
}

template <class T>
float norm(const void* x_, const float* w, float eps, int n, void* y_) {
    const T* x = (const T*)x_;
    T* y = (T*)y_;
    vf a = zero(), b = zero();
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf u = load_any(x + i), v = load_any(x + i + W);
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; i < n; i += W) {
        const vf u = load_part(x + i, n - i);
        a = fma(u, u, a);
    }
    const float r = 1.0f / sqrtf(sum(add(a, b)) / (float)n + eps);
    for (i = 0; i < n; i += W) store_part(y + i, n - i, mul(mul(load_part(x + i, n - i), set1(r)), load_part(w + i, n - i)));
    return r;
}

// With xh = x r and g = dy w:  dx = r (g - xh mean(g xh)),  dw = dy xh
template <class T>
void norm_backward(const void* dy_, const void* x_, const float* w, float r, const void* dres_, int n, void* dx_, float* dw) {
    const T *dy = (const T*)dy_, *x = (const T*)x_, *dres = (const T*)dres_;
    T* dx = (T*)dx_;
    const vf rv = set1(r);
    vf s = zero();
    for (int i = 0; i < n; i += W) {
        const vf d = load_part(dy + i, n - i), p = mul(d, mul(load_part(x + i, n - i), rv));
        s = fma(p, load_part(w + i, n - i), s);
        store_part(dw + i, n - i, add(load_part(dw + i, n - i), p));
    }
    const vf mean = set1(sum(s) / (float)n);
    for (int i = 0; i < n; i += W) {
        const vf g = mul(load_part(dy + i, n - i), load_part(w + i, n - i)), xh = mul(load_part(x + i, n - i), rv);
        vf d = mul(rv, sub(g, mul(xh, mean)));
        if (dres) d = add(d, load_part(dres + i, n - i));
        store_part(dx + i, n - i, d);
    }
}

template <class T>
void swiglu(const void* gate_, const void* up_, int n, void* y_) {
    const T *gate = (const T*)gate_, *up = (const T*)up_;
    T* y = (T*)y_;
    for (int i = 0; i < n; i += W) {
        const vf g = load_part(gate + i, n - i);
        store_part(y + i, n - i, mul(mul(g, sigmoid(g)), load_part(up + i, n - i)));
    }
}

template <class T>
void swiglu_backward(const void* dy_, const void* gate_, const void* up_, int n, void* dgate_, void* dup_, void* y_) {
    const T *dy = (const T*)dy_, *gate = (const T*)gate_, *up = (const T*)up_;
    T *dgate = (T*)dgate_, *dup = (T*)dup_, *y = (T*)y_;
    for (int i = 0; i < n; i += W) {
        const vf g = load_part(gate + i, n - i), u = load_part(up + i, n - i), d = load_part(dy + i, n - i);
        const vf s = sigmoid(g), silu = mul(g, s);
        // silu' = s + g s (1 - s)
        const vf slope = fma(silu, sub(set1(1.0f), s), s);
        store_part(y + i, n - i, mul(silu, u));
        store_part(dup + i, n - i, mul(d, silu));
        store_part(dgate + i, n - i, mul(mul(d, u), slope));
    }
}

template <class T>
float cross_entropy(void* logits_, int n, int target, bool backward) {
    T* x = (T*)logits_;
    vf top = set1(-INFINITY);
    const int whole = n / W * W;
    for (int i = 0; i < whole; i += W) top = maximum(load_any(x + i), top);
    float m = largest(top);
    float rest[W];
    if (whole < n) {
        store(rest, load_part(x + whole, n - whole));
        for (int i = 0; i < n - whole; ++i) m = rest[i] > m ? rest[i] : m;
    }
    const vf shift = set1(m * LOG2E), scale = set1(LOG2E);
    vf s = zero(), s2 = zero();
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        s = add(s, exp2v(sub(mul(load_any(x + i), scale), shift)));
        s2 = add(s2, exp2v(sub(mul(load_any(x + i + W), scale), shift)));
    }
    for (; i < n; i += W) s = add(s, keep_first(exp2v(sub(mul(load_part(x + i, n - i), scale), shift)), least(W, n - i), 0.0f));
    const float z = sum(add(s, s2));
    T one[W] = {};
    one[0] = x[target];
    float at[W];
    store(at, load_any(one));
    const float loss = m + logf(z) - at[0];
    if (!backward) return loss;
    const vf under = set1(1.0f / z);
    for (i = 0; i < n; i += W) {
        store_part(x + i, n - i, mul(exp2v(sub(mul(load_part(x + i, n - i), scale), shift)), under));
    }
    // softmax - 1 at the target, from the f32 value rather than the rounded one
    store(at, sub(mul(exp2v(sub(mul(set1(at[0]), scale), shift)), under), set1(1.0f)));
    store_part(x + target, 1, load(at));
    return loss;
}

// --- attention ---
// Scores lie as [keys][queries], so that softmax works on a vector of queries at a time and keys need not be transposed. They are kept in
// units of log2, so that softmax needs exp2 alone. All scratch is f32; head sizes are multiples of 16 there, filled up with zeros.

inline int up_to(int n, int step) { return (n + step - 1) / step * step; }

#if VEC_AVX512 || VEC_NEON
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif
constexpr int TALL = 6;  // TALL x WIDE sums are what the registers hold

// c[R][NV * W] (+)= sum over k0 <= k < k1 of a(row, k) * b[k]; each sum in the order of k, whatever R and NV
template <int R, int NV>
inline void tile(const float* a, size_t rs, size_t ks, int k0, int k1, const float* b, size_t ldb, float* c, size_t ldc, bool more) {
    vf s[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) s[r][j] = more ? load(c + r * ldc + j * W) : zero();
    }
    a += k0 * ks;
    b += k0 * ldb;
    for (int k = k0; k < k1; ++k, a += ks, b += ldb) {
        vf v[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) v[j] = load(b + j * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf x = set1(a[r * rs]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) s[r][j] = fma(x, v[j], s[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(c + r * ldc + j * W, s[r][j]);
    }
}

// R rows by `columns` (a multiple of 16) columns, in pieces as even as can be: one vector's sums are too few to keep the units busy
template <int R>
inline void tiles(const float* a, size_t rs, size_t ks, int k0, int k1, const float* b, size_t ldb, int columns, float* c, size_t ldc, bool more) {
    for (int left = columns / W, pieces = (left + WIDE - 1) / WIDE; left > 0; --pieces) {
        const int now = (left + pieces - 1) / pieces;
        switch (now) {
            case 1: tile<R, 1>(a, rs, ks, k0, k1, b, ldb, c, ldc, more); break;
            case 2: tile<R, 2>(a, rs, ks, k0, k1, b, ldb, c, ldc, more); break;
#if VEC_AVX512 || VEC_NEON
            case 3: tile<R, 3>(a, rs, ks, k0, k1, b, ldb, c, ldc, more); break;
            default: tile<R, 4>(a, rs, ks, k0, k1, b, ldb, c, ldc, more); break;
#endif
        }
        b += now * W;
        c += now * W;
        left -= now;
    }
}

// A head's vector of one token, rotated and scaled, in f32; then zeros up to `padded`
template <class T>
inline void load_rotated(const T* p, const float* cosine, const float* sine, int dim, int padded, float scale, float* to) {
    const int half = dim / 2;
    const vf by = set1(scale);
    for (int d = 0; d < half; d += W) {
        const int n = least(W, half - d);
        const vf a = mul(load_part(p + d, n), by), b = mul(load_part(p + half + d, n), by);
        const vf c = load_part(cosine + d, n), s = load_part(sine + d, n);
        store_part(to + d, n, sub(mul(a, c), mul(b, s)));
        store_part(to + half + d, n, add(mul(b, c), mul(a, s)));
    }
    for (int d = dim; d < padded; ++d) to[d] = 0.0f;
}
// The gradient before the rotation, from the one after it
template <class T>
inline void store_unrotated(const float* from, const float* cosine, const float* sine, int dim, float scale, T* p) {
    const int half = dim / 2;
    const vf by = set1(scale);
    for (int d = 0; d < half; d += W) {
        const int n = least(W, half - d);
        const vf a = mul(load_part(from + d, n), by), b = mul(load_part(from + half + d, n), by);
        const vf c = load_part(cosine + d, n), s = load_part(sine + d, n);
        store_part(p + d, n, add(mul(a, c), mul(b, s)));
        store_part(p + half + d, n, sub(mul(b, c), mul(a, s)));
    }
}
template <class T>
inline void load_plain(const T* p, int dim, int padded, float* to) {
    for (int d = 0; d < dim; d += W) store_part(to + d, least(W, dim - d), load_part(p + d, least(W, dim - d)));
    for (int d = dim; d < padded; ++d) to[d] = 0.0f;
}
// to[columns][QUERIES] = from[rows][columns], both multiples of 16
inline void turn(const float* from, int rows, int columns, float* to) {
    for (int r = 0; r < rows; r += 16) {
#if VEC_AVX512
        for (int d = 0; d < columns; d += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + (size_t)(r + i) * columns + d);
            transpose16(x);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (size_t)(d + i) * QUERIES + r, x[i]);
        }
#else
        for (int d = 0; d < columns; ++d) {
            for (int i = r; i < r + 16; ++i) to[(size_t)d * QUERIES + i] = from[(size_t)i * columns + d];
        }
#endif
    }
}
// Queries before a key do not see it: the first `before` scores of a row become minus infinity. Returns where vectors begin that hold others.
inline int hide(float* row, int before, int width) {
    if (before <= 0) return 0;
    const int first = least(before / W * W, width);
    for (int c = 0; c < first; c += W) store(row + c, set1(-INFINITY));
    if (first < width) store(row + first, add(load(row + first), keep_first(set1(-INFINITY), before - first, 0.0f)));
    return first;
}
// What the next head reads and writes is asked for while this one is computed: from token to token it is a page or so, where the processor
// itself foresees nothing. Inlined by force: a function that only asks is to GCC one that does nothing, and its calls go.
template <class T>
__attribute__((always_inline)) inline void ask(const T* p, int n) {
    for (const char* line = (const char*)((uintptr_t)p & ~(uintptr_t)63); line < (const char*)(p + n); line += 64) __builtin_prefetch(line, 0, 2);
}
// Tokens [from, to) of a document: of a query head what is read and written, or of its keys and values
template <class T>
__attribute__((always_inline)) inline void ask_head(const AttendDocument& t, int head, int from, int to) {
    const size_t at = (size_t)head * t.head_dim, token = (size_t)(t.heads + 2 * t.kv_heads) * t.head_dim, out_token = (size_t)t.heads * t.head_dim;
    for (int i = from; i < least(to, t.tokens); ++i) {
        ask((const T*)t.qkv + i * token + at, t.head_dim);
        ask((const T*)t.out + i * out_token + at, t.head_dim);
        if (!t.d_qkv) continue;
        ask((const T*)t.d_out + i * out_token + at, t.head_dim);
        ask((const T*)t.d_qkv + i * token + at, t.head_dim);
    }
}
template <class T>
__attribute__((always_inline)) inline void ask_keys(const AttendDocument& t, int from, int to) {
    const size_t at = (size_t)(t.heads + t.kv_head) * t.head_dim, token = (size_t)(t.heads + 2 * t.kv_heads) * t.head_dim;
    const size_t v = (size_t)t.kv_heads * t.head_dim;
    for (int i = from; i < least(to, t.tokens); ++i) {
        ask((const T*)t.qkv + i * token + at, t.head_dim);
        ask((const T*)t.qkv + i * token + at + v, t.head_dim);
        if (!t.d_qkv) continue;
        ask((const T*)t.d_qkv + i * token + at, t.head_dim);
        ask((const T*)t.d_qkv + i * token + at + v, t.head_dim);
    }
}
inline void clear(float* p, size_t n) { memset(p, 0, n * sizeof(float)); }

struct Cut {  // what both directions share
    int n, keys, padded;  // tokens, tokens rounded up to 64, head_dim rounded up
    size_t token, out_token;  // elements from token to token
    float scale;
    explicit Cut(const AttendDocument& t)
        : n(t.tokens), keys(up_to(t.tokens, 64)), padded(up_to(t.head_dim, 16)),
          token((size_t)(t.heads + 2 * t.kv_heads) * (size_t)t.head_dim), out_token((size_t)t.heads * (size_t)t.head_dim),
          scale(1.0f / sqrtf((float)t.head_dim)) {}
};

template <class T>
void attend(const AttendDocument& t, float* room) {
    const Cut c(t);
    const int half = t.head_dim / 2, keys = c.n + TALL;
    float *k = room, *v = k + (size_t)keys * c.padded;              // [keys][padded]
    float* q = v + (size_t)keys * c.padded;                         // [QUERIES][padded]
    float* qt = q + QUERIES * c.padded;                             // [padded][QUERIES]
    float* o = qt + QUERIES * c.padded;                             // [QUERIES][padded]
    float* s = o + QUERIES * c.padded;                              // [keys][QUERIES]
    alignas(64) float top[QUERIES], total[QUERIES];
    const T* k_from = (const T*)t.qkv + (size_t)(t.heads + t.kv_head) * t.head_dim;
    const T* v_from = k_from + (size_t)t.kv_heads * t.head_dim;
    for (int i = 0; i < c.n; ++i) {
        const size_t at = (size_t)i * half;
        load_rotated(k_from + i * c.token, t.cosine + at, t.sine + at, t.head_dim, c.padded, 1.0f, k + (size_t)i * c.padded);
        load_plain(v_from + i * c.token, t.head_dim, c.padded, v + (size_t)i * c.padded);
    }
    clear(k + (size_t)c.n * c.padded, (size_t)TALL * c.padded);
    for (int h = t.first; h < t.last; ++h) {
        const T* q_from = (const T*)t.qkv + (size_t)h * t.head_dim;
        T* to = (T*)t.out + (size_t)h * t.head_dim;
        float* lse = t.lse + (size_t)h * t.lse_stride;
        const bool last = h + 1 == t.last;
        const AttendDocument* next = last ? t.next : &t;
        for (int i0 = 0; i0 < c.n; i0 += QUERIES) {
            const int rows = least(QUERIES, c.n - i0), width = up_to(rows, 16), seen = i0 + rows;
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                load_rotated(q_from + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, q + r * c.padded);
            }
            clear(q + rows * c.padded, (size_t)(width - rows) * c.padded);
            turn(q, width, c.padded, qt);
            for (int x = 0; x < width; x += W) {
                store(top + x, set1(-INFINITY));
                store(total + x, zero());
            }
            for (int j = 0; j < seen; j += TALL) {
                const int from = most(0, j - i0) / 16 * 16;  // queries before it see none of these keys
                tiles<TALL>(k + (size_t)j * c.padded, c.padded, 1, 0, t.head_dim, qt + from, QUERIES, width - from, s + (size_t)j * QUERIES + from, QUERIES, false);
                float* some = s + (size_t)j * QUERIES;
                for (int i = 0; i < TALL; ++i) hide(some + i * QUERIES, j + i - i0, width);
                for (int x = 0; x < width; x += W) {
                    vf m = load(top + x);
                    for (int i = 0; i < TALL; ++i) m = maximum(load(some + i * QUERIES + x), m);
                    store(top + x, m);
                }
                if (next) ask_head<T>(*next, last ? next->first : h + 1, i0 + j, least(i0 + j + TALL, i0 + QUERIES));
            }
            for (int j = 0; j < seen; ++j) {
                float* row = s + (size_t)j * QUERIES;
                const int first = most(0, j - i0) / W * W;
                for (int x = 0; x < first; x += W) store(row + x, zero());
                for (int x = first; x < width; x += W) {
                    const vf e = exp2v(sub(load(row + x), load(top + x)));
                    store(row + x, e);
                    store(total + x, add(load(total + x), e));
                }
            }
            for (int r = 0; r < rows; r += TALL) {
                tiles<TALL>(s + r, 1, QUERIES, 0, least(i0 + r + TALL, seen), v, c.padded, c.padded, o + r * c.padded, c.padded, false);
                if (next && last) ask_keys<T>(*next, i0 + r, least(i0 + r + TALL, i0 + QUERIES));
            }
            for (int r = 0; r < rows; ++r) {
                lse[i0 + r] = top[r] + log2f(total[r]);
                const vf under = set1(1.0f / total[r]);
                for (int d = 0; d < t.head_dim; d += W) {
                    store_part(to + (size_t)(i0 + r) * c.out_token + d, least(W, t.head_dim - d), mul(load(o + r * c.padded + d), under));
                }
            }
        }
    }
}

// FlashAttention's backward (arXiv 2205.14135, appendix B): P again from the sums; dV = P' dO; dS = P (dO V' - delta); dQ = dS K; dK = dS' Q
template <class T>
void attend_backward(const AttendDocument& t, float* room) {
    const Cut c(t);
    const int half = t.head_dim / 2, keys = c.n + TALL;
    const size_t all = (size_t)keys * c.padded, some = (size_t)QUERIES * c.padded;
    float *k = room, *v = k + all, *dk = v + all, *dv = dk + all;         // [keys][padded]
    float *q = dv + all, *g = q + some, *qt = g + some, *gt = qt + some;  // [QUERIES][padded], and transposed
    float *x = gt + some, *p = x + some;                                  // [QUERIES][padded], [TALL][QUERIES]
    float* s = p + TALL * QUERIES;                                        // [keys][QUERIES]
    alignas(64) float shift[QUERIES], delta[QUERIES];
    const size_t k_at = (size_t)(t.heads + t.kv_head) * t.head_dim, v_at = k_at + (size_t)t.kv_heads * t.head_dim;
    const T* qkv = (const T*)t.qkv;
    T* d_qkv = (T*)t.d_qkv;
    for (int i = 0; i < c.n; ++i) {
        const size_t at = (size_t)i * half;
        load_rotated(qkv + k_at + i * c.token, t.cosine + at, t.sine + at, t.head_dim, c.padded, 1.0f, k + (size_t)i * c.padded);
        load_plain(qkv + v_at + i * c.token, t.head_dim, c.padded, v + (size_t)i * c.padded);
    }
    clear(k + (size_t)c.n * c.padded, (size_t)TALL * c.padded);
    clear(v + (size_t)c.n * c.padded, (size_t)TALL * c.padded);
    clear(dk, 2 * all);
    for (int h = t.first; h < t.last; ++h) {
        const size_t q_at = (size_t)h * t.head_dim;
        const float* lse = t.lse + (size_t)h * t.lse_stride;
        const bool last = h + 1 == t.last;
        const AttendDocument* next = last ? t.next : &t;
        for (int i0 = 0; i0 < c.n; i0 += QUERIES) {
            const int rows = least(QUERIES, c.n - i0), width = up_to(rows, 16), seen = i0 + rows;
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                load_rotated(qkv + q_at + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, q + r * c.padded);
                load_plain((const T*)t.d_out + q_at + i * c.out_token, t.head_dim, c.padded, g + r * c.padded);
                const T* out = (const T*)t.out + q_at + i * c.out_token;
                vf both = zero();
                for (int d = 0; d < t.head_dim; d += W) both = fma(load_part(out + d, t.head_dim - d), load(g + r * c.padded + d), both);
                delta[r] = sum(both);
                shift[r] = lse[i];
            }
            clear(q + rows * c.padded, (size_t)(width - rows) * c.padded);
            clear(g + rows * c.padded, (size_t)(width - rows) * c.padded);
            clear(delta + rows, (size_t)(width - rows));
            clear(shift + rows, (size_t)(width - rows));
            turn(q, width, c.padded, qt);
            turn(g, width, c.padded, gt);
            for (int j = 0; j < seen; j += TALL) {
                const int first = most(0, j - i0), from = first / 16 * 16;  // queries before it see none of these keys
                const size_t at = (size_t)j * c.padded;
                float* ds = s + (size_t)j * QUERIES;
                tiles<TALL>(k + at, c.padded, 1, 0, t.head_dim, qt + from, QUERIES, width - from, p + from, QUERIES, false);
                tiles<TALL>(v + at, c.padded, 1, 0, t.head_dim, gt + from, QUERIES, width - from, ds + from, QUERIES, false);
                for (int i = 0; i < TALL; ++i) {
                    float *pr = p + i * QUERIES, *sr = ds + i * QUERIES;
                    const int begin = hide(pr, j + i - i0, width);
                    for (int y = 0; y < begin; y += W) {
                        store(pr + y, zero());
                        store(sr + y, zero());
                    }
                    for (int y = begin; y < width; y += W) {
                        const vf e = exp2v(sub(load(pr + y), load(shift + y)));
                        store(pr + y, e);
                        store(sr + y, mul(e, sub(load(sr + y), load(delta + y))));
                    }
                }
                tiles<TALL>(ds, QUERIES, 1, first, rows, q, c.padded, c.padded, dk + at, c.padded, true);
                tiles<TALL>(p, QUERIES, 1, first, rows, g, c.padded, c.padded, dv + at, c.padded, true);
                if (next) ask_head<T>(*next, last ? next->first : h + 1, i0 + j, least(i0 + j + TALL, i0 + QUERIES));
            }
            for (int r = 0; r < rows; r += TALL) {
                tiles<TALL>(s + r, 1, QUERIES, 0, least(i0 + r + TALL, seen), k, c.padded, c.padded, x + r * c.padded, c.padded, false);
                if (next && last) ask_keys<T>(*next, i0 + r, least(i0 + r + TALL, i0 + QUERIES));
            }
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                store_unrotated(x + r * c.padded, t.cosine + i * half, t.sine + i * half, t.head_dim, c.scale, d_qkv + q_at + i * c.token);
            }
        }
    }
    for (int i = 0; i < c.n; ++i) {  // q held log2(e) too: taken out again
        const size_t at = (size_t)i * half;
        store_unrotated(dk + (size_t)i * c.padded, t.cosine + at, t.sine + at, t.head_dim, LN2, d_qkv + k_at + i * c.token);
        for (int d = 0; d < t.head_dim; d += W) {
            store_part(d_qkv + v_at + i * c.token + d, least(W, t.head_dim - d), load(dv + (size_t)i * c.padded + d));
        }
    }
}

// As the loop in train/optim.py, its slow twin, up to rounding
template <class T>
void adamw(float* master, float* first, float* second, float* grad, void* parameter, int n, const AdamStep& s) {
    T* p = (T*)parameter;
    const vf factor = set1(s.factor), keep = set1(1.0f - s.rate * s.decay), b1 = set1(1.0f - s.beta1), b2 = set1(s.beta2), rest2 = set1(1.0f - s.beta2);
    const vf under = set1(s.correct2), eps = set1(s.eps), rate = set1(-s.rate / s.correct1);
    for (int i = 0; i < n; i += W) {
        const int here = n - i;
        const vf g = mul(load_part(grad + i, here), factor);
        const vf m0 = load_part(first + i, here), m = fma(b1, sub(g, m0), m0);
        const vf v = fma(mul(g, g), rest2, mul(load_part(second + i, here), b2));
        const vf step = divide(m, add(root(divide(v, under)), eps));
        const vf w = fma(step, rate, mul(load_part(master + i, here), keep));
        store_part(first + i, here, m);
        store_part(second + i, here, v);
        store_part(master + i, here, w);
        store_part(p + i, here, w);
        store_part(grad + i, here, zero());
    }
}

double squares(const float* x, int n) {  // in f32 within 16 vectors, beyond them in f64
    double total = 0;
    for (int i = 0; i < n; i += 16 * W) {
        vf s = zero();
        for (int j = i; j < least(n, i + 16 * W); j += W) {
            const vf a = load_part(x + j, n - j);
            s = fma(a, a, s);
        }
        total += (double)sum(s);
    }
    return total;
}

const TrainKernels tables[2] = {
    {norm<float>, norm_backward<float>, swiglu<float>, swiglu_backward<float>, cross_entropy<float>, attend<float>, attend_backward<float>,
     adamw<float>, squares},
    {norm<uint16_t>, norm_backward<uint16_t>, swiglu<uint16_t>, swiglu_backward<uint16_t>, cross_entropy<uint16_t>, attend<uint16_t>,
     attend_backward<uint16_t>, adamw<uint16_t>, squares},
};

}  // namespace
}  // namespace criadero
