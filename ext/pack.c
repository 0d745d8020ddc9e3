/* From a file's blocks to prepared weights. Portable, the same for every level. */
#include <string.h>

#include "kernels.h"

/* ---- into strips, four rows at a time ---- */

enum {
    LANES = 4,
    CHUNK = 16, /* blocks of a row that are packed together: those of 32 rows fit into the nearest cache */
};

/* Every CPU has vectors of 16 bytes, and compilers know its instructions. */
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(16)));
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
    uint8_t *strip;
    long block;          /* of the weight, which block 0 of a row becomes */
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

INLINE bytes load(const uint8_t *from) {
    bytes loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

/* ---- quants: bits of elements 0..15, and those of elements 16..31 in front of them in the same bytes ---- */

/* Nibbles of neighbours (2j, 2j+1) -> of halves (j, j+16). */
INLINE bytes halve_nibbles(bytes q) {
    bytes even = q & 15, odd = q >> 4;
    bytes first = SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    bytes last = SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return first | last << 4;
}

/* Bits whose places' numbers differ in bits a = 1, b = 0 change places with those that have a = 0, b = 1, which are
 * `mask`; `by` is 2^a - 2^b. */
INLINE words swap_bits(words x, const int by, const uint32_t mask) {
    const words different = (x ^ x >> by) & mask;
    return x ^ different ^ different << by;
}

/* Bit 16 half + 4k + j of each word becomes bit 8j + 2k + half. */
INLINE words order_bits(words x) {
    x = swap_bits(x, 15, 0x0000aaaa);
    x = swap_bits(x, 14, 0x0000cccc);
    x = swap_bits(x, 6, 0x00cc00cc);
    return swap_bits(x, 2, 0x0c0c0c0c);
}

/* Those of block b of a super-block: 32 bytes have `bits` bits of 8 / bits blocks. */
INLINE bytes part_of_bytes(const uint8_t *from, const int bits, long group, long shift) {
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    bytes first = (bytes)((shorts)load(from + 32 * group) >> (int)shift) & mask;
    bytes last = (bytes)((shorts)load(from + 32 * group + 16) >> (int)shift) & mask;
    return first | (bytes)((shorts)last << bits);
}

INLINE bytes low_pairs(const weight_type type, const uint8_t *row, const places at, long i) {
    const int bits = low_bits(type), blocks = 8 / bits;
    const uint8_t *q = row + i / SUPER * types[type].bytes + types[type].q;
    const long b = i % SUPER;
    if (type == IQ4_XS) return load(q + 16 * b);
    if (type == Q6_K) return part_of_bytes(q, 4, b / 4 * 2 + b % 2, b % 4 / 2 * 4);
    if (has_super_blocks(type)) return part_of_bytes(q, bits, b / blocks, b % blocks * bits);
    const bytes nibbles = load(row + at.q);
    return types[type].scale_bytes == 4 ? halve_nibbles(nibbles) : nibbles;
}

INLINE bytes high_pairs(const weight_type type, const uint8_t *row, long i) {
    const int bits = high_bits(type) ? high_bits(type) : 1, blocks = 8 / bits;
    const long b = i % SUPER;
    return part_of_bytes(row + i / SUPER * types[type].bytes + types[type].high, bits, b / blocks, b % blocks * bits);
}

/* Fours of n rows go where kernels.h says. */
INLINE void put_fours(const int bits, const int n, const bytes pairs[LANES], uint8_t *to) {
    const int together = 4 / bits; /* pairs of fours, in the same bytes */
    words fours[LANES];
    for (int r = 0; r < LANES; r++) fours[r] = (words)pairs[r];
    transpose(fours);
    for (int k = 0; k < 4; k += together, to += 4 * STRIP) {
        words all = fours[k];
        for (int i = 1; i < together; i++) all |= fours[k + i] << 2 * bits * i;
        memcpy(to, &all, (size_t)n * 4);
    }
}

/* 16 of 32 signed bytes. */
INLINE void put_bytes(const int n, const bytes q[LANES], uint8_t *to) {
    words fours[LANES];
    for (int r = 0; r < LANES; r++) fours[r] = (words)(q[r] ^ 0x80);
    transpose(fours);
    for (int k = 0; k < 4; k++) memcpy(to + 2 * k * 4 * STRIP, &fours[k], (size_t)n * 4);
}

INLINE void pack_quants(const weight_type type, const int n, const lanes *l, long i, uint8_t *block) {
    const places at = places_of(type, l->n_blocks, i);
    uint8_t *low = block + l->w->at.low + l->lane * 4, *high = block + l->w->at.high + l->lane * 4;
    bytes q[LANES] = {{0}}, more[LANES] = {{0}};
    words fifth = {0};
    for (int r = 0; r < n; r++) {
        const uint8_t *row = l->rows[r];
        q[r] = type == Q8_0 ? load(row + at.q) : low_pairs(type, row, at, i);
        if (type == Q8_0) more[r] = load(row + at.q + 16);
        if (high_bits(type) && has_super_blocks(type)) more[r] = high_pairs(type, row, i);
        if (high_bits(type) && !has_super_blocks(type)) fifth[r] = (uint32_t)read_i32(row + at.fifth);
    }
    if (type == Q8_0) {
        put_bytes(n, q, low);
        put_bytes(n, more, low + 4 * STRIP);
        return;
    }
    put_fours(low_bits(type), n, q, low);
    if (high_bits(type) && has_super_blocks(type)) put_fours(high_bits(type), n, more, high);
    fifth = order_bits(fifth);
    if (high_bits(type) && !has_super_blocks(type)) memcpy(high, &fifth, (size_t)n * 4);
}

/* ---- scales ---- */

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
            memcpy(to + i * l->w->at.block_bytes, from + i * step, 2);
    }
    if (!wide) return;
    active_kernels()->to_f16(scales, n, halves);
    for (long i = 0; i < n; i++) write_u16(to + i * l->w->at.block_bytes, halves[i]);
}

/* The i-th small scale of a super-block. q2_k's are packed with their minima. */
INLINE int small_scale(const weight_type type, const uint8_t *scales, long i) {
    switch (type) {
    case Q3_K: return ((scales[i % 8] >> i / 8 * 4 & 15) | (scales[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32;
    case Q4_K:
    case Q5_K: return i < 4 ? scales[i] & 63 : (scales[i + 4] & 15) | scales[i - 4] >> 6 << 4;
    case IQ4_XS: return ((scales[i / 2] >> i % 2 * 4 & 15) | (read_u16(scales - 2) >> i * 2 & 3) << 4) - 32;
    default: return scales[i];
    }
}

INLINE int small_minimum(const uint8_t *scales, long i) {
    return i < 4 ? scales[i + 4] & 63 : scales[i + 4] >> 4 | scales[i] >> 6 << 4;
}

/* Of one row, of super-blocks. */
INLINE void pack_super_scales(const weight_type type, const uint8_t *row, long lane, const lanes *l) {
    const int shared = types[type].shared, parts = BLOCK / shared;
    for (long i = l->first; i < l->last; i++) {
        const uint8_t *from = row + i / SUPER * types[type].bytes, *scales = from + types[type].scales;
        uint8_t *head = l->strip + head_place(l->w->at, l->block + i);
        uint8_t *to = l->strip + block_place(l->w->at, l->block + i);
        if (i % SUPER == 0) {
            memcpy(head + 2 * lane, from + types[type].d, 2);
            if (has_minimum(type)) write_u16(head + 2 * (STRIP + lane), read_u16(from + types[type].d + 2) ^ 0x8000);
        }
        for (int j = 0; j < parts; j++) {
            const long part = i % SUPER * parts + j;
            to[lane * parts + j] = (uint8_t)small_scale(type, scales, part);
            if (has_minimum(type) && !has_halves(type)) to[l->w->at.m + lane] = (uint8_t)small_minimum(scales, part);
        }
    }
}

INLINE void pack_plain_scales(const weight_type type, const uint8_t *row, long lane, const lanes *l) {
    const places first = places_of(type, l->n_blocks, l->first);
    const long step = types[type].planar ? types[type].scale_bytes : types[type].bytes;
    uint8_t *to = l->strip + block_place(l->w->at, l->block + l->first) + 2 * lane;
    pack_scales(type, row + first.d, step, l, to);
    if (has_minimum(type)) pack_scales(type, row + first.m, step, l, to + l->w->at.m);
}

/* ---- all of it ---- */

INLINE void pack_lanes(const weight_type type, const int n, const lanes *l) {
    for (int r = 0; r < n; r++)
        if (has_super_blocks(type))
            pack_super_scales(type, l->rows[r], l->lane + r, l);
        else
            pack_plain_scales(type, l->rows[r], l->lane + r, l);
    for (long i = l->first; i < l->last; i++)
        pack_quants(type, n, l, i, l->strip + block_place(l->w->at, l->block + i));
}

INLINE void pack_type(const weight_type type, const lanes *l) {
    if (l->n == LANES)
        pack_lanes(type, LANES, l);
    else
        pack_lanes(type, l->n, l);
}

static void pack_some(weight_type type, const lanes *l) {
#define PACK_CASE(id, ...) case id: pack_type(id, l); break;
    switch (type) { /* each known to the compiler */
        BLOCK_TYPES(PACK_CASE)
        FILE_TYPES(PACK_CASE)
    default: break;
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
    lanes l = {.n_blocks = n_blocks, .w = to, .block = col / BLOCK};
    l.strip = to->data + (row + first) / STRIP * to->strip_bytes;
    for (l.first = 0; l.first < n_blocks; l.first = l.last) {
        l.last = l.first + CHUNK < n_blocks ? l.first + CHUNK : n_blocks;
        for (long r = first; r < last; r += l.n) {
            l.lane = (row + r) % STRIP;
            l.n = (int)(LANES - l.lane % LANES < last - r ? LANES - l.lane % LANES : last - r);
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
