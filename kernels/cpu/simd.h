/* Vectors of the host's width and the few operations every kernel is written in. Knows no tensor and no thread.
 *
 * One source serves every instruction set: GNU vector extensions of VL lanes (16, 8 or 4), with intrinsics only where
 * the instruction matters (bf16 and int8 dot products, max, fp16 and bf16 conversion). Kernels store 16 columns or 16
 * tokens together everywhere; a group of 16 is GV vectors.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif
#define GROUP 16
#define GV (GROUP / VL)
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

enum { F32 = 0, BF16 = 1 }; /* dtypes of activations, as Python passes them */

INLINE vf vf_set(float x) { return x - (vf){0}; }
INLINE vi vi_set(int32_t x) { return x - (vi){0}; }
INLINE vf vf_load(const void *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vh vh_load(const void *p) { vh v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(void *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vi vi_broadcast(const void *p) { int32_t x; memcpy(&x, p, 4); return vi_set(x); }
INLINE vf vf_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
INLINE void prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }
INLINE vf vf_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* The larger; `b` where either is NaN. */
INLINE vf vf_max(vf a, vf b) {
#if VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return vf_select(a > b, a, b);
#endif
}

/* Horizontal reductions in one fixed order: halves are folded until one lane is left. */
INLINE float vf_sum(vf v) {
#if VL == 16
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float x[VL];
    memcpy(x, &v, sizeof x);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}
INLINE float vf_hmax(vf v) {
#if VL == 16
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float x[VL];
    memcpy(x, &v, sizeof x);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}
INLINE int32_t vi_sum(vi v) {
#if VL == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#endif
    int32_t sum = 0;
    for (int i = 0; i < VL; i++) sum += v[i];
    return sum;
}
/* Of lanes that are not negative. */
INLINE vi vi_max(vi a, vi b) {
#if VL == 16
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif VL == 8
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vi larger = a > b;
    return (a & larger) | (b & ~larger);
#endif
}
INLINE int32_t vi_hmax(vi v) {
#if VL == 16
    return _mm512_reduce_max_epi32((__m512i)v);
#endif
    int32_t max = v[0];
    for (int i = 1; i < VL; i++) max = v[i] > max ? v[i] : max;
    return max;
}

/* ---- bf16 and fp16 ------------------------------------------------------------------------------------------- */

INLINE float bf16_to_f32(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t f32_to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE vf vf_from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vh vf_to_bf16(vf f) {
#if defined(__AVX512BF16__) && VL == 16
    return (vh)_mm512_cvtneps_pbh((__m512)f);
#else
    vu u = (vu)f;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (vu)((vi)(u & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
#endif
}
/* Scales of quantised weights: finite numbers only. */
INLINE vf vf_from_f16(vh h) {
#if VL == 16
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && VL == 8
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    vu u = __builtin_convertvector(h, vu);
    vf magnitude = (vf)((u & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | ((u & 0x8000) << 16));
#endif
}
/* Element i of an array of either dtype, VL of them. */
INLINE vf vf_get(const void *p, int64_t i, int dtype) {
    return dtype == F32 ? vf_load((const float *)p + i) : vf_from_bf16(vh_load((const uint16_t *)p + i));
}
INLINE void vf_put(void *p, int64_t i, int dtype, vf v) {
    if (dtype == F32) {
        vf_store((float *)p + i, v);
    } else {
        vh h = vf_to_bf16(v);
        memcpy((uint16_t *)p + i, &h, sizeof h);
    }
}
INLINE float f_get(const void *p, int64_t i, int dtype) {
    return dtype == F32 ? ((const float *)p)[i] : bf16_to_f32(((const uint16_t *)p)[i]);
}
INLINE void f_put(void *p, int64_t i, int dtype, float v) {
    if (dtype == F32) ((float *)p)[i] = v;
    else ((uint16_t *)p)[i] = f32_to_bf16(v);
}
INLINE int64_t dtype_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

/* ---- dot products: each 32-bit lane of `a` and `b` holds 1 float, 2 bf16 or 4 bytes ------------------------------ */

INLINE vf dot_f32(vf acc, vi a, vi b) { return acc + (vf)a * (vf)b; }
INLINE vf dot_bf16(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__) && VL == 16
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = acc + (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & (int32_t)0xffff0000) * (vf)(b & (int32_t)0xffff0000);
#endif
}
/* acc += sum of 4 products, exact: `weights` unsigned bytes, `x` signed bytes. */
INLINE vi dot_i8(vi acc, vi weights, vi x) {
#if defined(__AVX512VNNI__) && VL == 16
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)x);
#elif defined(__AVXVNNI__) && VL == 8
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weights, (__m256i)x);
#elif VL == 8 /* maddubs would saturate: widen to 16 bits, even and odd bytes apart */
    __m256i w = (__m256i)weights, s = (__m256i)x;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(s, 8));
    return acc + (vi)_mm256_add_epi32(even, odd);
#elif VL == 4 && defined(__SSE2__)
    __m128i w = (__m128i)weights, s = (__m128i)x;
    __m128i even = _mm_madd_epi16(_mm_and_si128(w, _mm_set1_epi16(255)), _mm_srai_epi16(_mm_slli_epi16(s, 8), 8));
    __m128i odd = _mm_madd_epi16(_mm_srli_epi16(w, 8), _mm_srai_epi16(s, 8));
    return acc + (vi)_mm_add_epi32(even, odd);
#else
    vi w = weights;
    for (int byte = 0; byte < 4; byte++)
        acc += (vi)(((vu)w >> (8 * byte)) & 255) * ((vi)((vu)x << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

/* ---- elementary functions ------------------------------------------------------------------------------------- */

/* 2^x, relative error under 2e-7; exactly 1 at 0, 0 far below -126, huge above 127, NaN stays NaN. */
INLINE vf vf_exp2(vf x) {
#if VL == 16
    vf z = vf_max(vf_set(-200.0f), x); /* so that -inf has a fraction */
    vf n = (vf)_mm512_roundscale_ps((__m512)z, 8);
    vf f = z - n;
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf z = vf_select(x < -126.0f, vf_set(-126.0f), x);
    z = vf_select(z > 127.0f, vf_set(127.0f), z);
    vf t = z + magic;
    vf f = z - (t - magic);
    vi n = (vi)t - 0x4b400000;
#endif
    vf p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
#if VL == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return vf_select(x < -126.0f, vf_set(0.0f), p * (vf)((n + 127) << 23));
#endif
}
INLINE float f_exp2(float x) { return vf_exp2(vf_set(x))[0]; }
#define LOG2E 1.4426950408889634f
INLINE vf vf_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp2(x * -LOG2E)); }
INLINE vf vf_tanh(vf x) { return 1.0f - 2.0f / (vf_exp2(x * (2 * LOG2E)) + 1.0f); }
