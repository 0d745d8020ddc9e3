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
    SCORES = 64,           /* positions that a tile of queries meets at a time */
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

/* e^x to 2 units in the last place: 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2. */
static inline vec v_exp(vec x) {
    x = v_min(v_set1(89.0f), v_max(v_set1(-87.0f), x)); /* NaN stays NaN, and above 88.7 it is infinite */
    vec magic = v_set1(0x1.8p23f); /* adding it leaves the nearest integer in the lowest bits */
    vec n = v_sub(v_fma(x, v_set1(1.44269504f), magic), magic);
    vec r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vec p = v_set1(1.9875691500e-4f); /* Cephes' polynomial for (e^r - 1 - r) / r^2 */
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set1(1));
    return v_times_power(p, n);
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

/* sums[t][c] = sum over k of x[t * x_stride + k] * panel[k * panel_stride + c], for COLUMNS c. */
static inline __attribute__((always_inline)) void tile_of(const int tokens, const float *x, long x_stride,
                                                          const float *panel, long panel_stride, long n,
                                                          float *sums) {
    vec totals[TILE_TOKENS][VECTORS], p[VECTORS];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int j = 0; j < VECTORS; j++) totals[t][j] = v_set1(0);
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
        for (int j = 0; j < VECTORS; j++) v_store(sums + t * COLUMNS + j * LANES, totals[t][j]);
}

static void tile(long tokens, const float *x, long x_stride, const float *panel, long panel_stride, long n,
                 float *sums) {
    switch (tokens) { /* each with its number of registers known to the compiler */
    case 1: tile_of(1, x, x_stride, panel, panel_stride, n, sums); break;
    case 2: tile_of(2, x, x_stride, panel, panel_stride, n, sums); break;
    case 3: tile_of(3, x, x_stride, panel, panel_stride, n, sums); break;
    case 4: tile_of(4, x, x_stride, panel, panel_stride, n, sums); break;
    case 5: tile_of(5, x, x_stride, panel, panel_stride, n, sums); break;
    default: tile_of(6, x, x_stride, panel, panel_stride, n, sums); break;
    }
}

static inline long smaller(long a, long b) { return a < b ? a : b; }

/* out[t, c] (+)= x[t, :n] @ panel[:n, c], for n_columns c. The panel's rows are whole tiles wide. */
static void multiply_panel(const float *x, long x_stride, long n_tokens, const float *panel,
                           long panel_stride, long n, long n_columns, float *out, long stride, int add) {
    float sums[TILE_TOKENS * COLUMNS];
    for (long t = 0; t < n_tokens; t += TILE_TOKENS) {
        long tokens = smaller(n_tokens - t, TILE_TOKENS);
        for (long c = 0; c < n_columns; c += COLUMNS) {
            tile(tokens, x + t * x_stride, x_stride, panel + c, panel_stride, n, sums);
            for (long i = 0; i < tokens; i++)
                for (long j = 0; j < COLUMNS && c + j < n_columns; j += LANES) {
                    float *to = out + (t + i) * stride + c + j;
                    vec sum = v_load(sums + i * COLUMNS + j);
                    if (add) sum = v_add(sum, v_load_part(to, n_columns - c - j));
                    v_store_part(to, sum, n_columns - c - j);
                }
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

/* One token times ROWS rows. */
static inline __attribute__((always_inline)) void float_rows(const weight_type type, const int n_rows,
                                                             const weight *w, const float *x, long row,
                                                             float *out) {
    const uint8_t *data = w->data + row * w->row_bytes;
    vec sums[4];
    UNROLL
    for (int r = 0; r < n_rows; r++) sums[r] = v_set1(0);
    for (long i = 0; i < w->n_in; i += LANES) {
        vec v = v_load_part(x + i, w->n_in - i);
        UNROLL
        for (int r = 0; r < n_rows; r++)
            sums[r] = v_fma(load_weights(type, data + r * w->row_bytes, i, w->n_in - i), v, sums[r]);
    }
    UNROLL
    for (int r = 0; r < n_rows; r++) out[r] = v_sum(sums[r]);
}

static inline __attribute__((always_inline)) void float_vectors(const weight_type type, const weight *w,
                                                                const float *x, long n_tokens, long first,
                                                                long last, float *out, long stride) {
    long row = first;
    for (; row + 4 <= last; row += 4)
        for (long t = 0; t < n_tokens; t++) float_rows(type, 4, w, x + t * w->n_in, row, out + t * stride + row);
    for (; row < last; row++)
        for (long t = 0; t < n_tokens; t++) float_rows(type, 1, w, x + t * w->n_in, row, out + t * stride + row);
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

/* Below this many tokens turning rows into a panel costs more than it saves. */
enum { FEW_TOKENS = 4 };

static void multiply_floats(const weight *w, const float *x, long n_tokens, long first, long last, float *out,
                            long stride, void *scratch) {
    if (n_tokens >= FEW_TOKENS) {
        float_panels(w, x, n_tokens, first, last, out, stride, scratch);
        return;
    }
    switch (w->type) {
    case F32: float_vectors(F32, w, x, n_tokens, first, last, out, stride); break;
    case F16: float_vectors(F16, w, x, n_tokens, first, last, out, stride); break;
    default: float_vectors(BF16, w, x, n_tokens, first, last, out, stride); break;
    }
}

/* ---- attention ---- */

/* Halves of the KV cache that are asked for ahead of their use: 8 KB. A head's positions follow each other. */
enum { AHEAD_IN_CACHE = 4096 };

static inline void prefetch(const uint16_t *p, long n) {
    for (long i = 0; i < n; i += 32) __builtin_prefetch(p + i); /* a cache line */
}

static inline __attribute__((always_inline)) void score_positions(const int n, const float *q,
                                                                  const uint16_t *keys, long head_dim,
                                                                  float scale, float *scores) {
    vec sums[4];
    UNROLL
    for (int p = 0; p < n; p++) sums[p] = v_set1(0);
    long i = 0;
    for (; i + LANES <= head_dim; i += LANES) {
        vec v = v_load(q + i);
        UNROLL
        for (int p = 0; p < n; p++) sums[p] = v_fma(v_load_f16(keys + p * head_dim + i), v, sums[p]);
    }
    if (i < head_dim) {
        vec v = v_load_part(q + i, head_dim - i);
        UNROLL
        for (int p = 0; p < n; p++)
            sums[p] = v_fma(v_load_f16_part(keys + p * head_dim + i, head_dim - i), v, sums[p]);
    }
    if (n == 4)
        v_sum4(sums, scores);
    else
        scores[0] = v_sum(sums[0]);
    for (int p = 0; p < n; p++) scores[p] *= scale;
}

/* scores -> e^(score - highest) for n scores; the padding up to whole vectors becomes 0. */
static float exponentials(float *scores, long n, float highest) {
    vec sum = v_set1(0);
    for (long i = 0; i < n; i += LANES) {
        vec e = v_exp(v_sub(v_load_part(scores + i, n - i), v_set1(highest)));
        v_store_part(scores + i, e, n - i);
        sum = v_add(sum, v_load_part(scores + i, n - i));
    }
    return v_sum(sum);
}

static float highest_of(const float *scores, long n) {
    float lanes[LANES], highest = scores[0];
    long i = 0;
    if (n >= LANES) {
        vec top = v_load(scores);
        for (i = LANES; i + LANES <= n; i += LANES) top = v_max(top, v_load(scores + i));
        v_store(lanes, top);
        for (int j = 0; j < LANES; j++) highest = lanes[j] > highest ? lanes[j] : highest;
    }
    for (; i < n; i++) highest = scores[i] > highest ? scores[i] : highest;
    return highest;
}

static inline __attribute__((always_inline)) void weigh_vectors(const int vectors, const float *weights,
                                                                const uint16_t *values, long n,
                                                                long head_dim, float *out) {
    vec sums[8];
    UNROLL
    for (int j = 0; j < vectors; j++) sums[j] = v_load(out + j * LANES);
    for (long p = 0; p < n; p++, values += head_dim) {
        vec weight = v_set1(weights[p]);
        UNROLL
        for (int j = 0; j < vectors; j++) sums[j] = v_fma(weight, v_load_f16(values + j * LANES), sums[j]);
    }
    UNROLL
    for (int j = 0; j < vectors; j++) v_store(out + j * LANES, sums[j]);
}

/* out += weights @ values, for n positions. */
static void weigh_values(const float *weights, const uint16_t *values, long n, long head_dim, float *out) {
    long i = 0;
    for (; i + 8 * LANES <= head_dim; i += 8 * LANES) weigh_vectors(8, weights, values + i, n, head_dim, out + i);
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES) weigh_vectors(4, weights, values + i, n, head_dim, out + i);
    for (; i + LANES <= head_dim; i += LANES) weigh_vectors(1, weights, values + i, n, head_dim, out + i);
    for (long p = 0; i < head_dim && p < n; p++) {
        vec v = v_load_f16_part(values + p * head_dim + i, head_dim - i);
        v_store_part(out + i, v_fma(v_set1(weights[p]), v, v_load_part(out + i, head_dim - i)), head_dim - i);
    }
}

/* Query heads that share keys and values take turns every few positions, so that memory is read once and never
 * waits for a head. */
enum { TURN = 16 };

static void attend_span(const heads *h, long kv_head, long first, long last, float *highest, float *sum,
                        float *values) {
    float scores[MAX_SHARED][SPAN], scale = 1 / sqrtf((float)h->head_dim);
    long shared = h->n_heads / h->n_kv_heads, n = last - first, hd = h->head_dim;
    const float *q = h->q + kv_head * shared * hd;
    const uint16_t *k = h->keys + (kv_head * h->n_ctx + first) * hd;
    const uint16_t *v = h->values + (kv_head * h->n_ctx + first) * hd;
    for (long p = 0; p < n; p += 4) {
        prefetch(k + p * hd + AHEAD_IN_CACHE, 4 * hd);
        for (long g = 0; g < shared; g++) {
            if (p + 4 <= n)
                score_positions(4, q + g * hd, k + p * hd, hd, scale, scores[g] + p);
            else
                for (long i = p; i < n; i++) score_positions(1, q + g * hd, k + i * hd, hd, scale, scores[g] + i);
        }
    }
    for (long g = 0; g < shared; g++) {
        highest[g] = highest_of(scores[g], n);
        sum[g] = exponentials(scores[g], n, highest[g]);
    }
    memset(values, 0, (size_t)(shared * hd) * sizeof *values);
    for (long p = 0; p < n; p += TURN) {
        prefetch(v + p * hd + AHEAD_IN_CACHE, TURN * hd);
        for (long g = 0; g < shared; g++)
            weigh_values(scores[g] + p, v + p * hd, smaller(n - p, TURN), hd, values + g * hd);
    }
}

/* What a tile of queries needs while it goes over the positions. Rows are (query head, query) pairs. */
typedef struct {
    float *keys;      /* [head_dim, SCORES] */
    float *values;    /* [SCORES, width] */
    float *rows;      /* [SCORES, head_dim] */
    float *scores;    /* [shared * TILE, SCORES] */
    float *out;       /* [shared * TILE, width] */
    float *highest, *sum; /* [shared * TILE] */
    long width;       /* head_dim rounded up to whole tiles */
} tile_state;

static void load_positions(const heads *h, long kv_head, long first, long n, tile_state *s) {
    long at = (kv_head * h->n_ctx + first) * h->head_dim, hd = h->head_dim;
    memset(s->keys, 0, (size_t)(hd * SCORES) * sizeof(float));
    for (long p = 0; p < n; p++)
        for (long i = 0; i < hd; i += LANES) {
            v_store_part(s->rows + p * hd + i, v_load_f16_part(h->keys + at + p * hd + i, hd - i), hd - i);
            v_store_part(s->values + p * s->width + i, v_load_f16_part(h->values + at + p * hd + i, hd - i),
                         hd - i);
        }
    transpose(s->rows, hd, n, hd, s->keys, SCORES);
}

/* Softmax goes on from position to position: where the highest score rises, what was summed shrinks
 * (online softmax, arXiv:1805.02867). A query sees positions first..last-1 of the SCORES. */
static void weigh_scores(float *scores, long first, long last, float scale, float *highest, float *sum,
                         float *out, long width) {
    long n = last - first;
    for (long i = 0; i < SCORES; i += LANES)
        v_store(scores + i, v_mul(v_load(scores + i), v_set1(scale)));
    if (n > 0) {
        float top = highest_of(scores + first, n);
        if (top > *highest) {
            float shrink = v_sum(v_exp(v_set1(*highest - top))) / LANES;
            for (long i = 0; i < width; i += LANES)
                v_store(out + i, v_mul(v_load(out + i), v_set1(shrink)));
            *sum *= shrink;
            *highest = top;
        }
        *sum += exponentials(scores + first, n, *highest);
    }
    if (n <= 0) first = last = 0;
    for (long i = 0; i < first; i++) scores[i] = 0;
    for (long i = last; i < SCORES; i++) scores[i] = 0;
}

static tile_state carve(void *scratch, long rows, long head_dim) {
    tile_state s = {.width = (head_dim + COLUMNS - 1) / COLUMNS * COLUMNS};
    s.keys = scratch;
    s.values = s.keys + head_dim * SCORES;
    s.rows = s.values + s.width * SCORES;
    s.scores = s.rows + head_dim * SCORES;
    s.out = s.scores + rows * SCORES;
    s.highest = s.out + rows * s.width;
    s.sum = s.highest + rows;
    return s;
}

static void attend_tile(const heads *h, long kv_head, long first, long last, void *scratch) {
    long shared = h->n_heads / h->n_kv_heads, queries = last - first, stride = h->n_heads * h->head_dim;
    long rows = shared * queries, end = h->pos + last;
    float scale = 1 / sqrtf((float)h->head_dim);
    tile_state s = carve(scratch, rows, h->head_dim);
    memset(s.values, 0, (size_t)(s.width * SCORES) * sizeof(float));
    memset(s.out, 0, (size_t)(rows * s.width) * sizeof(float));
    for (long r = 0; r < rows; r++) s.highest[r] = -INFINITY, s.sum[r] = 0;
    for (long p = first_seen(h, first); p < end; p += SCORES) {
        long n = smaller(end - p, SCORES);
        load_positions(h, kv_head, p, n, &s);
        for (long g = 0; g < shared; g++) {
            const float *q = h->q + first * stride + (kv_head * shared + g) * h->head_dim;
            float *scores = s.scores + g * queries * SCORES;
            multiply_panel(q, stride, queries, s.keys, SCORES, h->head_dim, n, scores, SCORES, 0);
        }
        for (long r = 0; r < rows; r++) {
            long query = first + r % queries, from = first_seen(h, query) - p;
            weigh_scores(s.scores + r * SCORES, from < 0 ? 0 : from, smaller(h->pos + query + 1 - p, SCORES),
                         scale, s.highest + r, s.sum + r, s.out + r * s.width, s.width);
        }
        multiply_panel(s.scores, SCORES, rows, s.values, s.width, n, s.width, s.out, s.width, 1);
    }
    for (long r = 0; r < rows; r++) {
        float *out = h->out + (first + r % queries) * stride + (kv_head * shared + r / queries) * h->head_dim;
        for (long i = 0; i < h->head_dim; i++) out[i] = s.out[r * s.width + i] / s.sum[r];
    }
}
