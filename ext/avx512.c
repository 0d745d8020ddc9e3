/* x86-64 with AVX-512 and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later).
 *
 * A register holds 4 quants of each of 16 rows. dpbusd multiplies them by the same 4 inputs of one token, which
 * are broadcast, and adds them to 16 sums; after a block the sums become float and are scaled. No sum ever
 * crosses lanes. A strip of 32 rows times 6 tokens has 12 sums, enough to hide what each has to wait for. */
#include "kernels.h"

#if defined(__x86_64__)
TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
       "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include "avx512.h"

/* ---- products of blocks ---- */

enum { TOKENS = 6, EVEN = 0, WIDE = 2 }; /* blocks.h says what they are */

INLINE int at_once(const int n) { return n > 0; } /* a column is a whole strip */

INLINE __m512i broadcast_int(const uint8_t *p) { return _mm512_set1_epi32(read_i32(p)); }

INLINE __m512 broadcast_float(const uint8_t *p) { return _mm512_castsi512_ps(broadcast_int(p)); }

/* Adds a block of a strip's 32 rows times a tile_block x of n tokens to left (rows 0-15) and right. */
INLINE void add_whole(const weight_type type, const int n, const uint8_t *block, const uint8_t *head,
                      const uint8_t *x, __m512 *left, __m512 *right) {
    const __m512i zero = _mm512_set1_epi16((short)zero_of(type));
    /* A single token's two sums would wait for each other: it gets two more, for the other elements. */
    const int more = n == 1;
    __m512i a[2][TOKENS], b[2][TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) { /* sum of (q - zero) x = sum of q x - zero * sum of x */
        a[more][t] = _mm512_setzero_si512(), b[more][t] = a[more][t], a[0][t] = a[more][t];
        if (zero_of(type)) a[0][t] = _mm512_madd_epi16(broadcast_int(minus_halves_at(x, n, t)), zero);
        b[0][t] = a[0][t];
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
        const __m512i low[2] = {unpack(type, block, 2 * k, 0), unpack(type, block, 2 * k, 1)};
        const __m512i high[2] = {unpack(type, block, 2 * k + 1, 0), unpack(type, block, 2 * k + 1, 1)};
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m512i first = broadcast_int(x + (k * n + t) * 4);
            a[0][t] = _mm512_dpbusd_epi32(a[0][t], low[0], first);
            b[0][t] = _mm512_dpbusd_epi32(b[0][t], low[1], first);
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m512i other = broadcast_int(x + ((4 + k) * n + t) * 4);
            a[more][t] = _mm512_dpbusd_epi32(a[more][t], high[0], other);
            b[more][t] = _mm512_dpbusd_epi32(b[more][t], high[1], other);
        }
    }
    const scales s = scales_of(type, block, head, 0), z = scales_of(type, block, head, 1);
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 scale = broadcast_float(scale_at(x, n, t));
        if (more) a[0][t] = _mm512_add_epi32(a[0][t], a[1][t]), b[0][t] = _mm512_add_epi32(b[0][t], b[1][t]);
        left[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[0][t]), _mm512_mul_ps(s.d[0], scale), left[t]);
        right[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[0][t]), _mm512_mul_ps(z.d[0], scale), right[t]);
    }
    if (!has_minimum(type)) return;
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 offset = broadcast_float(offset_at(x, n, t));
        left[t] = _mm512_fnmadd_ps(s.m[0], offset, left[t]);
        right[t] = _mm512_fnmadd_ps(z.m[0], offset, right[t]);
    }
}

/* The same where halves of a block have scales, of 16 rows: two sums of each token, for the first elements and the last,
 * are as independent as those of two sides. */
INLINE void add_halves(const weight_type type, const int n, const uint8_t *block, const uint8_t *head,
                       const int side, const uint8_t *x, __m512 *totals) {
    const __m512i zeros[2] = {_mm512_set1_epi32(zero_of(type)), _mm512_set1_epi32(zero_of(type) << 16)};
    __m512i sums[2][TOKENS];
    UNROLL
    for (int half = 0; half < 2; half++)
        UNROLL
        for (int t = 0; t < n; t++)
            sums[half][t] = _mm512_madd_epi16(broadcast_int(minus_halves_at(x, n, t)), zeros[half]); /* or 0 */
    UNROLL
    for (int r = 0; r < 8; r++) {
        const __m512i q = unpack(type, block, r, side);
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m512i four = broadcast_int(x + ((r % 2 * 4 + r / 2) * n + t) * 4);
            sums[r % 2][t] = _mm512_dpbusd_epi32(sums[r % 2][t], q, four);
        }
    }
    const scales s = scales_of(type, block, head, side);
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 scale = broadcast_float(scale_at(x, n, t));
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[0][t]), s.d[0]);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1][t]), s.d[1], sum);
        if (has_minimum(type)) {
            const __m512i halves = broadcast_int(minus_halves_at(x, n, t));
            const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(halves, 16), 16);
            const __m512i last = _mm512_srai_epi32(halves, 16);
            sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(first), s.m[0], sum);
            sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(last), s.m[1], sum);
        }
        totals[t] = _mm512_fmadd_ps(sum, scale, totals[t]);
    }
}

INLINE void add_block(const weight_type type, const int n, const uint8_t *block, const uint8_t *head,
                      const int column, const uint8_t *x, __m512 *totals) {
    (void)column; /* always the first */
    if (!has_halves(type)) {
        add_whole(type, n, block, head, x, totals, totals + n);
        return;
    }
    add_halves(type, n, block, head, 0, x, totals);
    if (n > 1) IN_ORDER;
    add_halves(type, n, block, head, 1, x, totals + n);
}

#include "blocks.h"
static MULTIPLY_TILE(multiply_any)
MULTIPLY_BLOCKS(avx512_multiply_blocks, multiply_any)

static double multiply_registers(long rounds, float *sink) {
    enum { SUMS = 12 }; /* enough of them to hide the latency of each */
    __m512i sums[SUMS], total = _mm512_setzero_si512(), x = _mm512_set1_epi8(3);
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_setzero_si512();
    for (long n = 0; n < rounds; n++) {
        __asm__ volatile("" : "+v"(x)); /* x may have changed, for all that the compiler knows */
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
    }
    for (int i = 0; i < SUMS; i++) total = _mm512_add_epi32(total, sums[i]);
    *sink += (float)_mm512_reduce_add_epi32(total);
    return (double)rounds * SUMS * 64;
}

LEVEL(avx512, TOKENS, 4, avx512_multiply_blocks, attend_tile, NULL)
TARGET_END
#endif
