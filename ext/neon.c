/* Armv8-A as every 64-bit Arm has it.
 *
 * Products of bytes have 16 bits and are added up there, in neighbouring lanes for a row's neighbouring elements,
 * until another could overflow; then lanes are added in pairs. */
#if defined(__aarch64__)
enum { TOKENS = 6, PAIRS = 0, TOTALS = 4 };
#include "neon_blocks.h"

/* How many products of bytes 16 bits can sum up: 8 of 31 * 127 or of 32 * 127, 2 of 128 * 127. Half a block has 4. */
INLINE int together(const weight_type type) { return type == Q8_0 || has_table(type) ? 2 : n_fours(type); }

/* Adds the products of 4 rows and a token in a step of a block to words, full words to sums. */
INLINE void add_products(const weight_type type, int step, int8x16_t q, const int32_t *four, int16x8_t *upper,
                         int16x8_t *lower, int32x4_t *sums) {
    const int in_words = step % together(type);
    const int8x16_t v = vreinterpretq_s8_s32(vld1q_dup_s32(four));
    *upper = in_words ? vmlal_s8(*upper, vget_low_s8(q), vget_low_s8(v)) : vmull_s8(vget_low_s8(q), vget_low_s8(v));
    *lower = in_words ? vmlal_high_s8(*lower, q, v) : vmull_high_s8(q, v);
    if (in_words + 1 == together(type))
        *sums = vaddq_s32(*sums, vpaddq_s32(vpaddlq_s16(*upper), vpaddlq_s16(*lower)));
}

INLINE void block_products(const weight_type type, const int n, const uint8_t *block, const int half,
                           const int column, const uint8_t *x, int32x4_t *sums) {
    int16x8_t upper[TOKENS], lower[TOKENS]; /* of rows 0, 1 and of rows 2, 3 */
    UNROLL
    for (int i = 0; i < n_fours(type); i++) {
        const int r = four_of(type, half, i);
        const int8x16_t q = unpack(type, block, r, column);
        UNROLL
        for (int t = 0; t < n; t++)
            add_products(type, i, q, (const int32_t *)inputs(x, ((r % 2 * 4 + r / 2) * n + t) * 4), &upper[t],
                         &lower[t], &sums[t]);
    }
}

static MULTIPLY_TILE(multiply_any)
static MULTIPLY_BLOCKS(multiply_blocks, multiply_any)

static double multiply_registers(long rounds, float *sink) {
    enum { SUMS = 16 }; /* enough of them to hide the latency of each */
    int16x8_t sums[SUMS], total = vdupq_n_s16(0);
    int8x16_t x = vdupq_n_s8(3);
    for (int i = 0; i < SUMS; i++) sums[i] = vdupq_n_s16(0);
    for (long n = 0; n < rounds; n++) {
        __asm__ volatile("" : "+w"(x)); /* x may have changed, for all that the compiler knows */
        UNROLL
        for (int i = 0; i < SUMS; i++) sums[i] = vmlal_s8(sums[i], vget_low_s8(x), vget_low_s8(x));
    }
    for (int i = 0; i < SUMS; i++) total = vaddq_s16(total, sums[i]);
    *sink += vaddvq_s16(total);
    return (double)rounds * SUMS * 8;
}

LEVEL(neon, TOKENS, 4, multiply_blocks, attend_tile, NULL)
#endif
