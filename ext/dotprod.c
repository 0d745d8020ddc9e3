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
enum { PAIRS = 0 };
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

INLINE void block_products(const weight_type type, const int n, const int parts, const weight *w, const uint8_t *block,
                           int column, const uint8_t *x, sums_of_tokens *sums) {
    UNROLL
    for (int k = 0; k < 4; k++) {
        int8x16_t low, high;
        unpack(type, w, block, k, column, &low, &high);
        UNROLL
        for (int part = 0; part < parts; part++) {
            const uint8_t *of_part = x + part * tile_block_bytes(n);
            UNROLL
            for (int t = 0; t < n; t++) sums[part][t] = dot(sums[part][t], low, of_part, k * n + t);
            UNROLL
            for (int t = 0; t < n; t++) sums[part][t] = dot(sums[part][t], high, of_part, (4 + k) * n + t);
        }
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
