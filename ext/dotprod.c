/* Armv8.2-A with dot products of bytes (Apple M1, Cortex-A76, Graviton 2 and later).
 *
 * sdot multiplies 4 quants of each of 4 rows by the same 4 inputs of one token, which are a lane of another register,
 * and adds them to 4 sums. */
#if defined(__aarch64__)
#if defined(__clang__)
#if !defined(__ARM_FEATURE_DOTPROD) /* clang before 16 declares the instructions for those who have them always */
#define __ARM_FEATURE_DOTPROD 1
#endif
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "neon_blocks.h"

/* Adds 4 elements of 4 rows times those of each of n tokens. */
INLINE void add_products(const int n, int8x16_t q, const int8_t *x, int32x4_t *sums) {
    if (n == 1) {
        sums[0] = vdotq_s32(sums[0], q, vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)x)));
        return;
    }
    const int8x16_t four = vld1q_s8(x);
    const int8x8_t two = vld1_s8(x + 16);
    sums[0] = vdotq_laneq_s32(sums[0], q, four, 0);
    sums[1] = vdotq_laneq_s32(sums[1], q, four, 1);
    sums[2] = vdotq_laneq_s32(sums[2], q, four, 2);
    sums[3] = vdotq_laneq_s32(sums[3], q, four, 3);
    sums[4] = vdotq_lane_s32(sums[4], q, two, 0);
    sums[5] = vdotq_lane_s32(sums[5], q, two, 1);
}

INLINE void block_products(const weight_type type, const int n, const weight *w, const uint8_t *block, int column,
                           const uint8_t *x, int32x4_t *sums) {
    UNROLL
    for (int t = 0; t < n; t++) sums[t] = vdupq_n_s32(0);
    UNROLL
    for (int k = 0; k < 4; k++) {
        int8x16_t low, high;
        unpack(type, w, block, k, column, &low, &high);
        add_products(n, low, inputs(x, k * n * 4), sums);
        add_products(n, high, inputs(x, (4 + k) * n * 4), sums);
    }
}

INLINE void multiply_type(const weight_type type, const weight *w, const activations *acts, long strip, float *out,
                          long stride) {
    if (acts->tile_tokens == 1) {
        multiply_columns(type, 1, STRIP / LANES, 0, w, acts, strip, out, stride);
        return;
    }
    for (int column = 0; column < STRIP / LANES; column += 2)
        multiply_columns(type, TILE_TOKENS, 2, column, w, acts, strip, out, stride);
}

static double multiply_registers(long rounds, float *sink) {
    enum { SUMS = 16 }; /* enough of them to hide the latency of each */
    int32x4_t sums[SUMS], total = vdupq_n_s32(0);
    int8x16_t x = vdupq_n_s8(3);
    for (int i = 0; i < SUMS; i++) sums[i] = vdupq_n_s32(0);
    for (long n = 0; n < rounds; n++) {
        __asm__ volatile("" : "+w"(x)); /* x may have changed, for all that the compiler knows */
        UNROLL
        for (int i = 0; i < SUMS; i++) sums[i] = vdotq_s32(sums[i], x, x);
    }
    for (int i = 0; i < SUMS; i++) total = vaddq_s32(total, sums[i]);
    *sink += (float)vaddvq_s32(total);
    return (double)rounds * SUMS * 16;
}

const kernels dotprod_kernels = {
    "dotprod", TILE_TOKENS, 4, quantize, refine, multiply_blocks, multiply_floats, rms_norm_one, swiglu_run, rope_one,
    to_f16, cast, attend_span, attend_tile, multiply_registers, NULL,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
