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

/* Two vectors' first elements in turns, and their last. */
#define FIRST_WORDS 0, 4, 1, 5
#define LAST_WORDS 2, 6, 3, 7
#define FIRST_SHORTS 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_SHORTS 4, 12, 5, 13, 6, 14, 7, 15
#define FIRST_BYTES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_BYTES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

/* Four rows -> their first elements, then their second ones, ... */
#define INTERLEAVE(name, type, FIRST, LAST)                                                 \
    INLINE void name(type rows[LANES]) {                                                    \
        type a = SHUFFLE(rows[0], rows[2], FIRST), b = SHUFFLE(rows[1], rows[3], FIRST);    \
        type c = SHUFFLE(rows[0], rows[2], LAST), d = SHUFFLE(rows[1], rows[3], LAST);      \
        rows[0] = SHUFFLE(a, b, FIRST), rows[1] = SHUFFLE(a, b, LAST);                      \
        rows[2] = SHUFFLE(c, d, FIRST), rows[3] = SHUFFLE(c, d, LAST);                      \
    }
INTERLEAVE(interleave_words, words, FIRST_WORDS, LAST_WORDS)
INTERLEAVE(interleave_shorts, shorts, FIRST_SHORTS, LAST_SHORTS)
INTERLEAVE(interleave_bytes, bytes, FIRST_BYTES, LAST_BYTES)

INLINE bytes load(const uint8_t *from) {
    bytes loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

/* ---- quants: bits of elements 0..15, and those of elements 16..31 in front of them in the same bytes ---- */

/* Nibbles of neighbours (2j, 2j+1) -> of halves (j, j+16). */
INLINE bytes halve_nibbles(bytes q) {
    bytes even = q & 15, odd = q >> 4;
    return SHUFFLE(even, odd, FIRST_BYTES) | SHUFFLE(even, odd, LAST_BYTES) << 4;
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
    interleave_words(fours);
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
    interleave_words(fours);
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

/* One number of each row, `at` bytes into it: f16, or float32 that becomes it. `sign` is flipped. */
INLINE void put_halves(const weight_type type, const int n, const lanes *l, long at, const uint16_t sign, uint8_t *to) {
    shorts halves = {0};
    for (int r = 0; r < n; r++) {
        const uint8_t *from = l->rows[r] + at;
        halves[r] = types[type].scale_bytes == 4 ? f16_from_f32(read_f32(from) / l->w->factor) : read_u16(from);
    }
    halves ^= sign;
    memcpy(to, &halves, (size_t)n * 2);
}

INLINE void pack_scales(const weight_type type, const int n, const lanes *l, long i, uint8_t *block) {
    const places at = places_of(type, l->n_blocks, i);
    put_halves(type, n, l, at.d, 0, block + 2 * l->lane);
    if (has_minimum(type)) put_halves(type, n, l, at.m, 0, block + l->w->at.m + 2 * l->lane);
}

/* The lowest bits of x, so many in each of 8 bytes. */
INLINE uint64_t spread(uint64_t x, const int bits) {
    x = (x | x << (32 - 4 * bits)) & ((1ull << 4 * bits) - 1) * 0x0000000100000001;
    x = (x | x << (16 - 2 * bits)) & ((1ull << 2 * bits) - 1) * 0x0001000100010001;
    return (x | x << (8 - bits)) & ((1ull << bits) - 1) * 0x0101010101010101;
}

/* The 16 small scales of a super-block, or the 8 and behind them the 8 minima. q2_k's lie with their minima. */
INLINE bytes small_scales(const weight_type type, const uint8_t *from) {
    if (type == Q2_K || type == Q6_K) return load(from);
    const uint32_t a = (uint32_t)read_i32(from), b = type == IQ4_XS ? read_u16(from - 2) : (uint32_t)read_i32(from + 4);
    const uint32_t c = type == IQ4_XS ? 0 : (uint32_t)read_i32(from + 8);
    if (type == IQ4_XS) {
        const uint64_t scales = spread(a, 4) | spread(b, 2) << 4;
        return (bytes)(words){(uint32_t)scales, (uint32_t)(scales >> 32), 0, 0} - 32;
    }
    if (type == Q3_K) {
        const words low = {a, b, a >> 4, b >> 4}, high = {c, c >> 2, c >> 4, c >> 6};
        return (bytes)((low & 0x0f0f0f0f) | (high & 0x03030303) << 4) - 32;
    }
    const words whole = {a & 0x3f3f3f3f, c & 0x0f0f0f0f, b & 0x3f3f3f3f, c >> 4 & 0x0f0f0f0f};
    const words high = {0, a >> 2 & 0x30303030, 0, b >> 2 & 0x30303030};
    return (bytes)(whole | high);
}

/* Those of 8 blocks. */
INLINE void pack_super_scales(const weight_type type, const int n, const lanes *l, long i) {
    const long at = i / SUPER * types[type].bytes, parts = BLOCK / types[type].shared;
    uint8_t *head = l->strip + head_place(l->w->at, l->block + i) + 2 * l->lane;
    put_halves(type, n, l, at + types[type].d, 0, head);
    if (has_minimum(type)) put_halves(type, n, l, at + types[type].d + 2, 0x8000, head + 2 * STRIP);
    union {
        bytes rows[LANES];
        shorts pairs[LANES];
        uint8_t all[64];
    } small = {{{0}}};
    for (int r = 0; r < n; r++) small.rows[r] = small_scales(type, l->rows[r] + at + types[type].scales);
    if (parts == 2)
        interleave_shorts(small.pairs);
    else
        interleave_bytes(small.rows);
    for (long b = 0; b < SUPER; b++) {
        uint8_t *to = l->strip + block_place(l->w->at, l->block + i + b) + l->lane * parts;
        memcpy(to, small.all + 4 * b * parts, (size_t)(n * parts));
        if (has_minimum(type) && parts == 1) memcpy(to + l->w->at.m, small.all + 4 * (SUPER + b), (size_t)n);
    }
}

/* ---- all of it ---- */

INLINE void pack_lanes(const weight_type type, const int n, const lanes *of) {
    weight w = *of->w; /* copies, of which the compiler knows that no store changes them */
    lanes own = *of, *const l = &own;
    own.w = &w, w.at = layout_of(types[type].prepared);
    for (long i = l->first; i < l->last; i++) {
        uint8_t *block = l->strip + block_place(l->w->at, l->block + i);
        if (!has_super_blocks(type)) pack_scales(type, n, l, i, block);
        if (has_super_blocks(type) && i % SUPER == 0) pack_super_scales(type, n, l, i);
        pack_quants(type, n, l, i, block);
    }
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

/* Rows first..last-1 of the file, which all go into one strip. The same blocks of the next strip are asked for. */
static void pack_strip(const file_blocks *from, const weight *to, long row, long col, long first, long last) {
    const long row_bytes = file_row_bytes(from->type, from->n_cols), n_blocks = from->n_cols / BLOCK;
    lanes l = {.n_blocks = n_blocks, .w = to, .block = col / BLOCK};
    l.strip = to->data + (row + first) / STRIP * to->strip_bytes;
    for (l.first = 0; l.first < n_blocks; l.first = l.last) {
        l.last = l.first + CHUNK < n_blocks ? l.first + CHUNK : n_blocks;
        const long start = l.first * row_bytes / n_blocks, end = l.last * row_bytes / n_blocks;
        for (long r = first; r < last; r += l.n) {
            l.lane = (row + r) % STRIP;
            l.n = (int)(LANES - l.lane % LANES < last - r ? LANES - l.lane % LANES : last - r);
            for (int i = 0; i < l.n; i++) {
                l.rows[i] = from->data + (r + i) * row_bytes;
                for (long at = start; at < end; at += 64) __builtin_prefetch(l.rows[i] + STRIP * row_bytes + at);
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
