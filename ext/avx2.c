/* x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
 *
 * As avx512.c with half the width. Without VNNI, maddubs multiplies unsigned by signed bytes and adds neighbours
 * into 16 bits, where a whole block's worth of nibble products still fits before it is widened. */
#include "kernels.h"

#if defined(__x86_64__)
TARGET("avx2,fma,f16c", "avx2,fma,f16c")
#include <immintrin.h>

typedef __m256 vec;
enum { LANES = 8, VECTORS = 2 };
static inline vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
static inline vec v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vec v_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vec v_set1(float x) { return _mm256_set1_ps(x); }
static inline vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec v_sqrt(vec x) { return _mm256_sqrt_ps(x); }
static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
/* x * 2^n by adding n to the exponent, which must stay in its range. */
static inline vec v_times_power(vec x, vec n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
static inline float v_sum(vec x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* The sums of four vectors, by halves until 4 lanes are left. */
static inline void v_sum4(const vec x[4], float *out) {
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

/* 8 rows of 8 become columns: by pairs of dwords, of qwords, of 128-bit lanes. */
static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    __m256i r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i *)(rows + i * row_stride));
    for (int i = 0; i < 8; i += 4) {
        __m256i a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        __m256i c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        s[i] = _mm256_unpacklo_epi64(a, c), s[i + 1] = _mm256_unpackhi_epi64(a, c);
        s[i + 2] = _mm256_unpacklo_epi64(b, d), s[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)(out + i * out_stride), r[i]);
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) out[i] = f16_from_f32(x[i]);
}

#include "cast.h"

static void quantize(const float *x, long n_blocks, input_block *out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (; n_blocks-- > 0; x += BLOCK, out++) {
        __m256 v[4];
        __m256i top = _mm256_setzero_si256(); /* as integers: NaN's bits are larger than any number's */
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            top = _mm256_max_epi32(top, _mm256_castps_si256(_mm256_andnot_ps(sign, v[i])));
        }
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
        __m256 inverse = _mm256_set1_ps(finite_inverse(127, largest));
        __m256 some = _mm256_cmp_ps(inverse, _mm256_setzero_ps(), _CMP_GT_OQ);
        __m256i q[4];
        for (int i = 0; i < 4; i++) /* rounds ties to even */
            q[i] = _mm256_cvtps_epi32(_mm256_and_ps(_mm256_mul_ps(v[i], inverse), some));
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        /* packing works within 128-bit lanes: put the dwords back in order */
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)out->q, bytes);
        out->scale = largest / 127;
        const __m256i first = _mm256_add_epi32(q[0], q[1]), last = _mm256_add_epi32(q[2], q[3]);
        const __m256i pairs = _mm256_hadd_epi32(first, _mm256_add_epi32(first, last));
        const __m256i fours = _mm256_hadd_epi32(pairs, pairs);
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        _mm_storel_epi64((__m128i *)&out->half, sums); /* and sum */
    }
}

/* ---- products of blocks ---- */

/* GCC would first compute all products, put them aside on the stack, and then add them up. */
#define DO_NOW(x) __asm__("" : "+x"(x))

enum { TOKENS = 8, EVEN = 0, WIDE = 1 }; /* blocks.h says what they are */

/* Few tokens have registers left for the sums of more columns, and a single one would wait for each of its sums. */
INLINE int at_once(const int n) { return n == 1 ? 4 : n == 2 ? 2 : 1; }

/* `bits` bits, at bit `at` of each byte, of four r of 8 rows (column 0..3 of the strip). */
INLINE __m256i bits_of(const int bits, const uint8_t *from, const int r, const int column, const int at) {
    const int fours = 8 / bits, shift = r % fours * bits - at;
    const __m256i bytes = _mm256_load_si256((const __m256i *)(from + r / fours * 128 + column * 32));
    const __m256i moved = shift < 0 ? _mm256_slli_epi16(bytes, -shift) : _mm256_srli_epi16(bytes, shift);
    return bits == 8 ? bytes : _mm256_and_si256(moved, _mm256_set1_epi8((char)(((1 << bits) - 1) << at)));
}

/* Four r of 8 rows. Unsigned; q8_0 and what nibbles stand for signed. */
INLINE __m256i unpack(const weight_type type, const uint8_t *block, const int r, const int column) {
    const int low = low_bits(type), high = high_bits(type);
    __m256i q = bits_of(low, block + layout_of(type).low, r, column, 0);
    if (high) q = _mm256_or_si256(q, bits_of(high, block + layout_of(type).high, r, column, low));
    if (type == Q8_0) return _mm256_xor_si256(q, _mm256_set1_epi8(-128));
    if (!has_table(type)) return q;
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)iq4_values)), q);
}

INLINE int is_signed(const weight_type type) { return type == Q8_0 || has_table(type); }

/* What is still to be subtracted from unpacked quants. */
INLINE int zero_left(const weight_type type) { return is_signed(type) ? 0 : zero_of(type); }

/* How many products of bytes 16 bits can sum up, in pairs: 8 of 2 * 15 * 127, 4 of 2 * 31 * 127, 2 of 2 * 63 * 127, 1 of
 * 2 * 128 * 127. A half block has 4. */
INLINE int together(const weight_type type) {
    const int fit = is_signed(type) ? 1 : types[type].bits <= 4 ? 8 : types[type].bits == 5 ? 4 : 2;
    return has_halves(type) && fit > 4 ? 4 : fit;
}

INLINE __m256i byte_products(const weight_type type, __m256i weights, __m256i inputs) {
    if (is_signed(type)) /* one side must be unsigned: |w| * (x with the sign of w) */
        return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
    return _mm256_maddubs_epi16(weights, inputs);
}

INLINE __m256i dword_sums(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

INLINE __m256 load_scales(const uint8_t *p) { return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p)); }

/* 8 bytes as numbers. */
INLINE __m256 load_small(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

INLINE __m256i broadcast_int(const uint8_t *p) { return _mm256_set1_epi32(read_i32(p)); }

INLINE __m256 broadcast_float(const uint8_t *p) { return _mm256_castsi256_ps(broadcast_int(p)); }

/* What a block of 8 rows has of scales. The small ones of halves are factors of words: of sums, and, side by side, of
 * the sums of inputs. */
typedef struct {
    __m256 d, m;
    __m256i half[2], zeros, minima;
} scales;

INLINE scales scales_of(const weight_type type, const uint8_t *block, const uint8_t *head,
                        const int column) {
    scales s = {0};
    const uint8_t *from = has_super_blocks(type) ? head : block;
    s.d = load_scales(from + column * 16);
    if (has_minimum(type)) s.m = load_scales(from + (has_super_blocks(type) ? 2 * STRIP : layout_of(type).m) + column * 16);
    if (has_halves(type)) {
        const __m128i nibble = _mm_set1_epi8(15), small = _mm_load_si128((const __m128i *)(block + column * 16));
        const __m256i pairs = _mm256_cvtepi8_epi16(type == Q2_K ? _mm_and_si128(small, nibble) : small);
        s.half[0] = _mm256_blend_epi16(pairs, _mm256_slli_epi32(pairs, 16), 0xaa);
        s.half[1] = _mm256_blend_epi16(pairs, _mm256_srli_epi32(pairs, 16), 0x55);
        if (zero_of(type)) s.zeros = _mm256_mullo_epi16(pairs, _mm256_set1_epi16((short)zero_of(type)));
        if (has_minimum(type)) s.minima = _mm256_cvtepi8_epi16(_mm_and_si128(_mm_srli_epi16(small, 4), nibble));
    } else if (has_super_blocks(type)) {
        s.d = _mm256_mul_ps(s.d, load_small(block + column * 8));
        if (has_minimum(type)) s.m = _mm256_mul_ps(s.m, load_small(block + layout_of(type).m + column * 8));
    }
    return s;
}

/* Products of a block of 8 rows with a tile_block x of n tokens. Halves, if they have scales, one after the other. */
INLINE void block_products(const weight_type type, const int n, const uint8_t *block, const int column,
                           const uint8_t *x, const __m256i *factors, __m256i *sums) {
    __m256i words[TOKENS];
    UNROLL
    for (int step = 0; step < 8; step++) {
        const int r = has_halves(type) ? step % 4 * 2 + step / 4 : step, k = r / 2, half = r % 2;
        const int in_words = step % together(type);
        const __m256i q = unpack(type, block, r, column);
        UNROLL
        for (int t = 0; t < n; t++) {
            __m256i product = byte_products(type, q, broadcast_int(x + ((4 * half + k) * n + t) * 4));
            words[t] = in_words ? _mm256_add_epi16(words[t], product) : product;
            DO_NOW(words[t]);
            if (in_words + 1 < together(type)) continue;
            product = has_halves(type) ? _mm256_madd_epi16(words[t], factors[half]) : dword_sums(words[t]);
            sums[t] = step < together(type) ? product : _mm256_add_epi32(sums[t], product);
        }
    }
}

/* Adds a block of 8 rows times a tile_block x of n tokens to totals. */
INLINE void add_block(const weight_type type, const int n, const uint8_t *block, const uint8_t *head,
                      const int column, const uint8_t *x, __m256 *totals) {
    const scales s = scales_of(type, block, head, column);
    __m256i sums[TOKENS];
    block_products(type, n, block, column, x, s.half, sums);
    UNROLL
    for (int t = 0; t < n; t++) { /* sum of (q - zero) x = sum of q x - zero * sum of x, in whole numbers below 2^24 */
        const __m256 scale = broadcast_float(scale_at(x, n, t)), zero = _mm256_set1_ps((float)zero_left(type));
        const __m256i halves = broadcast_int(minus_halves_at(x, n, t));
        if (has_halves(type) && zero_left(type)) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(halves, s.zeros));
        __m256 sum = _mm256_cvtepi32_ps(sums[t]), offset = broadcast_float(offset_at(x, n, t));
        if (!has_halves(type) && zero_left(type)) sum = _mm256_fmadd_ps(broadcast_float(minus_sum_at(x, n, t)), zero, sum);
        totals[t] = _mm256_fmadd_ps(sum, _mm256_mul_ps(s.d, scale), totals[t]);
        if (has_halves(type)) offset = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(halves, s.minima)), scale);
        if (has_minimum(type)) totals[t] = _mm256_fnmadd_ps(s.m, offset, totals[t]);
    }
}

#include "blocks.h"
static MULTIPLY_TILE(multiply_any)
static MULTIPLY_BLOCKS(multiply_blocks, multiply_any)

static double multiply_registers(long rounds, float *sink) {
    enum { SUMS = 8 }; /* enough of them to hide the latency of each */
    __m256i sums[SUMS], total = _mm256_setzero_si256(), x = _mm256_set1_epi8(3);
    for (int i = 0; i < SUMS; i++) sums[i] = _mm256_setzero_si256();
    for (long n = 0; n < rounds; n++) {
        __asm__ volatile("" : "+x"(x)); /* x may have changed, for all that the compiler knows */
        UNROLL
        for (int i = 0; i < SUMS; i++) sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(x, x));
    }
    for (int i = 0; i < SUMS; i++) total = _mm256_add_epi32(total, dword_sums(sums[i]));
    *sink += v_sum(_mm256_cvtepi32_ps(total));
    return (double)rounds * SUMS * 32;
}

LEVEL(avx2, TOKENS, 4, multiply_blocks, attend_tile, NULL)
TARGET_END
#endif
