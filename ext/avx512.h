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
static inline vec v_sqrt(vec x) { return _mm512_sqrt_ps(x); }
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
        out->half = _mm512_reduce_add_epi32(p);
        out->sum = _mm512_reduce_add_epi32(_mm512_add_epi32(p, r));
    }
}

/* `bits` bits, at bit `at` of each byte, of four r of 16 rows (side 0 or 1 of the strip). Where a super-block's block
 * begins, a cache line need not. */
INLINE __m512i bits_of(const int bits, const uint8_t *from, const int r, const int side, const int at) {
    const int fours = 8 / bits, shift = r % fours * bits - at;
    const __m512i bytes = _mm512_loadu_si512(from + r / fours * 128 + side * 64);
    const __m512i moved =
        shift < 0 ? _mm512_slli_epi16(bytes, (unsigned)-shift) : _mm512_srli_epi16(bytes, (unsigned)shift);
    return bits == 8 ? bytes : _mm512_and_si512(moved, _mm512_set1_epi8((char)(((1 << bits) - 1) << at)));
}

/* Four r of 16 rows, as unsigned bytes. */
INLINE __m512i unpack(const weight_type type, const uint8_t *block, const int r, const int side) {
    const int low = low_bits(type), high = high_bits(type);
    __m512i q = bits_of(low, block + layout_of(type).low, r, side, 0);
    if (high) q = _mm512_or_si512(q, bits_of(high, block + layout_of(type).high, r, side, low));
    if (!has_table(type)) return q;
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)iq4_values));
    return _mm512_shuffle_epi8(_mm512_xor_si512(table, _mm512_set1_epi8(-128)), q);
}

INLINE __m512 load_scales(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p)); }

/* The same bytes of 16 rows as numbers: their low and high nibbles, or signed. */
INLINE __m512 low_nibbles(__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))));
}
INLINE __m512 high_nibbles(__m128i bytes) { return low_nibbles(_mm_srli_epi16(bytes, 4)); }
INLINE __m512 whole(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

/* Scales and minima of 16 rows; of a block's halves, if each has its own. */
typedef struct {
    __m512 d[2], m[2];
} scales;

/* A half's bytes of pairs: those at even places, then those at odd ones, in front. */
INLINE __m128i half_of(const uint8_t *pairs, const int half) {
    const __m128i first = _mm_load_si128((const __m128i *)pairs), last = _mm_load_si128((const __m128i *)(pairs + 16));
    const __m128i byte = _mm_set1_epi16(255);
    if (half) return _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8));
    return _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte));
}

INLINE scales scales_of(const weight_type type, const uint8_t *block, const uint8_t *head,
                        const int side) {
    const uint8_t *from = has_super_blocks(type) ? head : block;
    const __m512 d = load_scales(from + side * 32);
    __m512 m = _mm512_setzero_ps();
    if (has_minimum(type)) m = load_scales(from + (has_super_blocks(type) ? 2 * STRIP : layout_of(type).m) + side * 32);
    scales s = {{d, d}, {m, m}};
    if (has_halves(type)) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const __m128i small = half_of(block + side * 32, half);
            s.d[half] = _mm512_mul_ps(d, type == Q2_K ? low_nibbles(small) : whole(small));
            if (has_minimum(type)) s.m[half] = _mm512_mul_ps(m, high_nibbles(small));
        }
    } else if (has_super_blocks(type)) {
        const __m128i *small = (const __m128i *)(block + side * 16), *minima = (const __m128i *)(block + layout_of(type).m + side * 16);
        s.d[0] = _mm512_mul_ps(d, whole(_mm_load_si128(small)));
        if (has_minimum(type)) s.m[0] = _mm512_mul_ps(m, whole(_mm_load_si128(minima)));
    }
    return s;
}
