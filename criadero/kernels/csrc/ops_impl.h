// Norms, rotary embedding, SwiGLU and adapters, included by ops_*.cpp (see vec.h on linkage). Each row is computed by itself, its sums in an
// order that depends on its length only.
#pragma once
#include "attention_impl.h"
#include "ops.h"
#include "vec.h"

namespace criadero {
namespace {

void rmsnorm(const float* x, const float* w, float eps, int n, float* y) {
    vf sums[4] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int j = 0; j < 4; ++j) {
            const vf v = load(x + i + j * W);
            sums[j] = fma(v, v, sums[j]);
        }
    }
    for (; i < n; i += W) {
        const vf v = load_first(x + i, least(W, n - i), 0.0f);
        sums[0] = fma(v, v, sums[0]);
    }
    const float mean = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / (float)n;
    const vf scale = set1(1.0f / sqrtf(mean + eps));
    for (i = 0; i + W <= n; i += W) store(y + i, mul(load(w + i), mul(load(x + i), scale)));
    if (i < n) store_first(y + i, n - i, mul(load_first(w + i, n - i, 0.0f), mul(load_first(x + i, n - i, 0.0f), scale)));
}

void rotate(float* x, int heads, int head_dim, const float* cosine, const float* sine) {
    const int half = head_dim / 2;
    for (int h = 0; h < heads; ++h, x += head_dim) {
        for (int d = 0; d < half; d += W) {
            const int n = least(W, half - d);
            const vf a = load_first(x + d, n, 0.0f), b = load_first(x + half + d, n, 0.0f);
            const vf c = load_first(cosine + d, n, 0.0f), s = load_first(sine + d, n, 0.0f);
            store_first(x + d, n, sub(mul(a, c), mul(b, s)));
            store_first(x + half + d, n, add(mul(b, c), mul(a, s)));
        }
    }
}

void swiglu(const float* gate, const float* up, int n, float* y) {
    for (int i = 0; i < n; i += W) {
        const int m = least(W, n - i);
        const vf g = load_first(gate + i, m, 0.0f), u = load_first(up + i, m, 0.0f);
        // g / (1 + e^-g): at most 2^126 below the line, which makes it 0 far to the left
        const vf e = exp2v(minimum(mul(g, set1(-1.44269504f)), set1(126.0f)));
        store_first(y + i, m, mul(divide(g, add(set1(1.0f), e)), u));
    }
}

// The dot products of x with R rows of a
template <int R>
inline void dots(const float* x, const float* a, int columns, float* u) {
    vf sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for (int k = 0; k < columns; k += W) {
        const int n = least(W, columns - k);
        const vf v = load_first(x + k, n, 0.0f);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = fma(v, load_first(a + (size_t)r * columns + k, n, 0.0f), sums[r]);
    }
    for (int r = 0; r < R; ++r) u[r] = sum(sums[r]);
}

void lora_down(const float* x, const float* a, int rank, int columns, float* u) {
    int r = 0;
    for (; r + 8 <= rank; r += 8) dots<8>(x, a + (size_t)r * columns, columns, u + r);
    for (; r < rank; ++r) dots<1>(x, a + (size_t)r * columns, columns, u + r);
}

void lora_up(const float* u, const float* b, int rank, size_t stride, int first, int last, float* y) {
    for (int n = first; n < last; n += W) {
        const int m = least(W, last - n);
        vf total = zero();
        for (int r = 0; r < rank; ++r) total = fma(set1(u[r]), load_first(b + (size_t)r * stride + n, m, 0.0f), total);
        store_first(y + n, m, add(load_first(y + n, m, 0.0f), total));
    }
}

const OpsKernels table = {rmsnorm, rotate, swiglu, lora_down, lora_up, write_kv, attend, merge};

}  // namespace
}  // namespace criadero
