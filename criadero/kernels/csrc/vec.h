// One vector of floats, for whatever the including file is compiled for: AVX-512, AVX2 with FMA and F16C, NEON, or an array.
//
// Everything here has internal linkage: files compiled with different flags include it, and the linker must never
// take the AVX-512 copy of a function for the portable one. For the same reason no std:: template may be used in such files.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VEC_AVX512 1
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own header makes "undefined" vectors from themselves, and warns about it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VEC_AVX2 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define VEC_NEON 1
#include <arm_neon.h>
#else
#define VEC_PORTABLE 1
#endif

namespace criadero {
namespace {

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // below 2^-14 the exponent is that of a subnormal: scale it as a number
    if (rest < 0x400) { float f = (float)rest * 5.9604644775390625e-8f; return sign ? -f : f; }
    return bits_to_float(sign | ((rest << 13) + 0x38000000u));
}
inline uint16_t float_to_half(float f) {  // to nearest, ties to even; above 65504 infinity
    uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000u) {  // subnormal: adding a half puts the rounded mantissa in the low bits
        float g = bits_to_float(u) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(g) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((u + 0xfffu + ((u >> 13) & 1) - 0x38000000u) >> 13));
}

#if VEC_AVX512

constexpr int W = 16;
using vf = __m512;
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline void store_half(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0)); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf divide(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf root(vf a) { return _mm512_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf minimum(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n whole; 0 far below
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float largest(vf a) { return _mm512_reduce_max_ps(a); }
inline vf keep_first(vf a, int n, float other) {  // lanes from n on become `other`; n 0..W
    return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)((1u << n) - 1), a);
}

#elif VEC_AVX2

constexpr int W = 8;
using vf = __m256;
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vf load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf load_i8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline void store_half(uint16_t* p, vf a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, 0)); }
inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf zero() { return _mm256_setzero_ps(); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf divide(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf root(vf a) { return _mm256_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf maximum(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf minimum(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf round_even(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale2(vf a, vf n) {  // for n from -126 to 127; below that 0
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    vf made = _mm256_mul_ps(a, _mm256_castsi256_ps(power));
    return _mm256_and_ps(made, _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}
inline float sum(vf a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest(vf a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline vf keep_first(vf a, int n, float other) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 mask = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), a, mask);
}

#elif VEC_NEON

constexpr int W = 4;
using vf = float32x4_t;
inline vf load(const float* p) { return vld1q_f32(p); }
inline vf load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline vf load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline vf load_i8(const int8_t* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
inline void store(float* p, vf a) { vst1q_f32(p, a); }
inline void store_half(uint16_t* p, vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
inline vf set1(float x) { return vdupq_n_f32(x); }
inline vf zero() { return vdupq_n_f32(0); }
inline vf add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf sub(vf a, vf b) { return vsubq_f32(a, b); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf divide(vf a, vf b) { return vdivq_f32(a, b); }
inline vf root(vf a) { return vsqrtq_f32(a); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf maximum(vf a, vf b) { return vmaxq_f32(a, b); }
inline vf minimum(vf a, vf b) { return vminq_f32(a, b); }
inline vf round_even(vf a) { return vrndnq_f32(a); }
inline vf scale2(vf a, vf n) {
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    vf made = vmulq_f32(a, vreinterpretq_f32_s32(power));
    return vbslq_f32(vcltq_f32(n, vdupq_n_f32(-126.0f)), vdupq_n_f32(0), made);
}
inline float sum(vf a) { return vaddvq_f32(a); }
inline float largest(vf a) { return vmaxvq_f32(a); }
inline vf keep_first(vf a, int n, float other) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lanes)), a, vdupq_n_f32(other));
}

#else

constexpr int W = 8;
struct vf { float x[W]; };
#define VEC_EACH(expression) vf r; for (int i = 0; i < W; i++) r.x[i] = (expression); return r
inline vf load(const float* p) { VEC_EACH(p[i]); }
inline vf load_half(const uint16_t* p) { VEC_EACH(half_to_float(p[i])); }
inline vf load_bf16(const uint16_t* p) { VEC_EACH(bf16_to_float(p[i])); }
inline vf load_i8(const int8_t* p) { VEC_EACH((float)p[i]); }
inline void store(float* p, vf a) { memcpy(p, a.x, sizeof a.x); }
inline void store_half(uint16_t* p, vf a) { for (int i = 0; i < W; i++) p[i] = float_to_half(a.x[i]); }
inline vf set1(float x) { VEC_EACH(x); }
inline vf zero() { VEC_EACH(0.0f); }
inline vf add(vf a, vf b) { VEC_EACH(a.x[i] + b.x[i]); }
inline vf sub(vf a, vf b) { VEC_EACH(a.x[i] - b.x[i]); }
inline vf mul(vf a, vf b) { VEC_EACH(a.x[i] * b.x[i]); }
inline vf divide(vf a, vf b) { VEC_EACH(a.x[i] / b.x[i]); }
inline vf root(vf a) { VEC_EACH(sqrtf(a.x[i])); }
// two roundings here (the file must be compiled with -ffp-contract=off): fmaf without the instruction is a slow call
inline vf fma(vf a, vf b, vf c) { VEC_EACH(a.x[i] * b.x[i] + c.x[i]); }
inline vf maximum(vf a, vf b) { VEC_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }  // of a NaN: b, as x86 does
inline vf minimum(vf a, vf b) { VEC_EACH(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
inline vf round_even(vf a) { VEC_EACH((a.x[i] + 12582912.0f) - 12582912.0f); }  // |a| below 2^22, as all callers' are
inline vf scale2(vf a, vf n) {
    VEC_EACH(n.x[i] >= -126.0f ? a.x[i] * bits_to_float((uint32_t)((int)n.x[i] + 127) << 23) : n.x[i] < -126.0f ? 0.0f : n.x[i]);
}
inline float sum(vf a) { float s = 0; for (int i = 0; i < W; i++) s += a.x[i]; return s; }
inline float largest(vf a) { float m = a.x[0]; for (int i = 1; i < W; i++) m = a.x[i] > m ? a.x[i] : m; return m; }
inline vf keep_first(vf a, int n, float other) { VEC_EACH(i < n ? a.x[i] : other); }
#undef VEC_EACH

#endif

// The first n floats (1..W), the rest as `other`, without reading beyond them.
inline vf load_first(const float* p, int n, float other) {
#if VEC_AVX512
    return _mm512_mask_loadu_ps(_mm512_set1_ps(other), (__mmask16)((1u << n) - 1), p);
#else
    if (n == W) return load(p);
    float all[W];
    for (int i = 0; i < W; i++) all[i] = i < n ? p[i] : other;
    return load(all);
#endif
}
inline void store_first(float* p, int n, vf a) {
#if VEC_AVX512
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
#else
    if (n == W) return store(p, a);
    float all[W];
    store(all, a);
    for (int i = 0; i < n; i++) p[i] = all[i];
#endif
}

// 2^x, relative error below 2e-7; exactly 1 at 0 and exactly 0 from -127 down (so also at minus infinity). x <= 127.
inline vf exp2v(vf x) {
    x = maximum(set1(-200.0f), x);  // in this order a NaN stays NaN, here and below
    vf n = round_even(x);
    vf f = sub(x, n);  // [-0.5, 0.5]
    // Taylor coefficients of 2^f, ln(2)^k / k!: the degree-7 remainder is 5e-9 at 0.5
    vf p = set1(1.52527338e-5f);
    p = fma(p, f, set1(1.54035304e-4f));
    p = fma(p, f, set1(1.33335581e-3f));
    p = fma(p, f, set1(9.61812911e-3f));
    p = fma(p, f, set1(5.55041087e-2f));
    p = fma(p, f, set1(2.40226507e-1f));
    p = fma(p, f, set1(6.93147181e-1f));
    p = fma(p, f, set1(1.0f));
    vf made = scale2(p, n);
#if VEC_AVX512
    // scalef would give subnormals below 2^-126: the other paths give 0 there, and they are slow to compute with
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), made);
#else
    return made;
#endif
}

}  // namespace
}  // namespace criadero
