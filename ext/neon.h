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
static inline vec v_sqrt(vec x) { return vsqrtq_f32(x); }
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
        int16x8_t words[4];
        for (int i = 0; i < 4; i++) { /* rounds ties to even */
            int32x4_t even = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], inverse));
            int32x4_t odd = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], inverse));
            words[i] = vcombine_s16(vqmovn_s32(even), vqmovn_s32(odd));
        }
        vst1q_s8(out->q, vcombine_s8(vqmovn_s16(words[0]), vqmovn_s16(words[1])));
        vst1q_s8(out->q + 16, vcombine_s8(vqmovn_s16(words[2]), vqmovn_s16(words[3])));
        out->scale = largest / 127;
        out->half = vaddvq_s16(vaddq_s16(words[0], words[1])); /* at most 16 * 127 */
        out->sum = out->half + vaddvq_s16(vaddq_s16(words[2], words[3]));
    }
}

/* ---- blocks ---- */

/* 16 bytes shifted by a constant, which may be none. */
INLINE uint8x16_t shift_right(uint8x16_t x, const int n) {
    switch (n) {
    case 1: return vshrq_n_u8(x, 1);
    case 2: return vshrq_n_u8(x, 2);
    case 3: return vshrq_n_u8(x, 3);
    case 4: return vshrq_n_u8(x, 4);
    case 5: return vshrq_n_u8(x, 5);
    case 6: return vshrq_n_u8(x, 6);
    case 7: return vshrq_n_u8(x, 7);
    default: return x;
    }
}
INLINE uint8x16_t shift_left(uint8x16_t x, const int n) {
    switch (n) {
    case 1: return vshlq_n_u8(x, 1);
    case 2: return vshlq_n_u8(x, 2);
    case 3: return vshlq_n_u8(x, 3);
    case 4: return vshlq_n_u8(x, 4);
    case 5: return vshlq_n_u8(x, 5);
    case 6: return vshlq_n_u8(x, 6);
    case 7: return vshlq_n_u8(x, 7);
    default: return x;
    }
}

/* Four r of 4 rows (column 0..7 of the strip), from bit 0 on, with others above them. */
INLINE uint8x16_t bits_of(const int bits, const uint8_t *from, const int r, const int column) {
    const int fours = 8 / bits;
    return shift_right(vld1q_u8(from + r / fours * 128 + column * 16), r % fours * bits);
}

/* The upper bits of four r of 4 rows: of quants with a zero as signed bytes, in which the highest bit is the sign, if
 * it is missing. `sli` puts them in front of the lower ones. */
INLINE uint8x16_t upper_bits(const weight_type type, const uint8_t *from, const int r, const int column) {
    const int bits = high_bits(type), fours = 8 / bits;
    if (!zero_of(type)) return vandq_u8(bits_of(bits, from, r, column), vdupq_n_u8((uint8_t)((1 << bits) - 1)));
    const uint8x16_t signs = vdupq_n_u8(bits == 1 ? 0xff : 0xaa);
    const uint8x16_t all = veorq_u8(vld1q_u8(from + r / fours * 128 + column * 16), signs);
    const int8x16_t top = vreinterpretq_s8_u8(shift_left(all, 8 - (r % fours + 1) * bits));
    return vreinterpretq_u8_s8(bits == 1 ? vshrq_n_s8(top, 7) : vshrq_n_s8(top, 6));
}

/* Four r of 4 rows as signed bytes: less their zero, unless that is left. */
INLINE int8x16_t unpack(const weight_type type, const uint8_t *block, const int r, const int column) {
    const int low = low_bits(type);
    uint8x16_t q = bits_of(low, block + layout_of(type).low, r, column);
    if (type == Q8_0) return vreinterpretq_s8_u8(veorq_u8(q, vdupq_n_u8(0x80)));
    if (high_bits(type)) {
        const uint8x16_t upper = upper_bits(type, block + layout_of(type).high, r, column);
        return vreinterpretq_s8_u8(low == 2 ? vsliq_n_u8(q, upper, 2) : vsliq_n_u8(q, upper, 4));
    }
    if (r % (8 / low) < 8 / low - 1) q = vandq_u8(q, vdupq_n_u8((uint8_t)((1 << low) - 1)));
    return has_table(type) ? vqtbl1q_s8(vld1q_s8(iq4_values), q) : vreinterpretq_s8_u8(q);
}

/* What is still to be subtracted from unpacked quants. */
INLINE int zero_left(const weight_type type) { return type == Q4_0 ? 8 : 0; }

/* Scales and minima of 4 rows; of a block's halves, if each has its own. */
typedef struct {
    float32x4_t d[2], m[2];
} scales;

INLINE float32x4_t numbers_of(int16x4_t words) { return vcvtq_f32_s32(vmovl_s16(words)); }

/* Those of 4 rows that are bytes. */
INLINE float32x4_t load_small(const uint8_t *from) {
    return numbers_of(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vld1_dup_s32((const int32_t *)from)))));
}

INLINE scales scales_of(const weight_type type, const uint8_t *block, const uint8_t *head,
                        const int column) {
    const uint8_t *from = has_super_blocks(type) ? head : block;
    const float32x4_t d = v_load_f16((const uint16_t *)from + 4 * column);
    const uint8_t *minima = from + (has_super_blocks(type) ? 2 * STRIP : layout_of(type).m);
    const float32x4_t m = has_minimum(type) ? v_load_f16((const uint16_t *)minima + 4 * column) : d;
    scales s = {{d, d}, {m, m}};
    if (has_halves(type)) { /* in pairs */
        const int8x8_t pairs = vld1_s8((const int8_t *)block + 8 * column);
        const int16x8_t words = vmovl_s8(type == Q2_K ? vand_s8(pairs, vdup_n_s8(15)) : pairs);
        s.d[0] = vmulq_f32(d, numbers_of(vget_low_s16(vuzp1q_s16(words, words))));
        s.d[1] = vmulq_f32(d, numbers_of(vget_low_s16(vuzp2q_s16(words, words))));
        if (!has_minimum(type)) return s;
        const int16x8_t upper = vreinterpretq_s16_u16(vmovl_u8(vshr_n_u8(vreinterpret_u8_s8(pairs), 4)));
        s.m[0] = vmulq_f32(m, numbers_of(vget_low_s16(vuzp1q_s16(upper, upper))));
        s.m[1] = vmulq_f32(m, numbers_of(vget_low_s16(vuzp2q_s16(upper, upper))));
    } else if (has_super_blocks(type)) {
        s.d[0] = vmulq_f32(d, load_small(block + 4 * column));
        if (has_minimum(type)) s.m[0] = vmulq_f32(m, load_small(block + layout_of(type).m + 4 * column));
    }
    return s;
}
