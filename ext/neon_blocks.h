/* Products of blocks on Arm: the loops over tokens and blocks. neon.c, dotprod.c and i8mm.c include this file and
 * define block_products and multiply_type. */
#include "neon.h"

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

INLINE const int8_t *inputs(const uint8_t *x, int at) { return (const int8_t *)x + at; }

/* Adds a block of 4 rows times a tile_block x of n tokens to totals. */
INLINE void add_block(const weight_type type, const int n, const weight *w, const uint8_t *block, int column,
                      const uint8_t *x, float32x4_t *totals) {
    int32x4_t sums[TILE_TOKENS];
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
        float32x4_t totals[STRIP / LANES][TILE_TOKENS];
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
        float results[TILE_TOKENS][STRIP];
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
