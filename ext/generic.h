/* Float operations written once, for vectors of any width.
 *
 * A file of one instruction set defines `vec`, LANES and the v_ functions that are used here, and how many VECTORS
 * a tile of sums is wide, then includes this file: its compiler flags and its vectors make these its kernels. So all levels compute in
 * the same way and differ in the width of their sums alone. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum {
    COLUMNS = VECTORS * LANES, /* of a tile */
    TILE_TOKENS = 6,       /* 6 x 2 sums fit into 16 registers with room for the operands, 6 x 4 into 32 */
    K_STEP = 1024,         /* rows of a float panel, which then fits into the second-level cache */
};

static inline vec v_load_part(const float *p, long n) {
    if (LANES == 1 || n >= LANES) return v_load(p);
    float lanes[LANES] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v_load(lanes);
}

static inline void v_store_part(float *p, vec x, long n) {
    if (LANES == 1 || n >= LANES) {
        v_store(p, x);
        return;
    }
    float lanes[LANES];
    v_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

static inline vec v_load_f16_part(const uint16_t *p, long n) {
    if (LANES == 1 || n >= LANES) return v_load_f16(p);
    uint16_t lanes[LANES] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v_load_f16(lanes);
}

/* e^x to 2 units in the last place, of several vectors, since each step waits for the one before it: 2^n * e^r
 * with n = round(x / ln 2), |r| <= ln 2 / 2. NaN stays NaN; what is out of range becomes its end. */
static inline __attribute__((always_inline)) void v_exps(const int n_vectors, vec *x) {
    static const float terms[] = { /* Cephes' polynomial for (e^r - 1 - r) / r^2 */
        1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f,
    };
    const vec magic = v_set1(0x1.8p23f); /* adding it leaves the nearest integer in the lowest bits */
    vec n[4], r[4], p[4];
#define EACH UNROLL for (int i = 0; i < n_vectors; i++)
    EACH x[i] = v_min(v_set1(88.0f), v_max(v_set1(-86.5f), x[i]));
    EACH n[i] = v_sub(v_fma(x[i], v_set1(1.44269504f), magic), magic);
    EACH r[i] = v_fma(n[i], v_set1(-0.693359375f), x[i]);
    EACH r[i] = v_fma(n[i], v_set1(2.12194440e-4f), r[i]);
    EACH p[i] = v_set1(terms[0]);
    for (int k = 1; k < 6; k++)
        EACH p[i] = v_fma(p[i], r[i], v_set1(terms[k]));
    EACH p[i] = v_add(v_fma(p[i], v_mul(r[i], r[i]), r[i]), v_set1(1));
    EACH x[i] = v_times_power(p[i], n[i]);
#undef EACH
}

static inline vec v_exp(vec x) {
    v_exps(1, &x);
    return x;
}

/* ---- element-wise ---- */

static void rms_norm_one(const float *x, const float *scale, float eps, long dim, float *out) {
    vec sum = v_set1(0);
    for (long i = 0; i < dim; i += LANES) {
        vec v = v_load_part(x + i, dim - i);
        sum = v_fma(v, v, sum);
    }
    vec inverse = v_set1(1 / sqrtf(v_sum(sum) / (float)dim + eps));
    for (long i = 0; i < dim; i += LANES) {
        vec v = v_mul(v_load_part(x + i, dim - i), inverse);
        v_store_part(out + i, v_mul(v, v_load_part(scale + i, dim - i)), dim - i);
    }
}

static void swiglu_run(const float *gate, const float *up, long n, float *out) {
    for (long i = 0; i < n; i += LANES) {
        vec g = v_load_part(gate + i, n - i), u = v_load_part(up + i, n - i);
        vec silu = v_div(g, v_add(v_set1(1), v_exp(v_sub(v_set1(0), g))));
        v_store_part(out + i, v_mul(silu, u), n - i);
    }
}

static void rope_one(const float *x, const float *freqs, long n_heads, long head_dim, float *out) {
    for (long head = 0; head < n_heads; head++, x += head_dim, out += head_dim) {
        for (long j = 0; j < head_dim; j += 2) {
            float a = x[j], b = x[j + 1], c = freqs[j], s = freqs[j + 1];
            out[j] = a * c - b * s;
            out[j + 1] = a * s + b * c;
        }
    }
}

static void refine(const float *x, const input_block *of, input_block *out) {
    float inverse = finite_inverse(REST, of->scale);
    int32_t sums[2] = {0};
    for (int j = 0; j < BLOCK; j++) {
        float rest = (x[j] - of->scale * (float)of->q[j]) * inverse;
        rest = rest > -127 ? rest : -127; /* or NaN, where the scale isn't finite */
        rest = rest < 127 ? rest : 127;
        float shifted = rest + 0x1.8p23f; /* rounds as v_exp does */
        int32_t rounded = (int32_t)(shifted - 0x1.8p23f);
        out->q[j] = (int8_t)rounded;
        sums[j / 16] += rounded;
    }
    out->scale = of->scale / REST;
    out->half = sums[0], out->sum = sums[0] + sums[1];
}

/* ---- products ---- */

/* out[t * stride + c] (+)= sum over k of x[t * x_stride + k] * panel[k * panel_stride + c], for COLUMNS c. */
static inline __attribute__((always_inline)) void tile_of(const int tokens, const float *x, long x_stride,
                                                          const float *panel, long panel_stride, long n, float *out,
                                                          long stride, int add) {
    vec totals[TILE_TOKENS][VECTORS], p[VECTORS];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int j = 0; j < VECTORS; j++) totals[t][j] = add ? v_load(out + t * stride + j * LANES) : v_set1(0);
    for (long k = 0; k < n; k++) {
        UNROLL
        for (int j = 0; j < VECTORS; j++) p[j] = v_load(panel + k * panel_stride + j * LANES);
        UNROLL
        for (int t = 0; t < tokens; t++) {
            vec v = v_set1(x[t * x_stride + k]);
            UNROLL
            for (int j = 0; j < VECTORS; j++) totals[t][j] = v_fma(v, p[j], totals[t][j]);
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int j = 0; j < VECTORS; j++) v_store(out + t * stride + j * LANES, totals[t][j]);
}

static void tile(long tokens, const float *x, long x_stride, const float *panel, long panel_stride, long n, float *out,
                 long stride, int add) {
    switch (tokens) { /* each with its number of registers known to the compiler */
    case 1: tile_of(1, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    case 2: tile_of(2, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    case 3: tile_of(3, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    case 4: tile_of(4, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    case 5: tile_of(5, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    default: tile_of(6, x, x_stride, panel, panel_stride, n, out, stride, add); break;
    }
}

static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }

/* out[t, c] (+)= x[t, :n] @ panel[:n, c], for n_columns c. The panel's rows are whole tiles wide. */
static void multiply_panel(const float *x, long x_stride, long n_tokens, const float *panel,
                           long panel_stride, long n, long n_columns, float *out, long stride, int add) {
    float sums[TILE_TOKENS * COLUMNS];
    for (long t = 0; t < n_tokens; t += TILE_TOKENS) {
        long tokens = smaller(n_tokens - t, TILE_TOKENS);
        for (long c = 0; c < n_columns; c += COLUMNS) {
            float *to = out + t * stride + c;
            size_t width = (size_t)(n_columns - c) * sizeof *to;
            if (n_columns - c >= COLUMNS) {
                tile(tokens, x + t * x_stride, x_stride, panel + c, panel_stride, n, to, stride, add);
                continue;
            }
            for (long i = 0; add && i < tokens; i++) memcpy(sums + i * COLUMNS, to + i * stride, width);
            tile(tokens, x + t * x_stride, x_stride, panel + c, panel_stride, n, sums, COLUMNS, add);
            for (long i = 0; i < tokens; i++) memcpy(to + i * stride, sums + i * COLUMNS, width);
        }
    }
}

/* panel[k * panel_stride + r] = rows[r * row_stride + k] */
static void transpose(const float *rows, long row_stride, long n_rows, long n, float *panel,
                      long panel_stride) {
    long r = 0, whole = n / LANES * LANES;
    for (; r + LANES <= n_rows; r += LANES)
        for (long k = 0; k < whole; k += LANES)
            v_transpose(rows + r * row_stride + k, row_stride, panel + k * panel_stride + r, panel_stride);
    for (long k = whole; k < n; k++)
        for (long i = 0; i < r; i++) panel[k * panel_stride + i] = rows[i * row_stride + k];
    for (; r < n_rows; r++)
        for (long k = 0; k < n; k++) panel[k * panel_stride + r] = rows[r * row_stride + k];
}

static inline __attribute__((always_inline)) vec load_weights(const weight_type type, const uint8_t *row,
                                                              long i, long n) {
    if (type == F32) return v_load_part((const float *)row + i, n);
    if (type == F16) return v_load_f16_part((const uint16_t *)row + i, n);
    const uint16_t *p = (const uint16_t *)row + i;
    if (LANES == 1 || n >= LANES) return v_load_bf16(p);
    uint16_t part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load_bf16(part);
}

/* Of a few tokens, or queries, so many at a time: times 4 rows, or keys, they are 12 sums in registers, which hide
 * the latency of each and share what is loaded. No sum depends on those beside it. */
enum { ABREAST = 3 };

/* How many of those that are left come next: of four, two and two are faster than three and one. */
static long abreast(long left) { return left == 4 ? 2 : smaller(left, ABREAST); }

/* Calls a function with so many, known to the compiler. */
#define ABREAST_CASES(n, function, ...)             \
    switch (n) {                                    \
    case 1: function(1, __VA_ARGS__); break;        \
    case 2: function(2, __VA_ARGS__); break;        \
    default: function(ABREAST, __VA_ARGS__); break; \
    }

/* Adds up the products of a vector of inputs, of which n are there, with n_rows rows. */
INLINE void add_float_products(const int tokens, const weight_type type, const int n_rows, const weight *w,
                               const float *x, const uint8_t *rows, long i, long n, vec sums[4][ABREAST]) {
    vec v[ABREAST];
    UNROLL
    for (int t = 0; t < tokens; t++) v[t] = v_load_part(x + t * w->n_in + i, n);
    UNROLL
    for (int r = 0; r < n_rows; r++) {
        vec weights = load_weights(type, rows + r * w->row_bytes, i, n);
        UNROLL
        for (int t = 0; t < tokens; t++) sums[r][t] = v_fma(weights, v[t], sums[r][t]);
    }
}

/* out[t * stride + r] */
INLINE void multiply_float_rows(const int tokens, const weight_type type, const int n_rows, const weight *w,
                                const float *x, const uint8_t *rows, float *out, long stride) {
    vec sums[4][ABREAST];
    long i = 0;
    UNROLL
    for (int r = 0; r < n_rows; r++)
        UNROLL
        for (int t = 0; t < tokens; t++) sums[r][t] = v_set1(0);
    for (; i + LANES <= w->n_in; i += LANES) add_float_products(tokens, type, n_rows, w, x, rows, i, LANES, sums);
    if (i < w->n_in) add_float_products(tokens, type, n_rows, w, x, rows, i, w->n_in - i, sums);
    UNROLL
    for (int r = 0; r < n_rows; r++)
        UNROLL
        for (int t = 0; t < tokens; t++) out[t * stride + r] = v_sum(sums[r][t]);
}

INLINE void float_vectors(const weight_type type, const weight *w, const float *x, long n_tokens, long first, long last,
                          float *out, long stride) {
    for (long row = first, n_rows; row < last; row += n_rows) {
        const uint8_t *rows = w->data + row * w->row_bytes;
        n_rows = last - row < 4 ? 1 : 4;
        for (long t = 0, some; t < n_tokens; t += some) {
            const float *inputs = x + t * w->n_in;
            float *to = out + t * stride + row;
            some = abreast(n_tokens - t);
            if (n_rows == 4) {
                ABREAST_CASES(some, multiply_float_rows, type, 4, w, inputs, rows, to, stride)
            } else {
                ABREAST_CASES(some, multiply_float_rows, type, 1, w, inputs, rows, to, stride)
            }
        }
    }
}

/* n weights of a row from k on, as float32. */
static void widen(const weight *w, const uint8_t *row, long k, long n, float *out) {
    for (long i = 0; i < n; i += LANES) {
        long left = n - i;
        vec v = w->type == F32   ? load_weights(F32, row, k + i, left)
                : w->type == F16 ? load_weights(F16, row, k + i, left)
                                 : load_weights(BF16, row, k + i, left);
        v_store_part(out + i, v, left);
    }
}

static void float_panels(const weight *w, const float *x, long n_tokens, long first, long last, float *out,
                         long stride, float *scratch) {
    float *panel = scratch, *rows = scratch + STRIP * K_STEP;
    memset(panel, 0, STRIP * K_STEP * sizeof *panel);
    for (long k = 0; k < w->n_in; k += K_STEP) {
        long n = smaller(w->n_in - k, K_STEP);
        for (long r = first; r < last; r++)
            widen(w, w->data + r * w->row_bytes, k, n, rows + (r - first) * K_STEP);
        transpose(rows, K_STEP, last - first, n, panel, STRIP);
        multiply_panel(x + k, w->n_in, n_tokens, panel, STRIP, n, last - first, out + first, stride, k > 0);
    }
}

static void multiply_floats(const weight *w, const float *x, long n_tokens, long first, long last, float *out,
                            long stride, void *scratch) {
    if (n_tokens > FEW) {
        float_panels(w, x, n_tokens, first, last, out, stride, scratch);
        return;
    }
    switch (w->type) {
    case F32: float_vectors(F32, w, x, n_tokens, first, last, out, stride); break;
    case F16: float_vectors(F16, w, x, n_tokens, first, last, out, stride); break;
    default: float_vectors(BF16, w, x, n_tokens, first, last, out, stride); break;
    }
}

#include "attention.h"
