/* Products of blocks on Arm. neon.c, dotprod.c and i8mm.c include this file, define block_products, and say how many TOKENS
 * a tile has at most, whether sums are of PAIRS of tokens, and how many TOTALS of 4 rows and a token registers hold beside
 * what a block's products need. */
#include "neon.h"

/* Sums of products over the elements of a block. */
enum { EVEN = PAIRS, WIDE = 1 }; /* blocks.h says what they are */

INLINE int at_once(const int n) { return n == 1 ? STRIP / LANES : 4 * n <= TOTALS ? 4 : 2 * n <= TOTALS ? 2 : 1; }

/* Adds those of 4 rows (column 0..7 of the strip) with the n tokens of a tile_block to sums: of the first half of the
 * block or the last, or, if halves have no scales of their own, of all of it. */
INLINE void block_products(const weight_type type, const int n, const uint8_t *block, const int half,
                           const int column, const uint8_t *x, int32x4_t *sums);

/* Which four is the i-th of those. */
INLINE int four_of(const weight_type type, const int half, const int i) { return has_halves(type) ? 2 * i + half : i; }
INLINE int n_fours(const weight_type type) { return has_halves(type) ? 4 : 8; }

/* sums[i] are those of token i and 4 rows. Where tokens come in PAIRS they are, for an even i, those of tokens i
 * and i + 1 with row 0 and then with row 1, and sums[i + 1] those with rows 2 and 3. What each of 4 rows has, or
 * each token, is spread over lanes in the same way. */
INLINE float32x4_t by_row(float32x4_t rows, int i) {
    return !PAIRS ? rows : i % 2 ? vzip2q_f32(rows, rows) : vzip1q_f32(rows, rows);
}
INLINE float32x4_t by_token(const float *tokens, int i) {
    const float32x2_t pair = vld1_f32(tokens + i / 2 * 2);
    return PAIRS ? vcombine_f32(pair, pair) : vdupq_n_f32(tokens[i]);
}

/* Minus the sum of a token's inputs in one half of the block, out of both. */
INLINE float32x4_t by_half(const uint8_t *halves, const int half, const int i) {
    const int32_t *tokens = (const int32_t *)halves;
    const int32x2_t pair = vld1_s32(tokens + i / 2 * 2);
    const int32x4_t both = PAIRS ? vcombine_s32(pair, pair) : vdupq_n_s32(tokens[i]);
    return vcvtq_f32_s32(vshrq_n_s32(half ? both : vshlq_n_s32(both, 16), 16));
}

/* From pairs of tokens to one token with 4 rows. */
INLINE void part_tokens(const int n, float32x4_t *totals) {
    UNROLL
    for (int i = 0; PAIRS && i < n; i += 2) {
        const float32x4_t upper = totals[i], lower = totals[i + 1];
        totals[i] = vuzp1q_f32(upper, lower), totals[i + 1] = vuzp2q_f32(upper, lower);
    }
}

INLINE const int8_t *inputs(const uint8_t *x, int at) { return (const int8_t *)x + at; }

/* Adds a block of 4 rows times a tile_block of n tokens to totals. */
INLINE void add_block(const weight_type type, const int n, const uint8_t *block, const uint8_t *head,
                      const int column, const uint8_t *x, float32x4_t *totals) {
    int32x4_t sums[2][TOKENS]; /* of a half */
    UNROLL
    for (int half = 0; half < 1 + has_halves(type); half++) {
        UNROLL
        for (int i = 0; i < n; i++) sums[half][i] = vdupq_n_s32(0);
        block_products(type, n, block, half, column, x, sums[half]);
    }
    const scales s = scales_of(type, block, head, column);
    UNROLL
    for (int i = 0; i < n; i++) { /* sum of (q - zero) x = sum of q x - zero * sum of x */
        const float32x4_t scale = by_token((const float *)scale_at(x, n, 0), i);
        const float32x4_t minus_sum = by_token((const float *)minus_sum_at(x, n, 0), i);
        float32x4_t sum = vcvtq_f32_s32(sums[0][i]);
        if (zero_left(type)) sum = vfmaq_n_f32(sum, minus_sum, (float)zero_left(type));
        if (has_halves(type)) {
            sum = vmulq_f32(sum, by_row(s.d[0], i));
            sum = vfmaq_f32(sum, vcvtq_f32_s32(sums[1][i]), by_row(s.d[1], i));
            UNROLL
            for (int half = 0; half < 2 * has_minimum(type); half++)
                sum = vfmsq_f32(sum, by_half(minus_halves_at(x, n, 0), half, i), by_row(s.m[half], i));
            totals[i] = vfmaq_f32(totals[i], sum, scale);
            continue;
        }
        totals[i] = vfmaq_f32(totals[i], sum, vmulq_f32(by_row(s.d[0], i), scale));
        if (has_minimum(type)) totals[i] = vfmsq_f32(totals[i], by_row(s.m[0], i), by_token((const float *)offset_at(x, n, 0), i));
    }
}

#define FINISH_SUMS part_tokens
#include "blocks.h"

/* multiply_registers for products that are added up in 32 bits: 16 of these for each 128-bit register. There are
 * enough sums to hide the latency of each. */
#define MULTIPLY_REGISTERS(add_products_to, n_products)                                                       \
    static double multiply_registers(long rounds, float *sink) {                                              \
        enum { SUMS = 16 };                                                                                   \
        int32x4_t sums[SUMS], total = vdupq_n_s32(0);                                                         \
        int8x16_t x = vdupq_n_s8(3);                                                                          \
        for (int i = 0; i < SUMS; i++) sums[i] = vdupq_n_s32(0);                                              \
        for (long n = 0; n < rounds; n++) {                                                                   \
            __asm__ volatile("" : "+w"(x)); /* x may have changed, for all that the compiler knows */         \
            UNROLL                                                                                            \
            for (int i = 0; i < SUMS; i++) sums[i] = add_products_to(sums[i], x, x);                          \
        }                                                                                                     \
        for (int i = 0; i < SUMS; i++) total = vaddq_s32(total, sums[i]);                                     \
        *sink += (float)vaddvq_s32(total);                                                                    \
        return (double)rounds * SUMS * n_products;                                                            \
    }
