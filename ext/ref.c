/* The scalar reference: what every other level must compute, a number at a time, in any C99. */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float vec;
enum { LANES = 1, VECTORS = 2 };
static inline vec v_load(const float *p) { return *p; }
static inline void v_store(float *p, vec x) { *p = x; }
static inline vec v_load_f16(const uint16_t *p) { return f32_from_f16(*p); }
static inline vec v_load_bf16(const uint16_t *p) {
    union { uint32_t word; float value; } bits = {.word = (uint32_t)*p << 16};
    return bits.value;
}
static inline vec v_set1(float x) { return x; }
static inline vec v_add(vec a, vec b) { return a + b; }
static inline vec v_sub(vec a, vec b) { return a - b; }
static inline vec v_mul(vec a, vec b) { return a * b; }
static inline vec v_div(vec a, vec b) { return a / b; }
static inline vec v_fma(vec a, vec b, vec c) { return a * b + c; }
static inline vec v_sqrt(vec x) { return sqrtf(x); }
static inline vec v_max(vec a, vec b) { return a > b ? a : b; }
static inline vec v_min(vec a, vec b) { return a < b ? a : b; }
static inline vec v_times_power(vec x, vec n) { return n != n ? n : ldexpf(x, (int)n); }
static inline float v_sum(vec x) { return x; }
static inline void v_sum4(const vec x[4], float *out) { memcpy(out, x, 4 * sizeof *out); }
static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    (void)row_stride, (void)out_stride;
    *out = *rows;
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    for (long i = 0; i < n; i++) out[i] = f16_from_f32(x[i]);
}

#include "cast.h"

/* Of each block: scale = max |x| / 127, q = x / scale to the nearest integer, ties to even. */
static void quantize(const float *x, long n_blocks, input_block *out) {
    for (; n_blocks-- > 0; x += BLOCK, out++) {
        float largest = 0;
        for (int j = 0; j < BLOCK; j++) { /* NaN is larger than any */
            float here = fabsf(x[j]);
            largest = here > largest || here != here ? here : largest;
        }
        float inverse = finite_inverse(127, largest);
        out->scale = largest / 127;
        out->half = out->sum = 0;
        for (int j = 0; j < BLOCK; j++) {
            out->q[j] = inverse > 0 ? (int8_t)rintf(x[j] * inverse) : 0;
            if (j < BLOCK / 2) out->half += out->q[j];
            out->sum += out->q[j];
        }
    }
}

/* A block of a row of weights times a block of one token. The sums of products are exact. */
static float block_product(const weight *w, const plain_block *plain, const uint8_t *x, long n, long t) {
    const int8_t *q = (const int8_t *)x;
    const float scale = read_f32(scale_at(x, n, t));
    const int shared = types[w->type].shared;
    float total = 0;
    for (int first = 0; first < BLOCK; first += shared) {
        int32_t product = 0, minus_sum = 0;
        for (int j = first; j < first + shared; j++) {
            const int8_t input = q[(j / 4 * n + t) * 4 + j % 4];
            product += (plain->q[j] - zero_of(w->type)) * input;
            minus_sum -= input;
        }
        total += plain->d[first / 16] * scale * (float)product - plain->m[first / 16] * scale * (float)minus_sum;
    }
    return total;
}

static void multiply_row(const weight *w, const token_tile *tile, long row, float *out, long stride) {
    const long n = tile->n;
    for (long t = 0; t < tile->n_tokens; t++) {
        const uint8_t *x = tile->blocks;
        float total = 0;
        for (long i = 0; i < tile->n_blocks; i++, x += tile_block_bytes(n)) {
            plain_block plain = unpack_block(w, row, read_i32(number_at(x, n)));
            total += block_product(w, &plain, x, n, t);
        }
        out[(tile->first + t) * stride + row] = total * w->factor;
    }
}

static void multiply_blocks(const weight *w, const activations *acts, long strip, float *out, long stride) {
    for (long i = 0; i < acts->n_tiles; i++)
        for (long row = strip * STRIP; row < smaller((strip + 1) * STRIP, w->n_out); row++)
            multiply_row(w, acts->tiles + i, row, out, stride);
}

static double multiply_registers(long rounds, float *sink) {
    volatile int8_t factor = 3; /* or the compiler would do the sums itself */
    int32_t sum = 0;
    for (long i = 0; i < rounds; i++) sum += factor * (int8_t)i;
    *sink += (float)sum;
    return (double)rounds;
}

LEVEL(ref, 1, 4, multiply_blocks, attend_tile, NULL)
