// Sixteen float32 as one value, in as many registers as the instruction set of this build needs, and bfloat16 beside.
//
// Everything here is arithmetic without state. A build is for one instruction set; native.py chooses among the builds.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

// 16 float32, and 16 words of 32 bits.
struct F16 {
    Floats part[PARTS];
};
struct W16 {
    Words part[PARTS];
};

#define EACH_PART for (int p = 0; p < PARTS; p++)

INLINE F16 splat(float x) {
    F16 out;
    EACH_PART out.part[p] = x - Floats{};
    return out;
}

INLINE F16 load(const float* at) {
    F16 out;
    memcpy(&out, at, sizeof out);
    return out;
}

INLINE W16 load_words(const void* at) {
    W16 out;
    memcpy(&out, at, sizeof out);
    return out;
}

INLINE void store(float* at, F16 x) { memcpy(at, &x, sizeof x); }

// a × b + c; one rounding where the processor has such an instruction.
INLINE F16 multiply_add(F16 a, F16 b, F16 c) {
    EACH_PART c.part[p] = a.part[p] * b.part[p] + c.part[p];
    return c;
}

INLINE F16 operator+(F16 a, F16 b) {
    EACH_PART a.part[p] = a.part[p] + b.part[p];
    return a;
}

INLINE F16 operator-(F16 a, F16 b) {
    EACH_PART a.part[p] = a.part[p] - b.part[p];
    return a;
}

INLINE F16 operator*(F16 a, F16 b) {
    EACH_PART a.part[p] = a.part[p] * b.part[p];
    return a;
}

INLINE F16 operator/(F16 a, F16 b) {
    EACH_PART a.part[p] = a.part[p] / b.part[p];
    return a;
}

INLINE F16 maximum(F16 a, F16 b) {
    EACH_PART a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}

// In the order of a tree, the same in every build.
INLINE float sum(F16 x) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)x.part[0];
    const __m256 b = _mm512_castps512_ps256(a) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m128 c = _mm256_castps256_ps128(b) + _mm256_extractf128_ps(b, 1);
    const __m128 d = c + _mm_movehl_ps(c, c);
    return d[0] + d[1];
#else
    float lane[16];
    memcpy(lane, &x, sizeof lane);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

INLINE float largest(F16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x.part[0]);
#else
    float lane[16];
    memcpy(lane, &x, sizeof lane);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
#endif
}

// 2 to the power of x ≤ 0, to a few units in the last place; 0 far below.
INLINE F16 power_of_two(F16 x) {
    EACH_PART {
#if defined(__AVX512F__)
        const __m512 a = (__m512)x.part[p];
        const __m512 whole = _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Floats r = (Floats)_mm512_sub_ps(a, whole);
#else
        const Floats a = x.part[p] < -126.0f ? -126.0f - Floats{} : x.part[p];  // a NaN stays one
        const Ints whole = __builtin_convertvector(a - 0.5f, Ints);  // to zero: rounds, as a ≤ 0
        const Floats r = a - __builtin_convertvector(whole, Floats);
#endif
        // 2^r for |r| ≤ 1/2, fitted by least squares; relative error below 3e-9 before rounding.
        Floats y = 1.53707101e-4f * r + 1.33998531e-3f;
        y = y * r + 9.61837326e-3f;
        y = y * r + 5.55032902e-2f;
        y = y * r + 2.40226485e-1f;
        y = y * r + 6.93147206e-1f;
        y = y * r + 1.0f;
#if defined(__AVX512F__)
        x.part[p] = (Floats)_mm512_scalef_ps((__m512)y, whole);
#else
        y = y * (Floats)((whole + 127) << 23);
        x.part[p] = (Floats)((Ints)y & ~(x.part[p] < -126.0f));
#endif
    }
    return x;
}

// The same to 1e-4 of itself where that is faster, for what is rounded to bfloat16 next.
INLINE F16 roughly_power_of_two(F16 x) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)x.part[0];
    const Floats r = (Floats)_mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // a - floor(a)
    Floats y = 7.790722e-2f * r + 2.2623353e-1f;
    y = y * r + 6.9577674e-1f;
    y = y * r + 9.9992789e-1f;
    x.part[0] = (Floats)_mm512_scalef_ps((__m512)y, a);  // which takes the floor itself
    return x;
#else
    return power_of_two(x);
#endif
}

// Whether any of the sixteen is above a limit.
INLINE bool any_above(F16 x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x.part[0], _mm512_set1_ps(limit), _CMP_GT_OQ);
#else
    return largest(x) > limit;
#endif
}

constexpr float LOG2_E = 1.44269504f;

// The bfloat16 in the low and in the high halves of words, as float32.
INLINE F16 low_halves(W16 x) {
    F16 out;
    EACH_PART out.part[p] = (Floats)(x.part[p] << 16);
    return out;
}

INLINE F16 high_halves(W16 x) {
    F16 out;
    EACH_PART out.part[p] = (Floats)(x.part[p] & 0xFFFF0000u);
    return out;
}

INLINE F16 load_bfloat16(const uint16_t* at) {
    F16 out;
    EACH_PART {
        Shorts half;
        memcpy(&half, at + p * LANES, sizeof half);
        out.part[p] = (Floats)(__builtin_convertvector(half, Words) << 16);
    }
    return out;
}

// 16 int8 as float32.
INLINE F16 load_bytes(const int8_t* at) {
    F16 out;
#if defined(__AVX512F__)
    out.part[0] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
#else
    EACH_PART for (int i = 0; i < LANES; i++) out.part[p][i] = at[p * LANES + i];
#endif
    return out;
}

INLINE float widen(uint16_t bits) {
    const uint32_t word = (uint32_t)bits << 16;
    float out;
    memcpy(&out, &word, 4);
    return out;
}

// To bfloat16, ties to even; a NaN stays one.
INLINE uint16_t narrow(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(word >> 16 | 64);
    return (uint16_t)((word + 0x7FFFu + (word >> 16 & 1u)) >> 16);
}

INLINE void store_bfloat16(uint16_t* at, F16 x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x.part[0]);
    memcpy(at, &half, sizeof half);
#else
    float lane[16];
    memcpy(lane, &x, sizeof lane);
    for (int i = 0; i < 16; i++) at[i] = narrow(lane[i]);
#endif
}

// float16 to float32, as scales are stored.
INLINE F16 load_float16(const uint16_t* at) {
    F16 out;
#if defined(__AVX512F__)
    __m256i half;
    memcpy(&half, at, sizeof half);
    out.part[0] = (Floats)_mm512_cvtph_ps(half);
#elif defined(__F16C__)
    EACH_PART {
        __m128i half;
        memcpy(&half, at + p * LANES, sizeof half);
        out.part[p] = (Floats)_mm256_cvtph_ps(half);
    }
#else
    float lane[16];
    for (int i = 0; i < 16; i++) {
        const uint32_t sign = (uint32_t)(at[i] & 0x8000) << 16, rest = at[i] & 0x7FFF;
        // A float16 read as the float32 of the same fields is 2^112 times too small; so subnormals come out right.
        uint32_t word = rest << 13;
        float magnitude;
        memcpy(&magnitude, &word, 4);
        magnitude *= 5.192296858534828e33f;
        if (rest >= 0x7C00) {
            word = 0x7F800000u | (rest & 0x3FF) << 13;
            memcpy(&magnitude, &word, 4);
        }
        memcpy(&word, &magnitude, 4);
        word |= sign;
        memcpy(&lane[i], &word, 4);
    }
    memcpy(&out, lane, sizeof out);
#endif
    return out;
}

#if defined(__AVX512BF16__)
// c + the products of the two bfloat16 in each word, summed in float32.
INLINE F16 dot_pairs(W16 a, W16 b, F16 c) {
    c.part[0] = (Floats)_mm512_dpbf16_ps((__m512)c.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
    return c;
}

INLINE W16 splat_word(const void* at) {
    int32_t word;
    memcpy(&word, at, 4);
    W16 out;
    out.part[0] = (Words)_mm512_set1_epi32(word);
    return out;
}
#endif
