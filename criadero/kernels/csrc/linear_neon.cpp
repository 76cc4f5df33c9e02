// The linear kernels for AArch64 with the dot product extension (every Apple M, and most servers and phones since 2018): `sdot` adds four
// products of signed bytes to each int32. A tile's 16 outputs are four quarters of 4; 32 registers hold the sums of 4 rows.
#include "linear.h"
#include "vec.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

namespace criadero {

namespace {

#define UNROLL _Pragma("GCC unroll 16")

inline int8x16_t four(const int8_t* p) { return vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t*)(const void*)p)); }

inline float32x4_t half4(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

// whole[quarter][m] += products of COLUMNS columns of signed weights.
template <Kind KIND, int M, int COLUMNS>
inline void dots(const uint8_t* p, const int8_t* q, int32x4_t (*whole)[M]) {
    if (KIND == Kind::int8) {
        UNROLL
        for (int j = 0; j < COLUMNS / 4; ++j) {
            int8x16_t x[M];
            UNROLL
            for (int m = 0; m < M; ++m) x[m] = four(q + m * SLICE + 4 * j);
            UNROLL
            for (int h = 0; h < 4; ++h) {
                const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 64 * j + 16 * h), vdupq_n_u8(0x80)));
                UNROLL
                for (int m = 0; m < M; ++m) whole[h][m] = vdotq_s32(whole[h][m], w, x[m]);
            }
        }
        return;
    }
    const int8x16_t zero = vdupq_n_s8(KIND == Kind::int4 ? 8 : 0);
    UNROLL
    for (int j = 0; j < COLUMNS / 8; ++j) {
        int8x16_t left[M], right[M];
        UNROLL
        for (int m = 0; m < M; ++m) {
            left[m] = four(q + m * SLICE + 8 * j);
            right[m] = four(q + m * SLICE + 8 * j + 4);
        }
        UNROLL
        for (int h = 0; h < 4; ++h) {
            const uint8x16_t both = vld1q_u8(p + 64 * j + 16 * h);
            const int8x16_t low = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), zero);
            const int8x16_t high = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), zero);
            UNROLL
            for (int m = 0; m < M; ++m) whole[h][m] = vdotq_s32(vdotq_s32(whole[h][m], low, left[m]), high, right[m]);
        }
    }
}

template <int M>
inline void clear(int32x4_t (*whole)[M]) {
    UNROLL
    for (int h = 0; h < 4; ++h) {
        UNROLL
        for (int m = 0; m < M; ++m) whole[h][m] = vdupq_n_s32(0);
    }
}

// f[quarter][m] += whole x scale, and what the mins take away; `eights` are -8 x the sums of the activations.
template <Kind KIND, int M>
inline void add_group(int32x4_t (*whole)[M], const uint8_t* scales, const uint8_t* mins, const int32_t* eights, float32x4_t (*f)[M]) {
    UNROLL
    for (int h = 0; h < 4; ++h) {
        const float32x4_t scale = half4(scales + 8 * h);
        const float32x4_t minimum = KIND == Kind::int4_mins ? vmulq_n_f32(half4(mins + 8 * h), 0.125f) : scale;
        UNROLL
        for (int m = 0; m < M; ++m) {
            f[h][m] = vfmaq_f32(f[h][m], vcvtq_f32_s32(whole[h][m]), scale);
            if (KIND == Kind::int4_mins) f[h][m] = vfmaq_f32(f[h][m], vdupq_n_f32((float)eights[m]), minimum);
        }
    }
}

template <int M>
inline void store_tile(const Weights& w, int rows, int t, const float32x4_t (*sums)[M], float* y, size_t stride, bool add) {
    const int there = least(TILE, w.rows - t * TILE);
    for (int m = 0; m < M && m < rows; ++m) {
        float all[TILE];
        UNROLL
        for (int h = 0; h < 4; ++h) vst1q_f32(all + 4 * h, sums[h][m]);
        float* to = y + (size_t)m * stride + (size_t)t * TILE;
        for (int r = 0; r < there; ++r) to[r] = add ? to[r] + all[r] : all[r];
    }
}

// One tile for rows [row, row + M) of the block.
template <Kind KIND, int GROUP, int M>
void quantised(const Weights& w, const Block& b, int t, int row, float* y, size_t stride, bool add) {
    constexpr int STEP = KIND == Kind::int8 ? 512 : 256;  // bytes of a slice
    const uint8_t* tile = w.data + (size_t)t * w.tile_bytes;
    float32x4_t sums[4][M];
    UNROLL
    for (int h = 0; h < 4; ++h) {
        UNROLL
        for (int m = 0; m < M; ++m) sums[h][m] = vdupq_n_f32(0);
    }
    for (int from = 0, span = 0; from < w.padded; from += SPAN, ++span) {
        const int slices = least(SPAN, w.padded - from) / SLICE;
        const uint8_t* p = tile + (size_t)span * w.span_bytes;
        const uint8_t* scales = p + slices * STEP;
        const uint8_t* mins = scales + slices * (SLICE * TILE * 2 / (GROUP ? GROUP : SLICE));
        float32x4_t f[4][M];
        int32x4_t whole[4][M];
        clear<M>(whole);
        UNROLL
        for (int h = 0; h < 4; ++h) {
            UNROLL
            for (int m = 0; m < M; ++m) f[h][m] = vdupq_n_f32(0);
        }
        for (int s = 0; s < slices; ++s) {
            const int slice = from / SLICE + s;
            const int8_t* q = b.q + ((size_t)slice * b.width + row) * SLICE;
            if (GROUP == 32) {
                clear<M>(whole);
                dots<KIND, M, 32>(p + s * STEP, q, whole);
                add_group<KIND, M>(whole, scales + 32 * s, mins + 32 * s, b.sums + (size_t)slice * b.width + row, f);
            } else if (GROUP == 16) {
                UNROLL
                for (int part = 0; part < 2; ++part) {
                    clear<M>(whole);
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
        for (int h = 0; h < 4; ++h) {
            UNROLL
            for (int m = 0; m < M; ++m) {
                if (GROUP == 0) f[h][m] = vcvtq_f32_s32(whole[h][m]);
                sums[h][m] = vfmaq_f32(sums[h][m], f[h][m], vdupq_n_f32(x[m]));
            }
        }
    }
    UNROLL
    for (int h = 0; h < 4; ++h) {
        const float32x4_t scale = GROUP ? vdupq_n_f32(w.unit) : vld1q_f32((const float*)(tile + (size_t)w.padded * TILE) + 4 * h);
        UNROLL
        for (int m = 0; m < M; ++m) sums[h][m] = vmulq_f32(sums[h][m], scale);
    }
    store_tile<M>(w, b.rows - row, t, sums, y + (size_t)row * stride, stride, add);
}

template <Kind KIND, int M>
void dense(const Weights& w, const Block& b, int t, int row, float* y, size_t stride, bool add) {
    const uint8_t* p = w.data + (size_t)t * w.tile_bytes;
    float32x4_t sums[4][M];
    UNROLL
    for (int h = 0; h < 4; ++h) {
        UNROLL
        for (int m = 0; m < M; ++m) sums[h][m] = vdupq_n_f32(0);
    }
    for (int k = 0; k < w.padded; k += 2, p += KIND == Kind::bf16 ? 64 : 128) {
        const float* x = b.f32 + ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE;
        UNROLL
        for (int h = 0; h < 4; ++h) {
            float32x4_t v[2];
            if (KIND == Kind::bf16) {
                const uint32x4_t pair = vreinterpretq_u32_u8(vld1q_u8(p + 16 * h));
                v[0] = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
                v[1] = vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u)));
            } else {
                v[0] = vld1q_f32((const float*)(p + 16 * h));
                v[1] = vld1q_f32((const float*)(p + 64 + 16 * h));
            }
            UNROLL
            for (int m = 0; m < M; ++m) {
                sums[h][m] = vfmaq_n_f32(sums[h][m], v[0], x[m * SLICE]);
                sums[h][m] = vfmaq_n_f32(sums[h][m], v[1], x[m * SLICE + 1]);
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

void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    const Kernel one = kernel_of<1>(w), two = kernel_of<2>(w), quad = kernel_of<4>(w);
    for (int t = first; t < last; ++t) {
        int row = 0;
        for (; row + 4 <= b.width && row < b.rows; row += 4) quad(w, b, t, row, y, stride, add);
        for (; row + 2 <= b.width && row < b.rows; row += 2) two(w, b, t, row, y, stride, add);
        for (; row < b.rows; ++row) one(w, b, t, row, y, stride, add);
    }
}

}  // namespace

const LinearKernels& linear_neon() {
    // Preparing is a small part, and the compiler makes vectors of the plain code here.
    static const LinearKernels table{linear_portable().prepare, tiles, false, nullptr};
    return table;
}

}  // namespace criadero

#else  // compiled without the extension: cpu() does not offer the level then

namespace criadero {
const LinearKernels& linear_neon() { return linear_portable(); }
}  // namespace criadero

#endif
