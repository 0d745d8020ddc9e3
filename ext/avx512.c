/* x86-64 with AVX-512 and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later).
 *
 * Decoding streams each row once: 64 bytes of nibbles are 4 blocks, two dpbusd multiply and add them into 16
 * sums, of which lanes 4b..4b+3 are block b's. Prefill turns a strip of 32 rows into a panel in which a
 * vector's lanes are rows, so that a token's inputs are broadcast and no sum crosses lanes. */
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>

typedef __m512 vec;
enum { LANES = 16 };
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

/* 16 registers of 16 dwords, rows become columns: pairs of dwords, of qwords, of 128-bit lanes, twice. */
static inline void transpose_16x16(__m512i r[16]) {
    __m512i s[16];
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
}

static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * row_stride);
    transpose_16x16(r);
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

static void quantize(const float *x, const activations *acts, long token) {
    int8_t *q = acts->q + token * acts->row_bytes;
    for (long b = 0; b < acts->n_in / BLOCK; b++) {
        __m512 low = _mm512_loadu_ps(x + b * BLOCK), high = _mm512_loadu_ps(x + b * BLOCK + 16);
        float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
        __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)); /* rounds ties to even */
        __m512i r = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
        int8_t *to = q + activation_at(b * BLOCK);
        _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(p));
        _mm_storeu_si128((__m128i *)(to + 64), _mm512_cvtepi32_epi8(r));
        acts->scale[token * acts->n_blocks + b] = largest / 127;
        acts->sum[token * acts->n_blocks + b] = _mm512_reduce_add_epi32(_mm512_add_epi32(p, r));
    }
}

/* ---- a group of 4 blocks: the first 16 quants of each, and the other 16 of each, as unsigned bytes ---- */

#define INLINE static inline __attribute__((always_inline))

INLINE void unpack_group(const weight_type type, const weight *w, const uint8_t *row, long group,
                         __m512i *low, __m512i *high) {
    if (type == Q8_0) {
        *low = _mm512_loadu_si512(row + w->q + group * GROUP);
        *high = _mm512_loadu_si512(row + w->q + group * GROUP + 64);
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i both = _mm512_loadu_si512(row + w->q + group * 64);
    *low = _mm512_and_si512(both, nibble);
    *high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    if (type == Q5_0 || type == Q5_1) {
        const __m512i fifth = _mm512_set1_epi8(16);
        uint64_t bits[2];
        memcpy(bits, row + w->high + group * 16, 16);
        *low = _mm512_mask_add_epi8(*low, bits[0], *low, fifth);
        *high = _mm512_mask_add_epi8(*high, bits[1], *high, fifth);
    }
}

/* 16 blocks' scales, or minima, as float; 0 from `n` on. */
INLINE __m512 load_scales(const uint8_t *p, long n) {
    if (n >= 16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}

/* -zero * sum of 16 blocks' activations: what turns products with unsigned quants into signed ones. */
INLINE __m512i corrections(const weight_type type, const int32_t *sums) {
    const int shift = type == Q4_0 ? 3 : type == Q5_0 ? 4 : 7;
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_loadu_si512(sums), shift));
}

/* ---- one token ---- */

/* Group g of 4: lane i takes block 4g + i / 4 of 16. */
INLINE __m512i block_of_lane(int g) {
    return _mm512_add_epi32(_mm512_set1_epi32(4 * g), _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0));
}

/* How far ahead of its use a row is asked for: the same place in the next rows of the same worker. */
enum { ROWS = 4 };

/* One block of four rows, 16 bytes of each: the first quants, and the other 16. */
INLINE void unpack_four(const weight_type type, const weight *w, const uint8_t *const rows[4], long block,
                        __m512i *low, __m512i *high) {
    const long at = w->q + (type == Q8_0 ? block / 4 * GROUP + block % 4 * 16 : block * 16);
    __m512i both = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at)));
    both = _mm512_inserti32x4(both, _mm_loadu_si128((const __m128i *)(rows[1] + at)), 1);
    both = _mm512_inserti32x4(both, _mm_loadu_si128((const __m128i *)(rows[2] + at)), 2);
    both = _mm512_inserti32x4(both, _mm_loadu_si128((const __m128i *)(rows[3] + at)), 3);
    if (type == Q8_0) {
        __m512i other = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at + 64)));
        other = _mm512_inserti32x4(other, _mm_loadu_si128((const __m128i *)(rows[1] + at + 64)), 1);
        other = _mm512_inserti32x4(other, _mm_loadu_si128((const __m128i *)(rows[2] + at + 64)), 2);
        *high = _mm512_inserti32x4(other, _mm_loadu_si128((const __m128i *)(rows[3] + at + 64)), 3);
        *low = both;
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    *low = _mm512_and_si512(both, nibble);
    *high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    if (type != Q5_0 && type != Q5_1) return;
    uint16_t bits[2][4];
    for (int r = 0; r < 4; r++) {
        memcpy(&bits[0][r], rows[r] + w->high + block / 4 * 16 + block % 4 * 2, 2);
        memcpy(&bits[1][r], rows[r] + w->high + block / 4 * 16 + block % 4 * 2 + 8, 2);
    }
    uint64_t masks[2];
    memcpy(masks, bits, 16);
    *low = _mm512_mask_add_epi8(*low, masks[0], *low, fifth);
    *high = _mm512_mask_add_epi8(*high, masks[1], *high, fifth);
}

/* Four f16 numbers, one of each row, each in four lanes. */
INLINE __m512 four_scales(const uint8_t *const rows[4], long at) {
    uint16_t halves[4];
    for (int r = 0; r < 4; r++) memcpy(&halves[r], rows[r] + at, 2);
    int64_t together;
    memcpy(&together, halves, 8);
    __m512 four = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(together)));
    return _mm512_permutexvar_ps(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), four);
}

/* The refined blocks of four rows; sums[4r..4r+3] are row r's. */
INLINE __m512 dot_rest(const weight_type type, const weight *w, const uint8_t *const rows[4],
                       const activations *acts, long token) {
    const long set = token / TOGETHER, at = token * acts->max_rest;
    __m512 sums = _mm512_setzero_ps();
    for (long i = 0; i < acts->n_rest[set]; i++) {
        const long block = acts->rest_block[set * acts->max_rest + i];
        const int8_t *rest = acts->rest + (at + i) * BLOCK;
        const __m512 scale = _mm512_set1_ps(acts->scale[token * acts->n_blocks + block] * REST_SCALE);
        const int32_t sum = acts->rest_sum[at + i];
        __m512i low, high, product = _mm512_maskz_set1_epi32(0x1111, -zero_of(type) * sum);
        unpack_four(type, w, rows, block, &low, &high);
        product = _mm512_dpbusd_epi32(product, low, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)rest)));
        product = _mm512_dpbusd_epi32(product, high,
                                      _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(rest + 16))));
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_mul_ps(four_scales(rows, 2 * block), scale), sums);
        if (has_minimum(type)) {
            const __m512 x_sum = _mm512_mul_ps(_mm512_maskz_mov_ps(0x1111, _mm512_set1_ps((float)sum)), scale);
            sums = _mm512_fmadd_ps(four_scales(rows, w->m + 2 * block), x_sum, sums);
        }
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
    __m512 totals[ROWS];
    UNROLL
    for (int r = 0; r < n_rows; r++) totals[r] = _mm512_setzero_ps();
    for (long block = 0; block < w->n_blocks; block += 16) {
        const long left = w->n_blocks - block;
        __m512 scales[ROWS], x_scale = _mm512_loadu_ps(scale + block);
        __m512i correction = _mm512_setzero_si512();
        if (zero_of(type)) correction = corrections(type, sum + block);
        UNROLL
        for (int r = 0; r < n_rows; r++)
            scales[r] = _mm512_mul_ps(load_scales(row + r * stride + 2 * block, left), x_scale);
        if (has_minimum(type)) {
            __m512 x_sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sum + block)), x_scale);
            UNROLL
            for (int r = 0; r < n_rows; r++)
                totals[r] = _mm512_fmadd_ps(load_scales(row + r * stride + w->m + 2 * block, left), x_sum, totals[r]);
        }
        const int n_groups = left >= 16 ? 4 : (int)((left + 3) / 4);
        for (int g = 0; g < n_groups; g++) {
            const long group = block / 4 + g;
            const __m512i lanes = block_of_lane(g);
            const __m512i x_low = _mm512_loadu_si512(q + group * GROUP);
            const __m512i x_high = _mm512_loadu_si512(q + group * GROUP + 64);
            __m512i start = _mm512_setzero_si512();
            if (zero_of(type)) start = _mm512_maskz_permutexvar_epi32(0x1111, lanes, correction);
            UNROLL
            for (int r = 0; r < n_rows; r++) {
                __m512i low, high;
                unpack_group(type, w, row + r * stride, group, &low, &high);
                _mm_prefetch((const char *)(row + (r + n_rows) * stride + w->q + group * (type == Q8_0 ? 128 : 64)), _MM_HINT_T0);
                if (type == Q8_0)
                    _mm_prefetch((const char *)(row + (r + n_rows) * stride + w->q + group * 128 + 64), _MM_HINT_T0);
                __m512i product = _mm512_dpbusd_epi32(start, low, x_low);
                product = _mm512_dpbusd_epi32(product, high, x_high);
                totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product),
                                            _mm512_permutexvar_ps(lanes, scales[r]), totals[r]);
            }
        }
    }
    const uint8_t *rows[4];
    for (int r = 0; r < 4; r++) rows[r] = row + (r < n_rows ? r : 0) * stride;
    float rest[16];
    _mm512_storeu_ps(rest, dot_rest(type, w, rows, acts, token));
    for (int r = 0; r < n_rows; r++) {
        float more = (rest[4 * r] + rest[4 * r + 1]) + (rest[4 * r + 2] + rest[4 * r + 3]);
        out[r] = (_mm512_reduce_add_ps(totals[r]) + more) * w->factor;
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

/* ---- many tokens ---- */

/* A strip of 32 rows. quants[block][k] is 4 quants of each of 32 rows, k = 0..7; scales and minima are
 * [n_blocks][32]. */
typedef struct {
    uint8_t *quants;
    float *scales, *minima;
} panel;

INLINE panel make_panel(const weight_type type, const weight *w, long first, long last, void *scratch) {
    long groups = (w->n_blocks + 3) / 4, padded = groups * 4;
    panel p = {.quants = scratch};
    p.scales = (float *)(p.quants + padded * BLOCK * STRIP);
    p.minima = p.scales + padded * STRIP;
    for (long half = 0; half < 2; half++) {
        const uint8_t *rows[16];
        for (int i = 0; i < 16; i++) { /* a strip's missing rows repeat its last one */
            long row = first + half * 16 + i;
            rows[i] = w->data + (row < last ? row : last - 1) * w->row_bytes;
        }
        for (long group = 0; group < groups; group++) {
            __m512i low[16], high[16];
            for (int i = 0; i < 16; i++) unpack_group(type, w, rows[i], group, &low[i], &high[i]);
            transpose_16x16(low);
            transpose_16x16(high);
            uint8_t *to = p.quants + group * GROUP * STRIP + half * 64;
            for (int i = 0; i < 16; i++) { /* quarter i % 4 of the first half of block i / 4, then of the second */
                _mm512_store_si512(to + (i / 4 * 8 + i % 4) * 128, low[i]);
                _mm512_store_si512(to + (i / 4 * 8 + 4 + i % 4) * 128, high[i]);
            }
        }
        for (long block = 0; block < w->n_blocks; block += 16) {
            long n = smaller(w->n_blocks - block, 16);
            for (int which = 0; which <= has_minimum(type); which++) {
                __m512i values[16];
                for (int i = 0; i < 16; i++) {
                    __m512 v = load_scales(rows[i] + (which ? w->m : 0) + 2 * block, n);
                    values[i] = _mm512_castps_si512(_mm512_mul_ps(v, _mm512_set1_ps(w->factor)));
                }
                transpose_16x16(values);
                float *to = (which ? p.minima : p.scales) + block * STRIP + half * 16;
                for (int i = 0; i < n; i++) _mm512_store_si512(to + i * STRIP, values[i]);
            }
        }
    }
    return p;
}

typedef TILE_BLOCK(TILE_TOKENS) tile_block;

/* Adds one block's products of 32 rows and the tokens of a tile. */
INLINE void panel_block(const weight_type type, const panel *p, const tile_block *x, __m512 left[TILE_TOKENS],
                        __m512 right[TILE_TOKENS]) {
    const uint8_t *quants = p->quants + x->block * BLOCK * STRIP;
    const int shift = type == Q4_0 ? 3 : type == Q5_0 ? 4 : 7; /* zero_of(type) = 1 << shift */
    __m512i a[TILE_TOKENS], c[TILE_TOKENS];
    UNROLL
    for (int t = 0; t < TILE_TOKENS; t++) {
        a[t] = _mm512_setzero_si512();
        if (zero_of(type)) a[t] = _mm512_slli_epi32(_mm512_set1_epi32(x->minus_sum[t]), shift);
        c[t] = a[t];
    }
    UNROLL
    for (int k = 0; k < 8; k++) {
        const __m512i one = _mm512_load_si512(quants + k * 128), two = _mm512_load_si512(quants + k * 128 + 64);
        UNROLL
        for (int t = 0; t < TILE_TOKENS; t++) {
            const __m512i inputs = _mm512_set1_epi32(x->q[k][t]);
            a[t] = _mm512_dpbusd_epi32(a[t], one, inputs);
            c[t] = _mm512_dpbusd_epi32(c[t], two, inputs);
        }
    }
    const float *scales = p->scales + x->block * STRIP, *minima = p->minima + x->block * STRIP;
    const __m512 d = _mm512_load_ps(scales), e = _mm512_load_ps(scales + 16);
    UNROLL
    for (int t = 0; t < TILE_TOKENS; t++) {
        const __m512 s = _mm512_set1_ps(x->scale[t]);
        left[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[t]), _mm512_mul_ps(d, s), left[t]);
        right[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[t]), _mm512_mul_ps(e, s), right[t]);
    }
    if (!has_minimum(type)) return;
    const __m512 m = _mm512_load_ps(minima), n = _mm512_load_ps(minima + 16);
    UNROLL
    for (int t = 0; t < TILE_TOKENS; t++) {
        const __m512 s = _mm512_set1_ps(x->scale[t] * (float)x->minus_sum[t]);
        left[t] = _mm512_fnmadd_ps(m, s, left[t]);
        right[t] = _mm512_fnmadd_ps(n, s, right[t]);
    }
}

INLINE void panel_strip(const weight_type type, const weight *w, const activations *acts, long first,
                        long last, float *out, long stride, void *scratch) {
    panel p = make_panel(type, w, first, last, scratch);
    const uint32_t have = last - first >= 32 ? 0xffffffffu : (1u << (last - first)) - 1;
    for (long token = 0; token < acts->n_tokens; token += TILE_TOKENS) {
        const uint8_t *x = acts->tiles + token / TILE_TOKENS * acts->tile_stride;
        const long n = w->n_blocks + acts->n_rest[token / TOGETHER];
        __m512 left[TILE_TOKENS], right[TILE_TOKENS];
        for (int t = 0; t < TILE_TOKENS; t++) left[t] = right[t] = _mm512_setzero_ps();
        for (long i = 0; i < n; i++, x += tile_block_bytes(TILE_TOKENS))
            panel_block(type, &p, (const tile_block *)x, left, right);
        for (long t = 0; t < smaller(acts->n_tokens - token, TILE_TOKENS); t++) {
            float *to = out + (token + t) * stride + first;
            _mm512_mask_storeu_ps(to, (__mmask16)have, left[t]);
            _mm512_mask_storeu_ps(to + 16, (__mmask16)(have >> 16), right[t]);
        }
    }
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
    enum { SUMS = 12 }; /* enough of them to hide the latency of each */
    __m512i sums[SUMS], total = _mm512_setzero_si512(), x = _mm512_set1_epi8(3);
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_setzero_si512();
    for (long n = 0; n < rounds; n++) {
        __asm__ volatile("" : "+v"(x)); /* x may have changed, for all that the compiler knows */
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
    }
    for (int i = 0; i < SUMS; i++) total = _mm512_add_epi32(total, sums[i]);
    *sink += (float)_mm512_reduce_add_epi32(total);
    return (double)rounds * SUMS * 64;
}

const kernels avx512_kernels = {
    "avx512", TILE_TOKENS, FEW_TOKENS, quantize, refine, multiply_blocks, multiply_floats, rms_norm_one, swiglu_run, rope_one, to_f16,
    attend_span, attend_tile, multiply_registers,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
