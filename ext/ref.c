/* The scalar reference: what every other level must compute, a number at a time, in any C99. */
#include <math.h>

#include "kernels.h"

typedef float vec;
enum { LANES = 1 };
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
static inline vec v_max(vec a, vec b) { return a > b ? a : b; }
static inline vec v_min(vec a, vec b) { return a < b ? a : b; }
static inline vec v_times_power(vec x, vec n) { return ldexpf(x, (int)n); }
static inline float v_sum(vec x) { return x; }
static inline void v_transpose(const float *rows, long row_stride, float *out, long out_stride) {
    (void)row_stride, (void)out_stride;
    *out = *rows;
}

#include "generic.h"

static void to_f16(const float *x, long n, uint16_t *out) {
    for (long i = 0; i < n; i++) out[i] = f16_from_f32(x[i]);
}

/* Of each block: scale = max |x| / 127, q = x / scale to the nearest integer, ties to even. */
static void quantize(const float *x, const activations *acts, long token) {
    int8_t *q = acts->q + token * acts->row_bytes;
    for (long b = 0; b < acts->n_in / BLOCK; b++) {
        float largest = 0;
        for (int j = 0; j < BLOCK; j++) largest = fmaxf(largest, fabsf(x[b * BLOCK + j]));
        float inverse = largest > 0 ? 127 / largest : 0;
        int32_t sum = 0;
        for (int j = 0; j < BLOCK; j++) {
            int8_t rounded = (int8_t)rintf(x[b * BLOCK + j] * inverse);
            q[activation_at(b * BLOCK + j)] = rounded;
            sum += rounded;
        }
        acts->scale[token * acts->n_blocks + b] = largest / 127;
        acts->sum[token * acts->n_blocks + b] = sum;
    }
}

static float f16_at(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    return f32_from_f16(half);
}

/* A block of weights times 32 integers: first[16], other[16]. The sum of products is exact. */
static float block_product(const weight *w, const uint8_t *row, long b, const int8_t *first, const int8_t *other,
                           int32_t sum, float scale) {
    uint8_t q[BLOCK];
    int32_t product = 0;
    unpack_block(w, row, b, q);
    for (int j = 0; j < 16; j++)
        product += (q[j] - zero_of(w->type)) * first[j] + (q[j + 16] - zero_of(w->type)) * other[j];
    float result = f16_at(row + 2 * b) * scale * (float)product;
    return has_minimum(w->type) ? result + f16_at(row + w->m + 2 * b) * scale * (float)sum : result;
}

static float row_product(const weight *w, const uint8_t *row, const activations *acts, long token) {
    const float *scale = acts->scale + token * acts->n_blocks;
    float total = 0;
    for (long b = 0; b < w->n_blocks; b++) {
        const int8_t *q = acts->q + token * acts->row_bytes + activation_at(b * BLOCK);
        total += block_product(w, row, b, q, q + 64, acts->sum[token * acts->n_blocks + b], scale[b]);
    }
    for (long i = 0; i < acts->n_rest[token / TOGETHER]; i++) {
        long b = acts->rest_block[token / TOGETHER * acts->max_rest + i], at = token * acts->max_rest + i;
        const int8_t *rest = acts->rest + at * BLOCK;
        total += block_product(w, row, b, rest, rest + 16, acts->rest_sum[at], scale[b] * REST_SCALE);
    }
    return total * w->factor;
}

static void multiply_blocks(const weight *w, const activations *acts, long first, long last, float *out,
                            long stride, void *scratch) {
    (void)scratch;
    for (long row = first; row < last; row++)
        for (long t = 0; t < acts->n_tokens; t++)
            out[t * stride + row] = row_product(w, w->data + row * w->row_bytes, acts, t);
}

static double multiply_registers(long rounds, float *sink) {
    volatile int8_t factor = 3; /* or the compiler would do the sums itself */
    int32_t sum = 0;
    for (long i = 0; i < rounds; i++) sum += factor * (int8_t)i;
    *sink += (float)sum;
    return (double)rounds;
}

const kernels ref_kernels = {
    "ref", 0, INT32_MAX, quantize, refine, multiply_blocks, multiply_floats, rms_norm_one, swiglu_run, rope_one, to_f16,
    attend_span, attend_tile, multiply_registers,
};
