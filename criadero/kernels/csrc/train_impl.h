// Norms, SwiGLU, cross-entropy and attention of training, included by train_*.cpp (see vec.h on linkage). Everything is computed in an
// order that depends on the sizes only, so that a run that is repeated or resumed ends bit for bit the same.
#pragma once
#include "train.h"
#include "vec.h"

namespace criadero {
namespace {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr int QUERIES = 64;  // query rows that are worked on together

inline vf load_any(const float* p) { return load(p); }
inline vf load_any(const uint16_t* p) { return load_bf16(p); }
inline void store_any(float* p, vf a) { store(p, a); }
inline void store_any(uint16_t* p, vf a) {  // to nearest, ties to even; NaN stays NaN
#if VEC_AVX512
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
#else
    float all[W];
    store(all, a);
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(all[i]);
#endif
}
template <class T>
inline vf load_part(const T* p, int n) {  // the first n, then zeros
    if (n >= W) return load_any(p);
    T all[W] = {};
    for (int i = 0; i < n; ++i) all[i] = p[i];
    return load_any(all);
}
template <class T>
inline void store_part(T* p, int n, vf a) {
    if (n >= W) return store_any(p, a);
    T all[W];
    store_any(all, a);
    for (int i = 0; i < n; ++i) p[i] = all[i];
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
// Scores are kept in units of log2, so that softmax needs exp2 alone. All scratch is f32; leading sizes are multiples of 64 keys and 16
// columns, filled up with zeros.

inline int up_to(int n, int step) { return (n + step - 1) / step * step; }

// c[4][NV * W] (+)= sum over k0 <= k < k1 of a(row, k) * b[k]
template <int NV>
inline void tile(const float* a, size_t rs, size_t ks, int k0, int k1, const float* b, size_t ldb, float* c, size_t ldc, bool more) {
    vf s[4][NV];
    for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < NV; ++j) s[r][j] = more ? load(c + r * ldc + j * W) : zero();
    }
    for (int k = k0; k < k1; ++k) {
        vf v[NV];
        for (int j = 0; j < NV; ++j) v[j] = load(b + k * ldb + j * W);
        for (int r = 0; r < 4; ++r) {
            const vf x = set1(a[r * rs + k * ks]);
            for (int j = 0; j < NV; ++j) s[r][j] = fma(x, v[j], s[r][j]);
        }
    }
    for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < NV; ++j) store(c + r * ldc + j * W, s[r][j]);
    }
}

#if VEC_AVX512 || VEC_NEON
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif

// Four rows, `columns` (a multiple of 16) columns
inline void four_rows(const float* a, size_t rs, size_t ks, int k0, int k1, const float* b, size_t ldb, int columns, float* c, size_t ldc,
                      bool more) {
    int n = 0;
    for (; n + WIDE * W <= columns; n += WIDE * W) tile<WIDE>(a, rs, ks, k0, k1, b + n, ldb, c + n, ldc, more);
    for (; n < columns; n += W) tile<1>(a, rs, ks, k0, k1, b + n, ldb, c + n, ldc, more);
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
inline void scatter_column(const float* from, int padded, float* to, size_t stride) {
    for (int d = 0; d < padded; ++d) to[d * stride] = from[d];
}
inline void clear(float* p, size_t n) { memset(p, 0, n * sizeof(float)); }

struct Cut {  // what both directions share
    int n, keys, padded;  // tokens, tokens rounded up, head_dim rounded up
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
    const int half = t.head_dim / 2;
    float* kt = room;                                   // [padded][keys]
    float* v = kt + (size_t)c.padded * c.keys;          // [keys][padded]
    float* q = v + (size_t)c.padded * c.keys;           // [QUERIES][padded]
    float* o = q + QUERIES * c.padded;                  // [QUERIES][padded]
    float* s = o + QUERIES * c.padded;                  // [QUERIES][keys]
    float* row = s + (size_t)QUERIES * c.keys;          // [padded]
    const T* k_from = (const T*)t.qkv + (size_t)(t.heads + t.kv_head) * t.head_dim;
    const T* v_from = k_from + (size_t)t.kv_heads * t.head_dim;
    clear(kt, (size_t)c.padded * c.keys);
    for (int i = 0; i < c.n; ++i) {
        load_rotated(k_from + i * c.token, t.cosine + (size_t)i * half, t.sine + (size_t)i * half, t.head_dim, c.padded, 1.0f, row);
        scatter_column(row, c.padded, kt + i, c.keys);
        load_plain(v_from + i * c.token, t.head_dim, c.padded, v + (size_t)i * c.padded);
    }
    clear(v + (size_t)c.n * c.padded, (size_t)(c.keys - c.n) * c.padded);
    for (int h = t.first; h < t.last; ++h) {
        const T* q_from = (const T*)t.qkv + (size_t)h * t.head_dim;
        T* to = (T*)t.out + (size_t)h * t.head_dim;
        float* lse = t.lse + (size_t)h * t.lse_stride;
        for (int i0 = 0; i0 < c.n; i0 += QUERIES) {
            const int rows = least(QUERIES, c.n - i0), fours = up_to(rows, 4), seen = i0 + QUERIES;
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                load_rotated(q_from + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, q + r * c.padded);
            }
            clear(q + rows * c.padded, (size_t)(fours - rows) * c.padded);
            for (int r = 0; r < fours; r += 4) four_rows(q + r * c.padded, c.padded, 1, 0, c.padded, kt, c.keys, seen, s + (size_t)r * c.keys, c.keys, false);
            for (int r = 0; r < rows; ++r) {
                float* p = s + (size_t)r * c.keys;
                const int valid = i0 + r + 1;
                vf top = set1(-INFINITY);
                int j = 0;
                for (; j + W <= valid; j += W) top = maximum(load(p + j), top);
                if (j < valid) top = maximum(load_first(p + j, valid - j, -INFINITY), top);
                const float m = largest(top);
                const vf shift = set1(m);
                vf total = zero();
                for (j = 0; j + W <= valid; j += W) {
                    const vf e = exp2v(sub(load(p + j), shift));
                    store(p + j, e);
                    total = add(total, e);
                }
                if (j < valid) {
                    const vf e = exp2v(sub(load_first(p + j, valid - j, -INFINITY), shift));
                    store(p + j, e);
                    total = add(total, e);
                    j += W;
                }
                for (; j < seen; j += W) store(p + j, zero());
                const float z = sum(total);
                lse[i0 + r] = m + log2f(z);
                o[r * c.padded] = 1.0f / z;  // kept until the product below, which this row's four start over
            }
            for (int r = 0; r < fours; r += 4) {
                float under[4];
                for (int i = 0; i < 4; ++i) under[i] = r + i < rows ? o[(r + i) * c.padded] : 0.0f;
                four_rows(s + (size_t)r * c.keys, c.keys, 1, 0, i0 + r + 4, v, c.padded, c.padded, o + r * c.padded, c.padded, false);
                for (int i = 0; i < 4 && r + i < rows; ++i) {
                    for (int d = 0; d < t.head_dim; d += W) {
                        const int n = least(W, t.head_dim - d);
                        store_part(to + (size_t)(i0 + r + i) * c.out_token + d, n, mul(load(o + (r + i) * c.padded + d), set1(under[i])));
                    }
                }
            }
        }
    }
}

// FlashAttention's backward (arXiv 2205.14135, appendix B): P again from the sums; dV = P' dO; dS = P (dO V' - delta); dQ = dS K; dK = dS' Q
template <class T>
void attend_backward(const AttendDocument& t, float* room) {
    const Cut c(t);
    const int half = t.head_dim / 2;
    const size_t all = (size_t)c.padded * c.keys, some = (size_t)QUERIES * c.padded;
    float *kt = room, *vt = kt + all;                   // [padded][keys]
    float *k = vt + all, *dk = k + all, *dv = dk + all; // [keys][padded]
    float *q = dv + all, *g = q + some, *x = g + some;  // [QUERIES][padded]
    float *p = x + some, *s = p + (size_t)QUERIES * c.keys;  // [QUERIES][keys]
    float *row = s + (size_t)QUERIES * c.keys, *delta = row + c.padded;
    const size_t k_at = (size_t)(t.heads + t.kv_head) * t.head_dim, v_at = k_at + (size_t)t.kv_heads * t.head_dim;
    const T* qkv = (const T*)t.qkv;
    T* d_qkv = (T*)t.d_qkv;
    clear(kt, 2 * all);
    for (int i = 0; i < c.n; ++i) {
        const size_t at = (size_t)i * half;
        load_rotated(qkv + k_at + i * c.token, t.cosine + at, t.sine + at, t.head_dim, c.padded, 1.0f, k + (size_t)i * c.padded);
        scatter_column(k + (size_t)i * c.padded, c.padded, kt + i, c.keys);
        load_plain(qkv + v_at + i * c.token, t.head_dim, c.padded, row);
        scatter_column(row, c.padded, vt + i, c.keys);
    }
    clear(k + (size_t)c.n * c.padded, (size_t)(c.keys - c.n) * c.padded);
    clear(dk, 2 * all);
    for (int h = t.first; h < t.last; ++h) {
        const size_t q_at = (size_t)h * t.head_dim;
        const float* lse = t.lse + (size_t)h * t.lse_stride;
        for (int i0 = 0; i0 < c.n; i0 += QUERIES) {
            const int rows = least(QUERIES, c.n - i0), fours = up_to(rows, 4), seen = i0 + QUERIES;
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                load_rotated(qkv + q_at + i * c.token, t.cosine + i * half, t.sine + i * half, t.head_dim, c.padded, c.scale * LOG2E, q + r * c.padded);
                load_plain((const T*)t.d_out + q_at + i * c.out_token, t.head_dim, c.padded, g + r * c.padded);
                load_plain((const T*)t.out + q_at + i * c.out_token, t.head_dim, c.padded, row);
                vf both = zero();
                for (int d = 0; d < c.padded; d += W) both = fma(load(row + d), load(g + r * c.padded + d), both);
                delta[r] = sum(both);
            }
            clear(q + rows * c.padded, (size_t)(fours - rows) * c.padded);
            clear(g + rows * c.padded, (size_t)(fours - rows) * c.padded);
            for (int r = 0; r < fours; r += 4) {
                four_rows(q + r * c.padded, c.padded, 1, 0, c.padded, kt, c.keys, seen, p + (size_t)r * c.keys, c.keys, false);
                four_rows(g + r * c.padded, c.padded, 1, 0, c.padded, vt, c.keys, seen, s + (size_t)r * c.keys, c.keys, false);
            }
            for (int r = 0; r < fours; ++r) {
                float *pr = p + (size_t)r * c.keys, *sr = s + (size_t)r * c.keys;
                const int valid = r < rows ? i0 + r + 1 : 0;
                const vf shift = set1(r < rows ? lse[i0 + r] : 0.0f), less = set1(r < rows ? delta[r] : 0.0f);
                int j = 0;
                for (; j + W <= valid; j += W) {
                    const vf e = exp2v(sub(load(pr + j), shift));
                    store(pr + j, e);
                    store(sr + j, mul(e, sub(load(sr + j), less)));
                }
                if (j < valid) {
                    const vf e = exp2v(sub(load_first(pr + j, valid - j, -INFINITY), shift));
                    store(pr + j, e);
                    store(sr + j, mul(e, sub(load_first(sr + j, valid - j, 0.0f), less)));
                    j += W;
                }
                for (; j < seen; j += W) {
                    store(pr + j, zero());
                    store(sr + j, zero());
                }
            }
            for (int r = 0; r < fours; r += 4) {
                four_rows(s + (size_t)r * c.keys, c.keys, 1, 0, i0 + r + 4, k, c.padded, c.padded, x + r * c.padded, c.padded, false);
            }
            for (int r = 0; r < rows; ++r) {
                const size_t i = (size_t)(i0 + r);
                store_unrotated(x + r * c.padded, t.cosine + i * half, t.sine + i * half, t.head_dim, c.scale, d_qkv + q_at + i * c.token);
            }
            for (int j = 0; j < i0 + fours; j += 4) {  // keys j to j + 3: rows before j see none of them
                const int from = most(0, j - i0);
                four_rows(s + j, 1, c.keys, from, fours, q, c.padded, c.padded, dk + (size_t)j * c.padded, c.padded, true);
                four_rows(p + j, 1, c.keys, from, fours, g, c.padded, c.padded, dv + (size_t)j * c.padded, c.padded, true);
            }
        }
    }
    for (int i = 0; i < c.n; ++i) {  // q held log2(e) too: taken out again
        const size_t at = (size_t)i * half;
        store_unrotated(dk + (size_t)i * c.padded, t.cosine + at, t.sine + at, t.head_dim, LN2, d_qkv + k_at + i * c.token);
        for (int d = 0; d < t.head_dim; d += W) {
            const int n = least(W, t.head_dim - d);
            store_part(d_qkv + v_at + i * c.token + d, n, load(dv + (size_t)i * c.padded + d));
        }
    }
}

const TrainKernels tables[2] = {
    {norm<float>, norm_backward<float>, swiglu<float>, swiglu_backward<float>, cross_entropy<float>, attend<float>, attend_backward<float>},
    {norm<uint16_t>, norm_backward<uint16_t>, swiglu<uint16_t>, swiglu_backward<uint16_t>, cross_entropy<uint16_t>, attend<uint16_t>,
     attend_backward<uint16_t>},
};

}  // namespace
}  // namespace criadero
