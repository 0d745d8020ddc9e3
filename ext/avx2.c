/* x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
 *
 * The same two ways as avx512.c with half the width. Without VNNI, maddubs multiplies unsigned by signed
 * bytes and adds neighbours into 16 bits: at most 2 * 15 * 127 for nibbles, so that 8 such sums still fit. */
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

typedef __m256 vec;
enum { LANES = 8 };
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
static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
/* x * 2^n by adding n to the exponent, in two steps since 2^n itself may be out of range. */
static inline vec v_times_power(vec x, vec n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
static inline float v_sum(vec x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* 8 registers of 8 dwords, rows become columns. */
static inline void transpose_8x8(__m256i r[8]) {
    __m256i s[8];
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
}

static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i *)(rows + i * row_stride));
    transpose_8x8(r);
    for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)(out + i * out_stride), r[i]);
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) out[i] = f16_from_f32(x[i]);
}

static void quantize(const float *x, const activations *acts, long token) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (long b = 0; b < acts->n_in / BLOCK; b++, x += BLOCK) {
        __m256 v[4], top = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
        }
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
        __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
        __m256i q[4], sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) { /* rounds ties to even */
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
            sum = _mm256_add_epi32(sum, q[i]);
        }
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        /* packing works within 128-bit lanes: put the dwords back in order */
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        int8_t *to = acts->q + token * acts->row_bytes + activation_at(b * BLOCK);
        _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(bytes));
        _mm_storeu_si128((__m128i *)(to + 64), _mm256_extracti128_si256(bytes, 1));
        int32_t lanes[8], total = 0;
        _mm256_storeu_si256((__m256i *)lanes, sum);
        for (int i = 0; i < 8; i++) total += lanes[i];
        acts->scale[token * acts->n_blocks + b] = largest / 127;
        acts->sum[token * acts->n_blocks + b] = total;
    }
}

/* ---- a pair of blocks: the first 16 quants of both, and the other 16 of both, as bytes ---- */

#define INLINE static inline __attribute__((always_inline))

/* 16 in each byte whose bit is set. */
INLINE __m256i fifth_bits(const uint8_t *bits) {
    int32_t word;
    memcpy(&word, bits, 4);
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), which), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16));
}

/* Unsigned for nibbles; of q8_0, signed. */
INLINE void unpack_pair(const weight_type type, const weight *w, const uint8_t *row, long pair, __m256i *low,
                        __m256i *high) {
    if (type == Q8_0) {
        const __m256i top = _mm256_set1_epi8(-128);
        const uint8_t *q = row + w->q + pair / 2 * GROUP + pair % 2 * 32;
        *low = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)q), top);
        *high = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(q + 64)), top);
        return;
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i both = _mm256_loadu_si256((const __m256i *)(row + w->q + pair * 32));
    *low = _mm256_and_si256(both, nibble);
    *high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    if (type == Q5_0 || type == Q5_1) {
        const uint8_t *bits = row + w->high + pair / 2 * 16 + pair % 2 * 4;
        *low = _mm256_or_si256(*low, fifth_bits(bits));
        *high = _mm256_or_si256(*high, fifth_bits(bits + 8));
    }
}

/* Unpacked quants of q8_0 are signed already. */
INLINE int zero_here(const weight_type type) { return type == Q8_0 ? 0 : zero_of(type); }

/* 8 blocks' scales, or minima, as float; 0 from `n` on. */
INLINE __m256 load_scales(const uint8_t *p, long n) {
    uint16_t some[8] = {0};
    if (n >= 8) return v_load_f16((const uint16_t *)p);
    memcpy(some, p, (size_t)n * 2);
    return v_load_f16(some);
}

INLINE __m256i dword_sums(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

/* Products of signed bytes: |a| * (b with a's sign), since maddubs wants one side unsigned. */
INLINE __m256i signed_products(__m256i a, __m256i b) {
    return dword_sums(_mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)));
}

/* ---- one token ---- */

enum { ROWS = 4 };

INLINE __m256i pair_product(const weight_type type, __m256i low, __m256i high, __m256i x_low, __m256i x_high) {
    if (type == Q8_0) return _mm256_add_epi32(signed_products(low, x_low), signed_products(high, x_high));
    return dword_sums(_mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high)));
}

/* One block of two rows, 16 bytes of each: the first quants, and the other 16. */
INLINE void unpack_two(const weight_type type, const weight *w, const uint8_t *one, const uint8_t *two, long block,
                       __m256i *low, __m256i *high) {
    const long at = w->q + (type == Q8_0 ? block / 4 * GROUP + block % 4 * 16 : block * 16);
    __m256i both = _mm256_loadu2_m128i((const __m128i *)(two + at), (const __m128i *)(one + at));
    if (type == Q8_0) {
        const __m256i top = _mm256_set1_epi8(-128);
        *low = _mm256_xor_si256(both, top);
        both = _mm256_loadu2_m128i((const __m128i *)(two + at + 64), (const __m128i *)(one + at + 64));
        *high = _mm256_xor_si256(both, top);
        return;
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(both, nibble);
    *high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    if (type != Q5_0 && type != Q5_1) return;
    uint8_t bits[2][4];
    for (int half = 0; half < 2; half++) {
        memcpy(bits[half], one + w->high + block / 4 * 16 + block % 4 * 2 + 8 * half, 2);
        memcpy(bits[half] + 2, two + w->high + block / 4 * 16 + block % 4 * 2 + 8 * half, 2);
    }
    *low = _mm256_or_si256(*low, fifth_bits(bits[0]));
    *high = _mm256_or_si256(*high, fifth_bits(bits[1]));
}

INLINE __m256 two_scales(const uint8_t *one, const uint8_t *two, long at) {
    uint16_t halves[2];
    memcpy(&halves[0], one + at, 2);
    memcpy(&halves[1], two + at, 2);
    int32_t together;
    memcpy(&together, halves, 4);
    __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(together));
    return _mm256_set_m128(_mm_permute_ps(pair, 0x55), _mm_permute_ps(pair, 0));
}

/* The refined blocks of two rows; the lower four sums are row one's. */
INLINE __m256 dot_rest(const weight_type type, const weight *w, const uint8_t *one, const uint8_t *two,
                       const activations *acts, long token) {
    const long set = token / TOGETHER, at = token * acts->max_rest;
    const __m256 first_lane = _mm256_setr_ps(1, 0, 0, 0, 1, 0, 0, 0);
    __m256 sums = _mm256_setzero_ps();
    for (long i = 0; i < acts->n_rest[set]; i++) {
        const long block = acts->rest_block[set * acts->max_rest + i];
        const int8_t *rest = acts->rest + (at + i) * BLOCK;
        const __m256 scale = _mm256_set1_ps(acts->scale[token * acts->n_blocks + block] * REST_SCALE);
        const __m256 x_sum = _mm256_mul_ps(_mm256_set1_ps((float)acts->rest_sum[at + i]), first_lane);
        const __m256 d = _mm256_mul_ps(two_scales(one, two, 2 * block), scale);
        __m256i low, high, x_low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)rest));
        __m256i x_high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(rest + 16)));
        unpack_two(type, w, one, two, block, &low, &high);
        __m256 product = _mm256_cvtepi32_ps(pair_product(type, low, high, x_low, x_high));
        if (zero_here(type))
            product = _mm256_sub_ps(product, _mm256_mul_ps(x_sum, _mm256_set1_ps((float)zero_here(type))));
        sums = _mm256_fmadd_ps(product, d, sums);
        if (has_minimum(type))
            sums = _mm256_fmadd_ps(two_scales(one, two, w->m + 2 * block), _mm256_mul_ps(x_sum, scale), sums);
    }
    return sums;
}

INLINE void dot_rows(const weight_type type, const int n_rows, const weight *w, const activations *acts,
                     long token, long first, float *out) {
    const uint8_t *row = w->data + first * w->row_bytes;
    const int8_t *q = acts->q + token * acts->row_bytes;
    const float *scale = acts->scale + token * acts->n_blocks;
    const int32_t *sum = acts->sum + token * acts->n_blocks;
    const long stride = w->row_bytes;
    __m256 totals[ROWS];
    UNROLL
    for (int r = 0; r < n_rows; r++) totals[r] = _mm256_setzero_ps();
    for (long block = 0; block < w->n_blocks; block += 8) {
        const long left = w->n_blocks - block;
        const __m256 x_scale = _mm256_loadu_ps(scale + block);
        const __m256 x_sum = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(sum + block)));
        const __m256 offset = _mm256_mul_ps(x_sum, _mm256_set1_ps((float)-zero_here(type)));
        __m256 scales[ROWS];
        UNROLL
        for (int r = 0; r < n_rows; r++) {
            scales[r] = _mm256_mul_ps(load_scales(row + r * stride + 2 * block, left), x_scale);
            if (zero_here(type)) totals[r] = _mm256_fmadd_ps(scales[r], offset, totals[r]);
            if (has_minimum(type))
                totals[r] = _mm256_fmadd_ps(load_scales(row + r * stride + w->m + 2 * block, left),
                                            _mm256_mul_ps(x_sum, x_scale), totals[r]);
        }
        const int n_pairs = left >= 8 ? 4 : (int)((left + 1) / 2);
        for (int p = 0; p < n_pairs; p++) {
            const long pair = block / 2 + p;
            const int8_t *x = q + pair / 2 * GROUP + pair % 2 * 32;
            const __m256i x_low = _mm256_loadu_si256((const __m256i *)x);
            const __m256i x_high = _mm256_loadu_si256((const __m256i *)(x + 64));
            const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32(2 * p), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
            UNROLL
            for (int r = 0; r < n_rows; r++) {
                __m256i low, high;
                unpack_pair(type, w, row + r * stride, pair, &low, &high);
                const __m256 product = _mm256_cvtepi32_ps(pair_product(type, low, high, x_low, x_high));
                totals[r] = _mm256_fmadd_ps(product, _mm256_permutevar8x32_ps(scales[r], lanes), totals[r]);
            }
        }
        /* The same place in the next rows, which come next */
        const long bytes = type == Q8_0 ? BLOCK : BLOCK / 2;
        UNROLL
        for (int r = 0; r < n_rows; r++)
            for (long i = 0; i < 8 * bytes; i += 64)
                _mm_prefetch((const char *)(row + (r + n_rows) * stride + w->q + block * bytes + i), _MM_HINT_T0);
    }
    for (int r = 0; r < n_rows; r += 2) {
        const int pair = r + 1 < n_rows;
        float rest[8];
        _mm256_storeu_ps(rest, dot_rest(type, w, row + r * stride, row + (r + pair) * stride, acts, token));
        for (int i = 0; i <= pair; i++) {
            float more = (rest[4 * i] + rest[4 * i + 1]) + (rest[4 * i + 2] + rest[4 * i + 3]);
            out[r + i] = (v_sum(totals[r + i]) + more) * w->factor;
        }
    }
}

INLINE void dot_strip(const weight_type type, const weight *w, const activations *acts, long first, long last,
                      float *out, long stride) {
    long row = first;
    for (; row + ROWS <= last; row += ROWS)
        for (long t = 0; t < acts->n_tokens; t++) dot_rows(type, ROWS, w, acts, t, row, out + t * stride + row);
    for (; row < last; row++)
        for (long t = 0; t < acts->n_tokens; t++) dot_rows(type, 1, w, acts, t, row, out + t * stride + row);
}

/* ---- many tokens: the panel of avx512.c, worked through by 16 rows and 4 tokens ---- */

enum { WIDE = 16, DEEP = 4 };

typedef struct {
    uint8_t *quants;
    float *scales, *minima;
} panel;

INLINE panel make_panel(const weight_type type, const weight *w, long first, long last, void *scratch) {
    long padded = (w->n_blocks + 3) / 4 * 4;
    panel p = {.quants = scratch};
    p.scales = (float *)(p.quants + padded * BLOCK * STRIP);
    p.minima = p.scales + padded * STRIP;
    for (long part = 0; part < STRIP / 8; part++) {
        const uint8_t *rows[8];
        for (int i = 0; i < 8; i++) { /* a strip's missing rows repeat its last one */
            long row = first + part * 8 + i;
            rows[i] = w->data + (row < last ? row : last - 1) * w->row_bytes;
        }
        for (long pair = 0; pair < (w->n_blocks + 1) / 2; pair++) {
            __m256i low[8], high[8];
            for (int i = 0; i < 8; i++) unpack_pair(type, w, rows[i], pair, &low[i], &high[i]);
            transpose_8x8(low);
            transpose_8x8(high);
            uint8_t *to = p.quants + pair * 2 * BLOCK * STRIP + part * 32;
            for (int i = 0; i < 8; i++) { /* quarter i % 4 of the first half of block i / 4, then of the second */
                _mm256_store_si256((__m256i *)(to + (i / 4 * 8 + i % 4) * 128), low[i]);
                _mm256_store_si256((__m256i *)(to + (i / 4 * 8 + 4 + i % 4) * 128), high[i]);
            }
        }
        for (long block = 0; block < w->n_blocks; block += 8) {
            long n = smaller(w->n_blocks - block, 8);
            for (int which = 0; which <= has_minimum(type); which++) {
                __m256i values[8];
                for (int i = 0; i < 8; i++) {
                    __m256 v = load_scales(rows[i] + (which ? w->m : 0) + 2 * block, n);
                    values[i] = _mm256_castps_si256(_mm256_mul_ps(v, _mm256_set1_ps(w->factor)));
                }
                transpose_8x8(values);
                float *to = (which ? p.minima : p.scales) + block * STRIP + part * 8;
                for (int i = 0; i < n; i++) _mm256_store_si256((__m256i *)(to + i * STRIP), values[i]);
            }
        }
    }
    return p;
}

typedef TILE_BLOCK(DEEP) tile_block;

/* 16 rows' products of a block with the tokens of a tile, as int32. */
INLINE void block_products(const weight_type type, const uint8_t *quants, const tile_block *x,
                           __m256i sums[2][DEEP]) {
    /* How many products fit into 16 bits: 8 * 3810 of nibbles, 4 * 7874 with a fifth bit, 1 * 32512. */
    const int together = type == Q8_0 ? 1 : type == Q5_0 || type == Q5_1 ? 4 : 8;
    __m256i words[2][DEEP];
    UNROLL
    for (int k = 0; k < 8; k++) {
        __m256i w[2];
        w[0] = _mm256_load_si256((const __m256i *)(quants + k * 128));
        w[1] = _mm256_load_si256((const __m256i *)(quants + k * 128 + 32));
        UNROLL
        for (int t = 0; t < DEEP; t++) {
            const __m256i inputs = _mm256_set1_epi32(x->q[k][t]);
            UNROLL
            for (int half = 0; half < 2; half++) {
                __m256i product;
                if (type == Q8_0)
                    product = _mm256_maddubs_epi16(_mm256_abs_epi8(w[half]), _mm256_sign_epi8(inputs, w[half]));
                else
                    product = _mm256_maddubs_epi16(w[half], inputs);
                words[half][t] = k % together ? _mm256_add_epi16(words[half][t], product) : product;
                if ((k + 1) % together) continue;
                product = dword_sums(words[half][t]);
                sums[half][t] = k < together ? product : _mm256_add_epi32(sums[half][t], product);
            }
        }
    }
}

/* Adds one block's products of 16 rows and the tokens of a tile. */
INLINE void panel_block(const weight_type type, const panel *p, long column, const tile_block *x,
                        __m256 totals[2][DEEP]) {
    __m256i sums[2][DEEP];
    block_products(type, p->quants + x->block * BLOCK * STRIP + column * 4, x, sums);
    UNROLL
    for (int half = 0; half < 2; half++) {
        const long at = x->block * STRIP + column + half * 8;
        const __m256 d = _mm256_load_ps(p->scales + at);
        const __m256 m = has_minimum(type) ? _mm256_load_ps(p->minima + at) : d;
        UNROLL
        for (int t = 0; t < DEEP; t++) {
            __m256i product = sums[half][t];
            if (zero_here(type))
                product = _mm256_add_epi32(product, _mm256_set1_epi32(zero_here(type) * x->minus_sum[t]));
            const __m256 ds = _mm256_mul_ps(d, _mm256_set1_ps(x->scale[t]));
            totals[half][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), ds, totals[half][t]);
            if (has_minimum(type)) {
                const __m256 s = _mm256_set1_ps(x->scale[t] * (float)x->minus_sum[t]);
                totals[half][t] = _mm256_fnmadd_ps(m, s, totals[half][t]);
            }
        }
    }
}

INLINE void panel_columns(const weight_type type, const panel *p, long column, long rows, const activations *acts,
                          long n_blocks, float *out, long stride) {
    for (long token = 0; token < acts->n_tokens; token += DEEP) {
        const uint8_t *x = acts->tiles + token / DEEP * acts->tile_stride;
        const long n = n_blocks + acts->n_rest[token / TOGETHER];
        __m256 totals[2][DEEP];
        for (int t = 0; t < DEEP; t++) totals[0][t] = totals[1][t] = _mm256_setzero_ps();
        for (long i = 0; i < n; i++, x += tile_block_bytes(DEEP))
            panel_block(type, p, column, (const tile_block *)x, totals);
        for (long t = 0; t < smaller(acts->n_tokens - token, DEEP); t++)
            for (int half = 0; half < 2 && rows > half * 8; half++)
                v_store_part(out + (token + t) * stride + half * 8, totals[half][t], rows - half * 8);
    }
}

INLINE void panel_strip(const weight_type type, const weight *w, const activations *acts, long first,
                        long last, float *out, long stride, void *scratch) {
    panel p = make_panel(type, w, first, last, scratch);
    for (long column = 0; column < last - first; column += WIDE)
        panel_columns(type, &p, column, last - first - column, acts, w->n_blocks, out + first + column, stride);
}

INLINE void multiply_type(const weight_type type, const weight *w, const activations *acts, long first,
                          long last, float *out, long stride, void *scratch) {
    if (!acts->tiles)
        dot_strip(type, w, acts, first, last, out, stride);
    else
        panel_strip(type, w, acts, first, last, out, stride, scratch);
}

static void multiply_blocks(const weight *w, const activations *acts, long first, long last, float *out,
                            long stride, void *scratch) {
    switch (w->type) { /* each with its type known to the compiler */
    case Q4_0: multiply_type(Q4_0, w, acts, first, last, out, stride, scratch); break;
    case Q4_1: multiply_type(Q4_1, w, acts, first, last, out, stride, scratch); break;
    case Q5_0: multiply_type(Q5_0, w, acts, first, last, out, stride, scratch); break;
    case Q5_1: multiply_type(Q5_1, w, acts, first, last, out, stride, scratch); break;
    default: multiply_type(Q8_0, w, acts, first, last, out, stride, scratch); break;
    }
}

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

const kernels avx2_kernels = {
    "avx2", DEEP, FEW_TOKENS, quantize, refine, multiply_blocks, multiply_floats, rms_norm_one, swiglu_run, rope_one, to_f16,
    attend_span, attend_tile, multiply_registers,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
