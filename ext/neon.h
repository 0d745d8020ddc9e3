/* Arm: vectors of 4 floats for generic.h, and how blocks are read. neon.c, dotprod.c, i8mm.c and accelerate.c choose
 * their instruction set and include this file.
 *
 * A register holds 4 quants of each of 4 rows, a column of the strip. */
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
        float largest = vmaxvq_f32(top), inverse = finite_inverse(127, largest); /* NaN is the largest, and becomes 0 */
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

/* ---- blocks ---- */

/* All ones in each byte whose bit is not set, from the 16 bytes of bits of 16 rows. */
INLINE uint8x16_t missing(uint8x16_t bits, int column, int half) {
    static const uint8_t two[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    static const uint8_t one[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t which = vaddq_u8(vld1q_u8(two), vdupq_n_u8((uint8_t)(column % 4 * 2 + half * 8)));
    return vtstq_u8(vqtbl1q_u8(vmvnq_u8(bits), which), vld1q_u8(one));
}

/* Quarter k of 4 rows (column 0..7 of the strip): elements 4k..4k+3, and 16 + those, as signed bytes. A fifth bit that
 * is missing becomes the sign: 16 bit + nibble - 16 = nibble - 16 (1 - bit). */
INLINE void unpack(const weight_type type, const weight *w, const uint8_t *block, int k, int column, int8x16_t *low,
                   int8x16_t *high) {
    const uint8_t *q = block + w->q + k * 128 + column * 16;
    const uint8x16_t both = vld1q_u8(q), upper = vshrq_n_u8(both, 4);
    if (type == Q8_0) {
        *low = vreinterpretq_s8_u8(veorq_u8(both, vdupq_n_u8(0x80)));
        *high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(q + 512), vdupq_n_u8(0x80)));
    } else if (has_fifth_bits(type)) {
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
