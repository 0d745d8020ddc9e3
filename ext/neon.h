/* Arm: vectors of 4 floats for generic.h, and what products of blocks have in common. neon.c, dotprod.c and i8mm.c
 * choose their instruction set, say how many TOKENS a tile has, include this file, and define at its end
 * block_products and multiply_type.
 *
 * A register holds 4 quants of each of 4 rows, a column of the strip. Quants become signed bytes here; what a
 * type subtracts from them beyond that is left to the sums. */
#include <arm_neon.h>

#include "kernels.h"

typedef float32x4_t vec;
enum { LANES = 4, VECTORS = 4 };
static inline vec v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vec x) { vst1q_f32(p, x); }
static inline vec v_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vec v_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vec v_set1(float x) { return vdupq_n_f32(x); }
static inline vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec v_sub(vec a, vec b) { return vsubq_f32(a, b); }
static inline vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec v_div(vec a, vec b) { return vdivq_f32(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec v_max(vec a, vec b) { return vmaxq_f32(a, b); }
static inline vec v_min(vec a, vec b) { return vminq_f32(a, b); }
/* x * 2^n by adding n to the exponent, in two steps since 2^n itself may be out of range. */
static inline vec v_times_power(vec x, vec n) {
    int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    int32x4_t rest = vsubq_s32(whole, half), bias = vdupq_n_s32(127);
    x = vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
}
static inline float v_sum(vec x) { return vaddvq_f32(x); }

/* The sums of four vectors. */
static inline void v_sum4(const vec x[4], float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
}

/* 4 rows of 4 become columns: by pairs of words, then of double words. */
static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    float32x4_t r[4];
    for (int i = 0; i < 4; i++) r[i] = vld1q_f32(rows + i * row_stride);
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    vst1q_f32(out, vreinterpretq_f32_f64(vtrn1q_f64(a, c)));
    vst1q_f32(out + out_stride, vreinterpretq_f32_f64(vtrn1q_f64(b, d)));
    vst1q_f32(out + 2 * out_stride, vreinterpretq_f32_f64(vtrn2q_f64(a, c)));
    vst1q_f32(out + 3 * out_stride, vreinterpretq_f32_f64(vtrn2q_f64(b, d)));
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    for (; i < n; i++) out[i] = f16_from_f32(x[i]);
}

#include "cast.h"

static void quantize(const float *x, long n_blocks, input_block *out) {
    for (; n_blocks-- > 0; x += BLOCK, out++) {
        float32x4_t v[8], top = vdupq_n_f32(0);
        for (int i = 0; i < 8; i++) {
            v[i] = vld1q_f32(x + 4 * i);
            top = vmaxq_f32(top, vabsq_f32(v[i]));
        }
        float largest = vmaxvq_f32(top), inverse = largest > 0 ? 127 / largest : 0;
        int16x8_t words[4], sum = vdupq_n_s16(0);
        for (int i = 0; i < 4; i++) { /* rounds ties to even */
            int32x4_t even = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], inverse));
            int32x4_t odd = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], inverse));
            words[i] = vcombine_s16(vqmovn_s32(even), vqmovn_s32(odd));
            sum = vaddq_s16(sum, words[i]);
        }
        vst1q_s8(out->q, vcombine_s8(vqmovn_s16(words[0]), vqmovn_s16(words[1])));
        vst1q_s8(out->q + 16, vcombine_s8(vqmovn_s16(words[2]), vqmovn_s16(words[3])));
        out->scale = largest / 127;
        out->sum = vaddvq_s16(sum); /* at most 32 * 127 */
    }
}

/* ---- products of blocks ---- */

/* GCC would mix the columns and put half of what they need aside on the stack. */
#if defined(__clang__)
#define IN_ORDER (void)0
#else
#define IN_ORDER __asm__ volatile("" ::: "memory")
#endif

/* How far ahead of its use a strip is asked for, in bytes. */
enum { AHEAD = 8192 };

/* Sums over the elements of a block of 4 rows (column 0..7 of the strip), for each of a tile_block's n tokens. */
INLINE void block_products(const weight_type type, const int n, const weight *w, const uint8_t *block, int column,
                           const uint8_t *x, int32x4_t *sums);

/* A strip times all tokens, in pieces that suit the registers. */
INLINE void multiply_type(const weight_type type, const weight *w, const activations *acts, long strip, float *out,
                          long stride);

/* All ones in each byte whose bit is not set, from the 16 bytes of bits of 16 rows. */
INLINE uint8x16_t missing(uint8x16_t bits, int column, int half) {
    static const uint8_t two[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    static const uint8_t one[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t which = vaddq_u8(vld1q_u8(two), vdupq_n_u8((uint8_t)(column % 4 * 2 + half * 8)));
    return vtstq_u8(vqtbl1q_u8(vmvnq_u8(bits), which), vld1q_u8(one));
}

/* Quarter k of 4 rows: elements 4k..4k+3, and 16 + those. A fifth bit that is missing is subtracted as the sign:
 * 16 bit + nibble - 16 = nibble - 16 (1 - bit). */
INLINE void unpack(const weight_type type, const weight *w, const uint8_t *block, int k, int column, int8x16_t *low,
                   int8x16_t *high) {
    const uint8_t *q = block + w->q + k * 128 + column * 16;
    const uint8x16_t both = vld1q_u8(q), upper = vshrq_n_u8(both, 4);
    if (type == Q8_0) {
        *low = vreinterpretq_s8_u8(veorq_u8(both, vdupq_n_u8(0x80)));
        *high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(q + 512), vdupq_n_u8(0x80)));
    } else if (type == Q5_0 || type == Q5_1) {
        const uint8x16_t bits = vld1q_u8(block + w->fifth + k * 32 + column / 4 * 16);
        *low = vreinterpretq_s8_u8(vsliq_n_u8(both, missing(bits, column, 0), 4));
        *high = vreinterpretq_s8_u8(vsliq_n_u8(upper, missing(bits, column, 1), 4));
    } else {
        *low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        *high = vreinterpretq_s8_u8(upper);
    }
}

/* What is still to be subtracted from unpacked quants. */
INLINE int zero_left(const weight_type type) { return type == Q4_0 ? 8 : type == Q5_1 ? -16 : 0; }

INLINE const int8_t *inputs(const uint8_t *x, int at) { return (const int8_t *)x + at; }

/* Adds a block of 4 rows times a tile_block x of n tokens to totals. */
INLINE void add_block(const weight_type type, const int n, const weight *w, const uint8_t *block, int column,
                      const uint8_t *x, float32x4_t *totals) {
    int32x4_t sums[TOKENS];
    block_products(type, n, w, block, column, x, sums);
    const float *scale = (const float *)(x + 32 * n);
    const int32_t *minus_sum = (const int32_t *)(x + 36 * n);
    const float32x4_t d = v_load_f16((const uint16_t *)block + 4 * column);
    const float32x4_t m = has_minimum(type) ? v_load_f16((const uint16_t *)(block + w->m) + 4 * column) : d;
    UNROLL
    for (int t = 0; t < n; t++) { /* sum of (q - zero) x = sum of q x - zero * sum of x */
        if (zero_left(type)) sums[t] = vmlaq_n_s32(sums[t], vdupq_n_s32(zero_left(type)), minus_sum[t]);
        totals[t] = vfmaq_f32(totals[t], vcvtq_f32_s32(sums[t]), vmulq_n_f32(d, scale[t]));
        if (has_minimum(type)) totals[t] = vfmsq_n_f32(totals[t], m, (float)minus_sum[t] * scale[t]);
    }
}

/* All tokens, n at a time, with `columns` vectors of 4 rows from column `first` on. */
INLINE void multiply_columns(const weight_type type, const int n, const int columns, int first, const weight *w,
                             const activations *acts, long strip, float *out, long stride) {
    const uint8_t *data = w->data + strip * w->strip_bytes;
    const long row = strip * STRIP + first * LANES, rows = smaller(w->n_out - row, columns * LANES);
    for (long token = 0; rows > 0 && token < acts->n_tokens; token += n) {
        const uint8_t *x = acts->tiles + token / n * acts->tile_stride;
        float32x4_t totals[STRIP / LANES][TOKENS];
        UNROLL
        for (int c = 0; c < columns; c++)
            UNROLL
            for (int t = 0; t < n; t++) totals[c][t] = vdupq_n_f32(0);
        for (long i = 0; i < acts->n_tile_blocks[token / n]; i++, x += tile_block_bytes(n)) {
            int32_t number;
            memcpy(&number, x + 40 * n, 4);
            const uint8_t *block = data + number * w->block_bytes;
            if (n == 1)
                for (long at = 0; at < w->block_bytes; at += 64) __builtin_prefetch(block + AHEAD + at);
            UNROLL
            for (int c = 0; c < columns; c++) {
                add_block(type, n, w, block, first + c, x, totals[c]);
                if (n > 1) IN_ORDER;
            }
        }
        float results[TOKENS][STRIP];
        UNROLL
        for (int c = 0; c < columns; c++)
            UNROLL
            for (int t = 0; t < n; t++) vst1q_f32(results[t] + c * LANES, vmulq_n_f32(totals[c][t], w->factor));
        for (long t = 0; t < smaller(acts->n_tokens - token, n); t++)
            memcpy(out + (token + t) * stride + row, results[t], (size_t)rows * sizeof(float));
    }
}

static void multiply_blocks(const weight *w, const activations *acts, long strip, float *out, long stride) {
    switch (w->type) { /* each with its type known to the compiler */
    case Q4_0: multiply_type(Q4_0, w, acts, strip, out, stride); break;
    case Q4_1: multiply_type(Q4_1, w, acts, strip, out, stride); break;
    case Q5_0: multiply_type(Q5_0, w, acts, strip, out, stride); break;
    case Q5_1: multiply_type(Q5_1, w, acts, strip, out, stride); break;
    default: multiply_type(Q8_0, w, acts, strip, out, stride); break;
    }
}
