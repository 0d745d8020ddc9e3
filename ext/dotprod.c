/* Armv8.2-A with dot products of bytes (Apple M1, Cortex-A76, Graviton 2 and later).
 *
 * sdot multiplies 4 quants of each of 4 rows by the same 4 inputs of one token, which are a lane of another register,
 * and adds them to 4 sums. */
#if defined(__aarch64__)
#include "kernels.h"

#if !defined(__ARM_FEATURE_DOTPROD) /* clang before 16 declares the instructions for those who have them always */
#define __ARM_FEATURE_DOTPROD 1
#endif
TARGET("dotprod", "arch=armv8.2-a+dotprod")
enum { TOKENS = 8, PAIRS = 0, TOTALS = 8 };
#include "neon_blocks.h"

/* Adds 4 elements of 4 rows times the i-th four inputs of a tile_block. */
INLINE int32x4_t dot(int32x4_t sums, int8x16_t q, const uint8_t *x, int i) {
    const int8x16_t fours = vld1q_s8(inputs(x, i / 4 * 16));
    switch (i % 4) {
    case 0: return vdotq_laneq_s32(sums, q, fours, 0);
    case 1: return vdotq_laneq_s32(sums, q, fours, 1);
    case 2: return vdotq_laneq_s32(sums, q, fours, 2);
    default: return vdotq_laneq_s32(sums, q, fours, 3);
    }
}

INLINE void block_products(const weight_type type, const int n, const uint8_t *block, const int half,
                           const int column, const uint8_t *x, int32x4_t *sums) {
    UNROLL
    for (int i = 0; i < n_fours(type); i++) {
        const int r = four_of(type, half, i);
        const int8x16_t q = unpack(type, block, r, column);
        UNROLL
        for (int t = 0; t < n; t++) sums[t] = dot(sums[t], q, x, (r % 2 * 4 + r / 2) * n + t);
    }
}

MULTIPLY_TILE(dotprod_multiply_tile)
MULTIPLY_BLOCKS(dotprod_multiply_blocks, dotprod_multiply_tile)
MULTIPLY_REGISTERS(vdotq_s32, 16)
LEVEL(dotprod, TOKENS, 4, dotprod_multiply_blocks, attend_tile, NULL)
TARGET_END
#endif
