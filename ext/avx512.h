/* AVX-512: vectors of 16 floats for generic.h, and how blocks are read. avx512.c and amx.c choose their instruction
 * set and include this file. */
#include <immintrin.h>

#include "kernels.h"

typedef __m512 vec;
enum { LANES = 16, VECTORS = 2 };
static inline vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
static inline vec v_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vec v_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline vec v_set1(float x) { return _mm512_set1_ps(x); }
static inline vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec v_times_power(vec x, vec n) { return _mm512_scalef_ps(x, n); }
static inline float v_sum(vec x) { return _mm512_reduce_add_ps(x); }

/* The sums of four vectors, by halves until 4 lanes are left. */
static inline void v_sum4(const vec x[4], float *out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* 16 rows of 16 become columns: by pairs of dwords, of qwords, of 128-bit lanes, twice. */
static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * row_stride);
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        s[i] = _mm512_unpacklo_epi64(a, c), s[i + 1] = _mm512_unpackhi_epi64(a, c);
        s[i + 2] = _mm512_unpacklo_epi64(b, d), s[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) { /* s[4k + i] lane l holds column 4l + i of rows 4k..4k+3 */
        __m512i a = _mm512_shuffle_i32x4(s[i], s[i + 4], 0x44), b = _mm512_shuffle_i32x4(s[i], s[i + 4], 0xee);
        __m512i c = _mm512_shuffle_i32x4(s[i + 8], s[i + 12], 0x44);
        __m512i d = _mm512_shuffle_i32x4(s[i + 8], s[i + 12], 0xee);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88), r[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88), r[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * out_stride, r[i]);
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    for (long i = 0; i < n; i += LANES) {
        __mmask16 have = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(have, x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(out + i, have, halves);
    }
}

#include "cast.h"

static void quantize(const float *x, long n_blocks, input_block *out) {
    for (; n_blocks-- > 0; x += BLOCK, out++) {
        __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
        __m512i left = _mm512_castps_si512(_mm512_abs_ps(low)), right = _mm512_castps_si512(_mm512_abs_ps(high));
        int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(left, right)); /* NaN's are larger than any number's */
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        float inverse = finite_inverse(127, largest);
        __m512 factor = _mm512_set1_ps(inverse);
        __mmask16 some = inverse > 0 ? 0xffff : 0;
        __m512i p = _mm512_maskz_cvtps_epi32(some, _mm512_mul_ps(low, factor)); /* rounds ties to even */
        __m512i r = _mm512_maskz_cvtps_epi32(some, _mm512_mul_ps(high, factor));
        _mm_storeu_si128((__m128i *)out->q, _mm512_cvtepi32_epi8(p));
        _mm_storeu_si128((__m128i *)(out->q + 16), _mm512_cvtepi32_epi8(r));
        out->scale = largest / 127;
        out->sum = _mm512_reduce_add_epi32(_mm512_add_epi32(p, r));
    }
}

/* Quarter k of 16 rows (half 0 or 1 of the strip): elements 4k..4k+3, and 16 + those, as unsigned bytes. */
INLINE void unpack(const weight_type type, const weight *w, const uint8_t *block, int k, int half, __m512i *low,
                   __m512i *high) {
    const uint8_t *q = block + w->q + k * 128 + half * 64;
    if (type == Q8_0) {
        *low = _mm512_load_si512(q);
        *high = _mm512_load_si512(q + 512);
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15), both = _mm512_load_si512(q);
    *low = _mm512_and_si512(both, nibble);
    *high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    if (has_fifth_bits(type)) {
        const __m512i fifth = _mm512_set1_epi8(16);
        uint64_t bits[2];
        memcpy(bits, block + w->fifth + k * 32 + half * 16, 16);
        *low = _mm512_mask_add_epi8(*low, bits[0], *low, fifth);
        *high = _mm512_mask_add_epi8(*high, bits[1], *high, fifth);
    }
}

INLINE __m512 load_scales(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p)); }
