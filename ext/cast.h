/* Weights of one type as another, as tinyllama/quant.py defines it, to the byte: what `tinyllama convert` and
 * `quantize` run on.
 *
 * LANES blocks at a time, one a lane. */
#include "superblocks.h"

enum { GROUP = LANES * LARGE }; /* numbers that are cast at a time, at most */

typedef struct {
    float d[LANES], m[LANES];
    uint32_t q[BLOCK][LANES];
} block_group;

/* ---- scales, minima and integers ---- */

/* x = (x - m) / d + offset by a product with 1 / d; of a block of zeros, offset; 0 where d or 1 / d is infinite. */
FLATTEN void to_steps(float x[][LANES], const float *m, const float *d, float offset) {
    float inverse[LANES], add[LANES];
    EACH_LANE {
        float exact = 1 / d[lane];
        int lost = fabsf(exact) > FLT_MAX || fabsf(d[lane]) > FLT_MAX;
        inverse[lane] = lost ? 0 : exact;
        add[lane] = lost && d[lane] != 0 ? 0 : offset;
    }
    EACH_ELEMENT EACH_LANE {
        float above = x[j][lane] - m[lane];
        above = above < FLT_MAX ? above : FLT_MAX; /* times 0 is 0, times infinity it would be NaN */
        x[j][lane] = above * inverse[lane] + add[lane];
    }
}

FLATTEN void truncate_steps(float x[][LANES], int top, block_group *b) {
    EACH_ELEMENT EACH_LANE {
        int32_t whole = (int32_t)x[j][lane];
        b->q[j][lane] = (uint32_t)(whole < top ? whole : top);
    }
}

/* C's roundf, half away from zero, plus zero. Doubling a number is exact, and so is halving an even integer. */
FLATTEN void round_steps(float x[][LANES], int zero, block_group *b) {
    EACH_ELEMENT EACH_LANE {
        int32_t doubled = (int32_t)(x[j][lane] + x[j][lane]);
        b->q[j][lane] = (uint32_t)(((doubled + (doubled > 0)) >> 1) + zero);
    }
}

FLATTEN void quantize_symmetric(float x[][LANES], int zero, block_group *b) {
    find_largest(x, BLOCK, b->d);
    EACH_LANE b->d[lane] /= (float)-zero, b->m[lane] = 0;
    to_steps(x, b->m, b->d, (float)zero + 0.5f);
    truncate_steps(x, 2 * zero - 1, b);
}

FLATTEN void quantize_affine(float x[][LANES], int top, block_group *b) {
    float high[LANES];
    find_range(x, BLOCK, b->m, high);
    EACH_LANE b->d[lane] = (high[lane] - b->m[lane]) / (float)top;
    to_steps(x, b->m, b->d, 0.5f);
    truncate_steps(x, top, b);
}

FLATTEN void quantize_nearest(float x[][LANES], int top, int zero, block_group *b) {
    find_largest(x, BLOCK, b->d);
    EACH_LANE b->d[lane] = fabsf(b->d[lane]) / (float)top, b->m[lane] = 0;
    to_steps(x, b->m, b->d, 0);
    round_steps(x, zero, b);
}

/* Its search for the maximum started at FLT_MIN, the smallest positive float, not at -FLT_MAX. */
FLATTEN void quantize_q4_1_2023(float x[][LANES], block_group *b) {
    float high[LANES];
    find_range(x, BLOCK, b->m, high);
    EACH_LANE b->d[lane] = ((high[lane] > FLT_MIN ? high[lane] : FLT_MIN) - b->m[lane]) / 15;
    to_steps(x, b->m, b->d, 0);
    round_steps(x, 0, b);
}

FLATTEN void quantize_iq4_nl(float x[][LANES], float w[][LANES], block_group *b) {
    float inverse[LANES];
    search_ratio(0, BLOCK, x, w, b->d, inverse);
    EACH_LANE inverse[lane] = choose(b->d[lane] != 0, 1 / b->d[lane], 0);
    EACH_ELEMENT EACH_LANE b->q[j][lane] = value_index(inverse[lane] * x[j][lane]);
    EACH_LANE b->m[lane] = 0;
}

/* Of the types that have a search only with an importance matrix. */
INLINE int is_searched(const weight_type to) { return to == Q4_0 || to == Q4_1 || to == Q5_0 || to == Q5_1; }

FLATTEN void search_group(const weight_type to, float x[][LANES], float w[][LANES], block_group *b) {
    float inverse[LANES];
    if (has_minimum(to)) {
        search_affine(affine_search_of(to, 1), BLOCK, x, w, b->d, b->m, b->q);
        return;
    }
    search_ratio(zero_of(to), BLOCK, x, w, b->d, inverse);
    round_ratio(zero_of(to), BLOCK, x, inverse, b->q);
    EACH_LANE b->m[lane] = 0;
}

FLATTEN void quantize_group(const weight_type to, float x[][LANES], float w[][LANES], block_group *b) {
    switch (to) {
    case Q4_0: quantize_symmetric(x, 8, b); break;
    case Q5_0: quantize_symmetric(x, 16, b); break;
    case Q4_1: quantize_affine(x, 15, b); break;
    case Q5_1: quantize_affine(x, 31, b); break;
    case Q8_0: quantize_nearest(x, 127, 0, b); break;
    case IQ4_NL: quantize_iq4_nl(x, w, b); break;
    case Q4_1_2023: quantize_q4_1_2023(x, b); break;
    default: quantize_nearest(x, 7, 8, b); /* q4_0 of 2023, either layout */
    }
}

/* ---- into the file's bytes: quant.py has the layouts ---- */

/* The first n blocks of a group, of which the first is number `block` of rows of n_blocks. */
FLATTEN void put_group(const weight_type to, block_group *b, uint8_t *out, long n_blocks, long block, int n) {
    const int wide = types[to].scale_bytes == 4, n_words = to == Q8_0 ? 8 : 4;
    const size_t scale = wide ? 4 : 2;
    const int bits = to == Q8_0 ? 8 : 4, apart = wide ? 1 : BLOCK / 2; /* neighbours share a byte in files of 2023 */
    uint32_t words[8][LANES], fifth[LANES];
    uint16_t d[LANES], m[LANES];
    for (int k = 0; k < n_words; k++) pack_word(b->q, bits, apart, 0, 4 * k, words[k]);
    if (has_fifth_bits(to)) pack_word(b->q, 1, 1, 4, 0, fifth);
    to_f16(b->d, LANES, d);
    to_f16(b->m, LANES, m);
    for (int lane = 0; lane < n; lane++, block++) {
        const places at = places_of(to, n_blocks, block % n_blocks);
        uint8_t *row = out + block / n_blocks * file_row_bytes(to, n_blocks * BLOCK);
        memcpy(row + at.d, wide ? (const void *)&b->d[lane] : &d[lane], scale);
        if (has_minimum(to)) memcpy(row + at.m, wide ? (const void *)&b->m[lane] : &m[lane], scale);
        if (has_fifth_bits(to)) memcpy(row + at.fifth, &fifth[lane], 4);
        for (int k = 0; k < n_words; k++) memcpy(row + at.q + 4 * k, &words[k][lane], 4);
    }
}

/* ---- numbers ---- */

/* n <= room numbers from `first` on as float32, zeros behind them. */
static void load_numbers(const file_blocks *from, long first, long n, long room, float *x) {
    const long bytes = from->type == F32 ? 4 : 2;
    const uint8_t *at = from->data + first * bytes;
    _Alignas(float) uint8_t padded[GROUP * sizeof(float)];
    if (n < room) {
        memset(padded, 0, sizeof padded);
        at = memcpy(padded, at, (size_t)(n * bytes));
    }
    for (long i = 0; i < room; i += LANES) {
        if (from->type == F32)
            v_store(x + i, v_load((const float *)at + i));
        else if (from->type == F16)
            v_store(x + i, v_load_f16((const uint16_t *)at + i));
        else
            v_store(x + i, v_load_bf16((const uint16_t *)at + i));
    }
}

/* Whether all magnitudes are at most `limit`. Bits have the order of the numbers, and NaN comes last. */
static int all_within(const float *x, long n, float limit) {
    int32_t largest = 0, highest;
    for (long i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &x[i], 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    memcpy(&highest, &limit, 4);
    return largest <= highest;
}

/* To nearest even. */
static void to_bf16(const float *x, long n, uint8_t *out) {
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        write_u16(out + 2 * i, (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
    }
}

/* ---- all of it ---- */

FLATTEN void cast_numbers(const weight_type to, const float *x, long n, uint8_t *out) {
    if (to == F32)
        memcpy(out, x, (size_t)n * 4);
    else if (to == F16)
        to_f16(x, n, (uint16_t *)out);
    else
        to_bf16(x, n, out);
}

/* How much errors count. */
typedef struct {
    const float *importance; /* of each column, or NULL: as without an importance matrix */
    const file_blocks *from;
    long row; /* the last whose mean square was asked for */
    float mean;
} weights_of_errors;

static float mean_square(weights_of_errors *of, long row) {
    const long n = of->from->n_cols;
    float x[GROUP];
    if (row == of->row) return of->mean;
    of->row = row, of->mean = 0;
    for (long i = 0; i < n; i += GROUP) {
        const long left = n - i < GROUP ? n - i : GROUP;
        load_numbers(of->from, row * n + i, left, GROUP, x);
        for (long k = 0; k < left; k++) of->mean += x[k] * x[k];
    }
    return of->mean /= (float)n;
}

/* The importance of the elements of blocks `block`.. of `size`; any behind the last of all. */
FLATTEN void load_importance(const weights_of_errors *of, const int size, long block, float w[][LANES]) {
    const long n_blocks = of->from->n_cols / size;
    float rows[GROUP];
    for (int lane = 0; lane < LANES; lane++)
        memcpy(rows + lane * size, of->importance + (block + lane) % n_blocks * size, (size_t)size * sizeof(float));
    for (int j = 0; j < size; j += LANES) v_transpose(rows + j, size, w[j], LANES);
}

FLATTEN void weigh_blocks(const weight_type to, weights_of_errors *of, float x[][LANES], long block, float w[][LANES]) {
    const long n_blocks = of->from->n_cols / BLOCK, last = of->from->n_rows - 1;
    float mean[LANES] = {0};
    load_importance(of, BLOCK, block, w);
    if (to == IQ4_NL) {
        EACH_ELEMENT EACH_LANE mean[lane] += x[j][lane] * x[j][lane];
        EACH_LANE mean[lane] *= 2.0f / BLOCK;
    } else {
        for (int lane = 0; lane < LANES; lane++) {
            const long row = (block + lane) / n_blocks;
            mean[lane] = mean_square(of, row < last ? row : last);
        }
    }
    weigh_elements(BLOCK, x, mean, w);
}

FLATTEN void cast_super(const weight_type to, const float *x, weights_of_errors *of, uint8_t *out, long block, int n) {
    super_group b;
    const destination each = {out, (size_t)types[to].bytes, n};
    for (int j = 0; j < LARGE; j += LANES) v_transpose(x + j, LARGE, b.x[j], LANES);
    b.weighed = of->importance != NULL;
    if (b.weighed) load_importance(of, LARGE, block, b.w);
    quantize_super(to, &b);
    put_super(to, &b, &each);
}

FLATTEN void cast_blocks(const weight_type to, const float *x, weights_of_errors *of, uint8_t *out, long block, int n) {
    float columns[BLOCK][LANES], w[BLOCK][LANES];
    block_group b;
    for (int j = 0; j < BLOCK; j += LANES) v_transpose(x + j, BLOCK, columns[j], LANES);
    if (of->importance && (to == IQ4_NL || is_searched(to)))
        weigh_blocks(to, of, columns, block, w);
    else if (to == IQ4_NL)
        EACH_ELEMENT EACH_LANE w[j][lane] = columns[j][lane] * columns[j][lane];
    if (of->importance && is_searched(to))
        search_group(to, columns, w, &b);
    else
        quantize_group(to, columns, w, &b);
    put_group(to, &b, out, of->from->n_cols / types[to].block, block, n);
}

FLATTEN int cast_to(const file_blocks *from, const weight_type to, const float *importance, uint8_t *out) {
    const float limit = to == F16 || types[to].scale_bytes == 2 ? 65504 : FLT_MAX;
    const long block = types[to].block, group = LANES * (has_super_blocks(to) ? LARGE : BLOCK);
    const long n = from->n_rows * from->n_cols;
    weights_of_errors of = {importance, from, -1, 0};
    float x[GROUP];
    for (long i = 0; i < n; i += group) {
        const long left = n - i < group ? n - i : group;
        load_numbers(from, i, left, group, x);
        if (!all_within(x, group, limit)) return -1;
        if (has_super_blocks(to))
            cast_super(to, x, &of, out + file_row_bytes(to, i), i / block, (int)(left / block));
        else if (has_blocks(to))
            cast_blocks(to, x, &of, out, i / block, (int)(left / block));
        else
            cast_numbers(to, x, left, out + file_row_bytes(to, i));
    }
    return 0;
}

static int cast(const file_blocks *from, weight_type to, const float *importance, uint8_t *out) {
#define CAST_CASE(id, ...) case id: return cast_to(from, id, importance, out);
    switch (to) { /* each with its type known to the compiler */
        TYPES(CAST_CASE)
    default: return -1;
    }
}
