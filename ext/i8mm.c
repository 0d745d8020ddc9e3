/* Armv8.6-A with matrix products of bytes (Apple M2, Graviton 3 and later).
 *
 * smmla multiplies 8 quants of each of 2 rows by 8 inputs of each of 2 tokens and adds them to 4 sums: twice the work
 * of a dot product. Neighbouring quarters of 4 rows are zipped for it. A single token would leave half of that
 * idle and is dotprod.c's. */
#if defined(__aarch64__)
#include "kernels.h"

#if !defined(__ARM_FEATURE_MATMUL_INT8) /* as in dotprod.c */
#define __ARM_FEATURE_MATMUL_INT8 1
#endif
TARGET("dotprod,i8mm", "arch=armv8.2-a+dotprod+i8mm")
enum { TOKENS = 8, PAIRS = 1, TOTALS = 4 };
#include "neon_blocks.h"

/* Rows 0, 1 and rows 2, 3 of two quarters: 8 elements of a row side by side. */
INLINE int8x16x2_t zip(int8x16_t quarter, int8x16_t next) {
    const int32x4_t a = vreinterpretq_s32_s8(quarter), b = vreinterpretq_s32_s8(next);
    return (int8x16x2_t){{vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b))}};
}

INLINE void add_products(const int n, int8x16x2_t rows, const int8_t *x, int32x4_t *sums) {
    UNROLL
    for (int i = 0; i < n; i += 2) {
        const int8x16_t v = vld1q_s8(x + i * 8);
        sums[i] = vmmlaq_s32(sums[i], rows.val[0], v);
        sums[i + 1] = vmmlaq_s32(sums[i + 1], rows.val[1], v);
    }
}

INLINE void block_products(const weight_type type, const int n, const uint8_t *block, const int half,
                           const int column, const uint8_t *x, int32x4_t *sums) {
    UNROLL
    for (int i = 0; i < n_fours(type); i++) {
        const int r = four_of(type, half, i), k = r / 2;
        if (k % 2) continue; /* has been its neighbour */
        const int8x16x2_t rows = zip(unpack(type, block, r, column), unpack(type, block, r + 2, column));
        add_products(n, rows, inputs(x, (r % 2 * 4 + k) * n * 4), sums);
    }
}

static MULTIPLY_TILE(multiply_pairs)

static void multiply_any(const weight *w, const token_tile *x, long strip, float *out, long stride) {
    (x->n == 1 ? dotprod_multiply_tile : multiply_pairs)(w, x, strip, out, stride);
}

static MULTIPLY_BLOCKS(multiply_blocks, multiply_any)
MULTIPLY_REGISTERS(vmmlaq_s32, 32)
LEVEL(i8mm, TOKENS, 8, multiply_blocks, attend_tile, NULL)
TARGET_END
#endif
