/* From a file's blocks to prepared weights. Portable, the same for every level. */
#include <string.h>

#include "kernels.h"

/* Block i of a row of q6_k as a block of q8_0. 256 weights lie in two halves of four groups of 32. */
static void requantize(const uint8_t *row, long i, uint8_t *block) {
    const uint8_t *from = row + i / 8 * types[Q6_K].bytes;
    int half = i % 8 / 4, group = i % 4, shift = group / 2 * 4;
    const uint8_t *low = from + half * 64 + group % 2 * 32, *high = from + 128 + half * 32;
    const int8_t *scales = (const int8_t *)from + 192 + half * 8 + group * 2;
    float d = f32_from_f16(read_u16(from + 208)), x[BLOCK], largest;
    for (int j = 0; j < BLOCK; j++)
        x[j] = (float)(((low[j] >> shift & 15) | (high[j] >> group * 2 & 3) << 4) - 32);
    int32_t sizes[BLOCK], size = 0; /* floats without a sign are in the order of their bits */
    for (int j = 0; j < BLOCK; j++) x[j] *= (float)scales[j / 16] * d;
    memcpy(sizes, x, sizeof sizes);
    for (int j = 0; j < BLOCK; j++) size = (sizes[j] & INT32_MAX) > size ? sizes[j] & INT32_MAX : size;
    memcpy(&largest, &size, sizeof largest);
    float scale = largest / 127, inverse = finite_inverse(2, scale);
    write_u16(block, f16_from_f32(scale));
    for (int j = 0; j < BLOCK; j++) { /* twice the value, truncated, tells halves, which round away from 0 */
        int twice = inverse > 0 ? (int)(x[j] * inverse) : 0;
        block[2 + j] = (uint8_t)((twice + (twice > 0)) >> 1);
    }
}

/* ---- into strips, four rows at a time ---- */

enum {
    LANES = 4,
    CHUNK = 16, /* blocks of a row that are packed together: those of 32 rows fit into the nearest cache */
};

/* Every CPU has vectors of 16 bytes, and compilers know its instructions. */
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif

/* Up to four rows of a file, which become neighbouring lanes of a strip. */
typedef struct {
    const uint8_t *rows[LANES];
    int n;
    long n_blocks;       /* of a whole row */
    const weight *w;
    uint8_t *to;         /* the strip's block that block `first` becomes a part of */
    long lane;           /* of the first row */
    long first, last;    /* blocks */
} lanes;

/* Word k of row r -> word r of vector k. */
INLINE void transpose(words w[LANES]) {
    words a = SHUFFLE(w[0], w[2], 0, 4, 1, 5), b = SHUFFLE(w[1], w[3], 0, 4, 1, 5);
    words c = SHUFFLE(w[0], w[2], 2, 6, 3, 7), d = SHUFFLE(w[1], w[3], 2, 6, 3, 7);
    w[0] = SHUFFLE(a, b, 0, 4, 1, 5), w[1] = SHUFFLE(a, b, 2, 6, 3, 7);
    w[2] = SHUFFLE(c, d, 0, 4, 1, 5), w[3] = SHUFFLE(c, d, 2, 6, 3, 7);
}

/* Nibbles of neighbours (2j, 2j+1) -> of halves (j, j+16). */
INLINE bytes halve_nibbles(bytes q) {
    bytes even = q & 15, odd = q >> 4;
    bytes first = SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    bytes last = SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return first | last << 4;
}

/* Scales or minima of one row, `step` bytes apart: f16, or float32 that becomes it. */
INLINE void pack_scales(const weight_type type, const uint8_t *from, long step, const lanes *l, uint8_t *to) {
    const int wide = types[type].scale_bytes == 4;
    long n = l->last - l->first;
    float scales[CHUNK];
    uint16_t halves[CHUNK];
    for (long i = 0; i < n; i++) {
        if (wide)
            scales[i] = read_f32(from + i * step) / l->w->factor;
        else
            memcpy(to + i * l->w->block_bytes, from + i * step, 2);
    }
    if (!wide) return;
    active_kernels()->to_f16(scales, n, halves);
    for (long i = 0; i < n; i++) write_u16(to + i * l->w->block_bytes, halves[i]);
}

INLINE void pack_fifth_bits(const uint32_t bits[LANES], const int n, const lanes *l, uint8_t *block) {
    int shift = (int)(l->lane % LANES) * 4;
    unsigned mask = (0xffffu >> (LANES - n) * 4) << shift;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++) {
            unsigned nibbles = 0;
            for (int r = 0; r < n; r++) nibbles |= (bits[r] >> (half * 16 + k * 4) & 15) << r * 4;
            uint8_t *at = fifth_at(l->w, block, l->lane / LANES * LANES, k, half);
            write_u16(at, (uint16_t)((read_u16(at) & ~mask) | nibbles << shift));
        }
}

/* 16 bytes of each of n rows -> four quarters. */
INLINE void pack_quants(const weight_type type, const int n, bytes q[LANES], uint8_t *to) {
    words quarters[LANES];
    for (int r = 0; r < LANES; r++) {
        if (types[type].scale_bytes == 4) q[r] = halve_nibbles(q[r]);
        if (type == Q8_0) q[r] ^= 0x80;
        quarters[r] = (words)q[r];
    }
    transpose(quarters);
    for (int k = 0; k < 4; k++) memcpy(to + k * 4 * STRIP, &quarters[k], (size_t)n * 4);
}

INLINE void pack_lanes(const weight_type type, const int n, const lanes *l) {
    const places first = places_of(type, l->n_blocks, l->first);
    const long step = types[type].planar ? types[type].scale_bytes : types[type].bytes;
    uint8_t *to = l->to;
    for (int r = 0; r < n; r++) {
        pack_scales(type, l->rows[r] + first.d, step, l, to + 2 * (l->lane + r));
        if (has_minimum(type)) pack_scales(type, l->rows[r] + first.m, step, l, to + l->w->m + 2 * (l->lane + r));
    }
    for (long i = l->first; i < l->last; i++, to += l->w->block_bytes) {
        const places at = places_of(type, l->n_blocks, i);
        bytes low[LANES] = {{0}}, high[LANES] = {{0}};
        uint32_t fifth[LANES];
        for (int r = 0; r < n; r++) {
            memcpy(&low[r], l->rows[r] + at.q, sizeof low[r]);
            if (type == Q8_0) memcpy(&high[r], l->rows[r] + at.q + 16, sizeof high[r]);
            if (has_fifth_bits(type)) memcpy(&fifth[r], l->rows[r] + at.fifth, sizeof fifth[r]);
        }
        if (has_fifth_bits(type)) pack_fifth_bits(fifth, n, l, to);
        pack_quants(type, n, low, to + l->w->q + l->lane * 4);
        if (type == Q8_0) pack_quants(type, n, high, to + l->w->q + (4 * STRIP + l->lane) * 4);
    }
}

INLINE void pack_type(const weight_type type, const lanes *l) {
    if (l->n == LANES)
        pack_lanes(type, LANES, l);
    else
        pack_lanes(type, l->n, l);
}

static void pack_q6_k(lanes l) {
    uint8_t blocks[LANES][CHUNK][2 + BLOCK];
    for (int r = 0; r < l.n; r++) {
        for (long i = l.first; i < l.last; i++) requantize(l.rows[r], i, blocks[r][i - l.first]);
        l.rows[r] = blocks[r][0];
    }
    l.n_blocks = l.last -= l.first, l.first = 0;
    pack_type(Q8_0, &l);
}

static void pack_some(weight_type type, const lanes *l) {
#define PACK_CASE(id, ...) case id: pack_type(id, l); break;
    switch (type) { /* each known to the compiler */
        BLOCK_TYPES(PACK_CASE)
    case Q4_0_2023: pack_type(Q4_0_2023, l); break;
    case Q4_0_2023_PLANAR: pack_type(Q4_0_2023_PLANAR, l); break;
    case Q4_1_2023: pack_type(Q4_1_2023, l); break;
    default: pack_q6_k(*l); break;
    }
}

/* Asks for the same blocks of the same rows of the next strip. */
INLINE void prefetch(const uint8_t *row, long row_bytes, long n_blocks, const lanes *l) {
    const uint8_t *ahead = row + STRIP * row_bytes;
    for (long at = l->first * row_bytes / n_blocks; at < l->last * row_bytes / n_blocks; at += 64)
        __builtin_prefetch(ahead + at);
}

/* Rows first..last-1 of the file, which all go into one strip. */
static void pack_strip(const file_blocks *from, const weight *to, long row, long col, long first, long last) {
    long row_bytes = file_row_bytes(from->type, from->n_cols), n_blocks = from->n_cols / BLOCK;
    lanes l = {.n_blocks = n_blocks, .w = to};
    for (l.first = 0; l.first < n_blocks; l.first = l.last) {
        l.last = l.first + CHUNK < n_blocks ? l.first + CHUNK : n_blocks;
        for (long r = first; r < last; r += l.n) {
            l.lane = (row + r) % STRIP;
            l.n = (int)(LANES - l.lane % LANES < last - r ? LANES - l.lane % LANES : last - r);
            l.to = block_at(to, row + r, col / BLOCK + l.first);
            for (int i = 0; i < l.n; i++) {
                l.rows[i] = from->data + (r + i) * row_bytes;
                prefetch(l.rows[i], row_bytes, n_blocks, &l);
            }
            pack_some(from->type, &l);
        }
    }
}

void pack_rows(const file_blocks *from, const weight *to, long row, long col, long first, long last) {
    long row_bytes = file_row_bytes(from->type, from->n_cols);
    for (long end; first < last; first = end) {
        end = first + STRIP - (row + first) % STRIP;
        end = end < last ? end : last;
        if (has_blocks(to->type)) {
            pack_strip(from, to, row, col, first, end);
            continue;
        }
        for (long r = first; r < end; r++)
            memmove(to->data + (row + r) * to->row_bytes + col * types[from->type].bytes,
                    from->data + r * row_bytes, (size_t)row_bytes);
    }
}

/* ---- mapped weights ---- */

/* Rows of numbers that lie in the file as they would be packed, with as much behind them as may be read. */
static const uint8_t *in_place(const weight *w, long first, long last) {
    if (has_blocks(w->type) || w->n_pieces != 1) return NULL;
    const piece *p = w->pieces;
    long row_bytes = file_row_bytes(p->blocks.type, p->blocks.n_cols);
    const uint8_t *data = p->blocks.data + first * row_bytes;
    int whole = p->blocks.n_rows == w->n_out && row_bytes == w->row_bytes;
    int aligned = (uintptr_t)data % (w->type == F32 ? 4 : 2) == 0;
    int followed = (w->n_out - last) * row_bytes >= SLACK;
    return whole && aligned && followed ? data : NULL;
}

weight rows_of(const weight *w, long first, long last, uint8_t *memory) {
    weight rows = *w;
    const uint8_t *data = in_place(w, first, last);
    rows.n_out = last - first, rows.n_strips = (rows.n_out + STRIP - 1) / STRIP, rows.n_pieces = 0;
    rows.data = data ? (uint8_t *)data : memory; /* kernels only read it */
    if (data) return rows;
    if (rows.n_out % STRIP) memset(memory, 0, strips_bytes(w, rows.n_strips));
    for (const piece *p = w->pieces; p < w->pieces + w->n_pieces; p++) {
        long start = first > p->row ? first - p->row : 0, end = last - p->row;
        end = end < p->blocks.n_rows ? end : p->blocks.n_rows;
        pack_rows(&p->blocks, &rows, p->row - first, p->col, start, end);
    }
    return rows;
}
