/* Weights of one type as another, as tinyllama/quant.py defines it, to the byte: what `tinyllama convert` and
 * `quantize` run on.
 *
 * LANES blocks at a time, one a lane, so that nothing is ever added or compared across lanes: element j of all
 * of them lies side by side in x[j]. The loops over lanes are plain C, which a compiler turns into vectors of
 * whatever instruction set the including file is for. */
#include "kernels.h"

enum { LARGE = 256, GROUP = LANES * LARGE }; /* numbers that are cast at a time, at most */

#define FLATTEN static inline __attribute__((always_inline))
/* Not written out before it has become a vector. */
#if defined(__clang__)
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#else
#define EACH_LANE _Pragma("GCC unroll 1") for (int lane = 0; lane < LANES; lane++)
#endif
#define EACH_ELEMENT for (int j = 0; j < BLOCK; j++)

typedef struct {
    float d[LANES], m[LANES];
    uint32_t q[BLOCK][LANES];
} block_group;

/* ---- scales, minima and integers ---- */

/* The element of largest magnitude with its sign; of two equals the first. Of zeros, +0. */
FLATTEN void find_largest(float x[][LANES], const int n, float *largest) {
    float magnitude[LANES] = {0};
    EACH_LANE largest[lane] = 0;
    for (int j = 0; j < n; j++) EACH_LANE {
        float here = fabsf(x[j][lane]);
        largest[lane] = here > magnitude[lane] ? x[j][lane] : largest[lane];
        magnitude[lane] = here > magnitude[lane] ? here : magnitude[lane];
    }
}

/* The smallest and the largest element; of +0 and -0 the first. */
FLATTEN void find_range(float x[][LANES], const int n, float *low, float *high) {
    EACH_LANE low[lane] = high[lane] = x[0][lane];
    for (int j = 0; j < n; j++) EACH_LANE {
        low[lane] = x[j][lane] < low[lane] ? x[j][lane] : low[lane];
        high[lane] = x[j][lane] > high[lane] ? x[j][lane] : high[lane];
    }
}

#include "search.h"
#include "superblocks.h"

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

FLATTEN void quantize_iq4_nl(float x[][LANES], block_group *b) {
    float best[LANES];
    search_ratio(IQ4_NL, BLOCK, x, b->d, best);
    EACH_LANE b->m[lane] = b->d[lane] != 0 ? 1 / b->d[lane] : 0;
    EACH_ELEMENT EACH_LANE b->q[j][lane] = value_index(x[j][lane] * b->m[lane]);
}

FLATTEN void quantize_group(const weight_type to, float x[][LANES], block_group *b) {
    switch (to) {
    case Q4_0: quantize_symmetric(x, 8, b); break;
    case Q5_0: quantize_symmetric(x, 16, b); break;
    case Q4_1: quantize_affine(x, 15, b); break;
    case Q5_1: quantize_affine(x, 31, b); break;
    case Q8_0: quantize_nearest(x, 127, 0, b); break;
    case IQ4_NL: quantize_iq4_nl(x, b); break;
    case Q4_1_2023: quantize_q4_1_2023(x, b); break;
    default: quantize_nearest(x, 7, 8, b); /* q4_0 of 2023, either layout */
    }
}

/* ---- into the file's bytes: quant.py has the layouts ---- */

/* Byte i of a block's quants: of neighbours nibbles 2i and 2i + 1, else i and i + 16. */
FLATTEN uint32_t byte_of(const weight_type to, const block_group *b, int i, int lane) {
    if (to == Q8_0) return b->q[i][lane] & 255;
    const int neighbours = types[to].scale_bytes == 4; /* in files of 2023 */
    int low = neighbours ? 2 * i : i, high = neighbours ? 2 * i + 1 : i + BLOCK / 2;
    return (b->q[low][lane] & 15) | (b->q[high][lane] & 15) << 4;
}

/* The quants of each lane's block as words of four bytes. */
FLATTEN void pack_words(const weight_type to, const block_group *b, int n_words, uint32_t words[][LANES]) {
    for (int k = 0; k < n_words; k++)
        EACH_LANE {
            words[k][lane] = byte_of(to, b, 4 * k, lane) | byte_of(to, b, 4 * k + 1, lane) << 8 |
                             byte_of(to, b, 4 * k + 2, lane) << 16 | byte_of(to, b, 4 * k + 3, lane) << 24;
        }
}

FLATTEN void pack_fifth_bits(const block_group *b, uint32_t *words) {
    EACH_LANE words[lane] = 0;
    EACH_ELEMENT EACH_LANE words[lane] |= (b->q[j][lane] >> 4) << j;
}

/* The first n blocks of a group, of which the first is number `block` of rows of n_blocks. */
FLATTEN void put_group(const weight_type to, const block_group *b, uint8_t *out, long n_blocks, long block, int n) {
    const int wide = types[to].scale_bytes == 4, n_words = to == Q8_0 ? 8 : 4;
    const size_t scale = wide ? 4 : 2;
    uint32_t words[8][LANES], fifth[LANES];
    uint16_t d[LANES], m[LANES];
    pack_words(to, b, n_words, words);
    if (has_fifth_bits(to)) pack_fifth_bits(b, fifth);
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
FLATTEN void load_numbers(const file_blocks *from, long first, long n, const long room, float *x) {
    const long bytes = from->type == F32 ? 4 : 2;
    const uint8_t *at = from->data + first * bytes;
    _Alignas(float) uint8_t padded[GROUP * sizeof(float)];
    if (n < room) {
        memset(padded, 0, sizeof padded);
        at = memcpy(padded, at, (size_t)(n * bytes));
    }
    for (int i = 0; i < room; i += LANES) {
        if (from->type == F32)
            v_store(x + i, v_load((const float *)at + i));
        else if (from->type == F16)
            v_store(x + i, v_load_f16((const uint16_t *)at + i));
        else
            v_store(x + i, v_load_bf16((const uint16_t *)at + i));
    }
}

/* Whether all magnitudes are at most `limit`. Bits have the order of the numbers, and NaN comes last. */
FLATTEN int all_within(const float *x, const long n, float limit) {
    int32_t largest = 0, highest;
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &x[i], 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    memcpy(&highest, &limit, 4);
    return largest <= highest;
}

/* The same LANES blocks, one a lane. */
FLATTEN void to_lanes(const float *x, const int block, float lanes[][LANES]) {
    for (int j = 0; j < block; j += LANES) v_transpose(x + j, block, lanes[j], LANES);
}

FLATTEN void cast_group(const weight_type to, const float *x, uint8_t *out, long n_blocks, long block, int n) {
    if (types[to].block == LARGE) {
        large_group b;
        to_lanes(x, LARGE, b.x);
        quantize_large(to, &b);
        put_large(to, &b, out + block * types[to].bytes, n);
    } else {
        float lanes[BLOCK][LANES];
        block_group b;
        to_lanes(x, BLOCK, lanes);
        quantize_group(to, lanes, &b);
        put_group(to, &b, out, n_blocks, block, n);
    }
}

FLATTEN int cast_to(const file_blocks *from, const weight_type to, uint8_t *out) {
    const float limit = to == F32 || types[to].scale_bytes == 4 ? FLT_MAX : 65504;
    const long block = types[to].block, group = LANES * (block == 1 ? BLOCK : block);
    long n = from->n_rows * from->n_cols;
    for (long i = 0; i < n; i += group) {
        long left = n - i < group ? n - i : group;
        float x[GROUP];
        load_numbers(from, i, left, group, x);
        if (!all_within(x, group, limit)) return -1;
        if (to == F32)
            memcpy(out + 4 * i, x, (size_t)left * 4);
        else if (to == F16)
            to_f16(x, left, (uint16_t *)(out + 2 * i));
        else
            cast_group(to, x, out, from->n_cols / block, i / block, (int)(left / block));
    }
    return 0;
}

static int cast(const file_blocks *from, weight_type to, uint8_t *out) {
#define CAST_CASE(id, ...) case id: return cast_to(from, id, out);
    switch (to) { /* each with its type known to the compiler */
        TYPES(CAST_CASE)
    default: return -1;
    }
}
