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

/* How far ahead of its use a strip is asked for, in bytes. */
enum { AHEAD = 8192 };

INLINE __m512i broadcast_int(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}

INLINE __m512 broadcast_float(const uint8_t *p) { return _mm512_castsi512_ps(broadcast_int(p)); }

/* Adds a block of a strip's 32 rows times a tile_block x of n tokens to left (rows 0-15) and right. */
INLINE void add_block(const weight_type type, const int n, const weight *w, const uint8_t *block,
                      const uint8_t *x, __m512 *left, __m512 *right) {
    const int shift = type == Q4_0 ? 3 : type == Q5_0 ? 4 : 7; /* zero_of(type) = 1 << shift */
    /* A single token's two sums would wait for each other: it gets two more, for the other elements. */
    const int more = n == 1;
    __m512i a[2][TILE_TOKENS], b[2][TILE_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) { /* sum of (q - zero) x = sum of q x - zero * sum of x */
        a[more][t] = _mm512_setzero_si512(), b[more][t] = a[more][t], a[0][t] = a[more][t];
        if (zero_of(type)) a[0][t] = _mm512_slli_epi32(broadcast_int(x + 36 * n + 4 * t), shift);
        b[0][t] = a[0][t];
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
        __m512i low[2], high[2];
        unpack(type, w, block, k, 0, &low[0], &high[0]);
        unpack(type, w, block, k, 1, &low[1], &high[1]);
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
    const __m512 d = load_scales(block), e = load_scales(block + 32);
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 scale = broadcast_float(x + 32 * n + 4 * t);
        if (more) a[0][t] = _mm512_add_epi32(a[0][t], a[1][t]), b[0][t] = _mm512_add_epi32(b[0][t], b[1][t]);
        left[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[0][t]), _mm512_mul_ps(d, scale), left[t]);
        right[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[0][t]), _mm512_mul_ps(e, scale), right[t]);
    }
    if (!has_minimum(type)) return;
    const __m512 m = load_scales(block + w->m), l = load_scales(block + w->m + 32);
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 scale = broadcast_float(x + 32 * n + 4 * t);
        const __m512 minus_sum = _mm512_mul_ps(_mm512_cvtepi32_ps(broadcast_int(x + 36 * n + 4 * t)), scale);
        left[t] = _mm512_fnmadd_ps(m, minus_sum, left[t]);
        right[t] = _mm512_fnmadd_ps(l, minus_sum, right[t]);
    }
}

/* All tokens, n at a time. */
INLINE void multiply_strip(const weight_type type, const int n, const weight *w, const activations *acts,
                           long strip, float *out, long stride) {
    const uint8_t *data = w->data + strip * w->strip_bytes;
    const long rows = smaller(w->n_out - strip * STRIP, STRIP);
    const uint32_t have = rows == STRIP ? 0xffffffffu : (1u << rows) - 1;
    const __m512 factor = _mm512_set1_ps(w->factor);
    for (long token = 0; token < acts->n_tokens; token += n) {
        const uint8_t *x = acts->tiles + token / n * acts->tile_stride;
        __m512 left[TILE_TOKENS], right[TILE_TOKENS];
        for (int t = 0; t < n; t++) left[t] = right[t] = _mm512_setzero_ps();
        for (long i = 0; i < acts->n_tile_blocks[token / n]; i++, x += tile_block_bytes(n)) {
            int32_t number;
            memcpy(&number, x + 40 * n, 4);
            const uint8_t *block = data + number * w->block_bytes;
            if (n == 1)
                for (long at = 0; at < w->block_bytes; at += 64)
                    _mm_prefetch((const char *)(block + AHEAD + at), _MM_HINT_T0);
            add_block(type, n, w, block, x, left, right);
        }
        for (long t = 0; t < smaller(acts->n_tokens - token, n); t++) {
            float *to = out + (token + t) * stride + strip * STRIP;
            _mm512_mask_storeu_ps(to, (__mmask16)have, _mm512_mul_ps(left[t], factor));
            _mm512_mask_storeu_ps(to + 16, (__mmask16)(have >> 16), _mm512_mul_ps(right[t], factor));
        }
    }
}

INLINE void multiply_type(const weight_type type, const weight *w, const activations *acts, long strip, float *out,
                          long stride) {
    if (acts->tile_tokens == 1)
        multiply_strip(type, 1, w, acts, strip, out, stride);
    else
        multiply_strip(type, TILE_TOKENS, w, acts, strip, out, stride);
}

MULTIPLY_BLOCKS(avx512_multiply_blocks)

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

LEVEL(avx512, TILE_TOKENS, 4, avx512_multiply_blocks, attend_tile, NULL)
TARGET_END
#endif
