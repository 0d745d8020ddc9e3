/* Apple's computers: as dotprod.c, but many tokens are multiplied by Apple's library Accelerate, which alone reaches
 * their matrix units.
 *
 * Two strips at a time become numbers and are multiplied by all tokens in float32. README.md has the arithmetic that
 * puts this before dotprod.c and behind i8mm.c. */
#include "kernels.h"

#if defined(HAVE_ACCELERATE)
TARGET("dotprod", "arch=armv8.2-a+dotprod")
#include "neon.h"

/* From Accelerate's cblas.h: c [m, n] = beta * c + alpha * a [m, k] @ b [k, n]; row by row, ld* floats from row to row. */
enum { ROW_MAJOR = 101, AS_IT_LIES = 111 };
#if defined(TINYLLAMA_EMULATE_ACCELERATE)
#include "../tests/ext/accelerate.h"
#else
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc);
#endif

/* Of a panel: rows of the weight, and inputs, 1 MB in all. How the library adds up may depend on these: they are the
 * same for any number of threads. */
enum { PANEL_STRIPS = 2, PANEL = PANEL_STRIPS * STRIP, INPUTS = 4096 };

/* Four elements of 4 rows: q * d + c, an element's rows side by side. */
INLINE void put_numbers(int8x16_t q, float32x4_t d, float32x4_t c, float *to) {
    static const uint8_t by_element[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    q = vqtbl1q_s8(q, vld1q_u8(by_element));
    const int16x8_t words[2] = {vmovl_s8(vget_low_s8(q)), vmovl_high_s8(q)};
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int32x4_t even = vmovl_s16(vget_low_s16(words[i])), odd = vmovl_high_s16(words[i]);
        vst1q_f32(to + 2 * i * PANEL, vfmaq_f32(c, vcvtq_f32_s32(even), d));
        vst1q_f32(to + (2 * i + 1) * PANEL, vfmaq_f32(c, vcvtq_f32_s32(odd), d));
    }
}

INLINE void numbers_of_block(const weight_type type, const uint8_t *block, const uint8_t *head,
                             const float32x4_t factor, float *to) {
    for (int column = 0; column < STRIP / LANES; column++, to += LANES) {
        const scales s = scales_of(type, block, head, column);
        UNROLL
        for (int r = 0; r < 8; r++) {
            const int half = has_halves(type) ? r % 2 : 0;
            const float32x4_t d = v_mul(s.d[half], factor);
            const float32x4_t m = has_minimum(type) ? v_mul(s.m[half], factor) : v_set1(0);
            const float32x4_t c = vfmsq_n_f32(m, d, (float)zero_left(type));
            put_numbers(unpack(type, block, r, column), d, c, to + (r % 2 * 16 + r / 2 * 4) * PANEL);
        }
    }
}

INLINE void numbers_of_blocks(const weight_type type, const weight *w, long strip, long first, long n, float *to) {
    const layout at = layout_of(type);
    const uint8_t *data = w->data + strip * w->strip_bytes;
    for (long i = first / BLOCK; i < (first + n) / BLOCK; i++, to += BLOCK * PANEL) {
        const uint8_t *block = data + block_place(at, i);
        for (long line = 0; line < at.block_bytes; line += 64) __builtin_prefetch(block + at.block_bytes + line);
        numbers_of_block(type, block, data + head_place(at, i), v_set1(w->factor), to);
    }
}

/* Rows behind the last repeat it. */
INLINE void numbers_of_rows(const weight_type type, const weight *w, long strip, long first, long n, float *to) {
    for (long row = 0; row < STRIP; row += LANES, to += LANES)
        for (long i = 0; i < n; i += LANES) {
            float part[LANES * LANES];
            for (long r = 0; r < LANES; r++) {
                long at = smaller(strip * STRIP + row + r, w->n_out - 1);
                v_store(part + r * LANES, load_weights(type, w->data + at * w->row_bytes, first + i, n - i));
            }
            v_transpose(part, LANES, to + i * PANEL, PANEL);
        }
}

/* to[i * PANEL + row]: inputs first..first+n-1 of a strip's rows. */
static void make_numbers(const weight *w, long strip, long first, long n, float *to) {
#define ROWS_CASE(id, ...) case id: numbers_of_rows(id, w, strip, first, n, to); break;
#define BLOCKS_CASE(id, ...) case id: numbers_of_blocks(id, w, strip, first, n, to); break;
    switch (w->type) { /* each with its type known to the compiler */
        NUMBER_TYPES(ROWS_CASE)
        BLOCK_TYPES(BLOCKS_CASE)
    default: break;
    }
}

static size_t panel_scratch(long n_tokens, long n_in) {
    (void)n_in;
    return (size_t)((INPUTS + LANES + n_tokens) * PANEL) * sizeof(float);
}

/* A strip that is missing in the last panel repeats the one before. */
static void multiply_panel_of_strips(const weight *w, const void *inputs, long n_tokens, long first, long last,
                                     float *out, long stride, void *scratch) {
    float *numbers = scratch, *sums = numbers + (INPUTS + LANES) * PANEL;
    const float *x = inputs;
    for (long i = 0; i < w->n_in; i += INPUTS) {
        long n = smaller(w->n_in - i, INPUTS);
        for (long s = 0; s < PANEL_STRIPS; s++)
            make_numbers(w, smaller(first + s, last - 1), i, n, numbers + s * STRIP);
        cblas_sgemm(ROW_MAJOR, AS_IT_LIES, AS_IT_LIES, (int)n_tokens, PANEL, (int)n, 1, x + i, (int)w->n_in, numbers,
                    PANEL, i > 0, sums, PANEL);
    }
    long row = first * STRIP, rows = smaller(last * STRIP, w->n_out) - row;
    for (long t = 0; t < n_tokens; t++) memcpy(out + t * stride + row, sums + t * PANEL, (size_t)rows * sizeof *out);
}

/* Below this many tokens making numbers costs more than it saves. */
static const panel_kernels panels = {
    32, PANEL_STRIPS, 1, NULL, NULL, panel_scratch, multiply_panel_of_strips,
};

static double multiply_registers(long rounds, float *sink) {
    enum { SIZE = 128 }; /* of matrices that stay in the cache */
    static const float zeros[SIZE * SIZE];
    float sums[SIZE * SIZE];
    double products = 0;
    for (long n = 0; n < rounds; n += 64, products += SIZE * SIZE * SIZE)
        cblas_sgemm(ROW_MAJOR, AS_IT_LIES, AS_IT_LIES, SIZE, SIZE, SIZE, 1, zeros, SIZE, zeros, SIZE, 0, sums, SIZE);
    *sink += sums[0];
    return products;
}

LEVEL(accelerate, 8, 4, dotprod_multiply_blocks, attend_tile, &panels)
TARGET_END
#endif
