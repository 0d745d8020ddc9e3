/* From a file's blocks to prepared weights, and back to numbers. Portable, the same for every level. */
#include <string.h>

#include "kernels.h"

/* ---- half precision ---- */

float f32_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, bits = half & 1023;
    float value;
    if (exponent == 0) { /* zero and subnormals: bits * 2^-24 */
        value = (float)bits * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t word = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | bits << 13;
    memcpy(&value, &word, 4);
    return value;
}

uint16_t f16_from_f32(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    uint16_t sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    if (word > 0x7f800000) return sign | 0x7e00 | (word >> 13 & 0x3ff); /* nan */
    if (word >= 0x477ff000) return sign | 0x7c00;                       /* rounds up to infinity */
    if (word < 0x38800000) { /* subnormal: adding 0.5 puts the result into the lowest bits, rounded */
        float magnitude, shifted;
        memcpy(&magnitude, &word, 4);
        shifted = magnitude + 0.5f;
        memcpy(&word, &shifted, 4);
        return sign | (uint16_t)(word - 0x3f000000);
    }
    uint32_t odd = word >> 13 & 1;
    return sign | (uint16_t)((word + 0xfff + odd - 0x38000000) >> 13); /* ties to even */
}

static uint16_t read_u16(const uint8_t *p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

static float read_f32(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}

static void write_u16(uint8_t *p, uint16_t x) { memcpy(p, &x, 2); }

/* ---- layout ---- */

static long padded(long bytes, long multiple) { return (bytes + multiple - 1) / multiple * multiple; }

void weight_layout(weight *w, weight_type type, long n_out, long n_in) {
    static const int bytes[N_TYPES] = {4, 2, 2};
    memset(w, 0, sizeof *w);
    w->type = type, w->n_out = n_out, w->n_in = n_in, w->factor = 1;
    /* Long rows begin on a cache line, as do their parts; in short ones padding would cost a tenth. */
    long align = n_in < 4096 ? 4 : 64;
    if (!has_blocks(type)) {
        w->row_bytes = padded(n_in * bytes[type], align);
        return;
    }
    w->n_blocks = n_in / BLOCK;
    long scales = padded(w->n_blocks * 2, align), groups = (w->n_blocks + 3) / 4;
    w->m = scales;
    w->high = w->m + (has_minimum(type) ? scales : 0);
    w->q = w->high + (type == Q5_0 || type == Q5_1 ? padded(groups * 16, align) : 0);
    w->row_bytes = w->q + padded(type == Q8_0 ? groups * GROUP : w->n_blocks * 16, align);
}

/* ---- from the file ---- */

static const struct {
    weight_type type;
    int block, bytes;
} file_types[N_FILE_TYPES] = {
    [FILE_F32] = {F32, 1, 4},
    [FILE_F16] = {F16, 1, 2},
    [FILE_BF16] = {BF16, 1, 2},
    [FILE_Q4_0] = {Q4_0, BLOCK, 18},
    [FILE_Q4_1] = {Q4_1, BLOCK, 20},
    [FILE_Q5_0] = {Q5_0, BLOCK, 22},
    [FILE_Q5_1] = {Q5_1, BLOCK, 24},
    [FILE_Q8_0] = {Q8_0, BLOCK, 34},
    [FILE_Q4_0_2023] = {Q4_0, BLOCK, 20},
    [FILE_Q4_0_2023_PLANAR] = {Q4_0, BLOCK, 20},
    [FILE_Q4_1_2023] = {Q4_1, BLOCK, 24},
};

weight_type prepared_type(file_type type) { return file_types[type].type; }

long file_row_bytes(file_type type, long n_cols) {
    return n_cols / file_types[type].block * file_types[type].bytes;
}

/* One block, wherever its pieces lie in the file. */
typedef struct {
    uint16_t d, m;
    const uint8_t *high, *q;
} block_view;

static uint16_t scaled_f16(const uint8_t *value, float factor) {
    return f16_from_f32(read_f32(value) / factor);
}

static block_view view_block(file_type type, const uint8_t *row, long n_blocks, long i, float factor) {
    const uint8_t *at = row + i * file_types[type].bytes;
    switch (type) {
    case FILE_Q4_0:
    case FILE_Q8_0:
        return (block_view){.d = read_u16(at), .q = at + 2};
    case FILE_Q4_1:
        return (block_view){.d = read_u16(at), .m = read_u16(at + 2), .q = at + 4};
    case FILE_Q5_0:
        return (block_view){.d = read_u16(at), .high = at + 2, .q = at + 6};
    case FILE_Q5_1:
        return (block_view){.d = read_u16(at), .m = read_u16(at + 2), .high = at + 4, .q = at + 8};
    case FILE_Q4_0_2023:
        return (block_view){.d = scaled_f16(at, factor), .q = at + 4};
    case FILE_Q4_0_2023_PLANAR:
        return (block_view){.d = scaled_f16(row + 4 * i, factor), .q = row + 4 * n_blocks + 16 * i};
    default: /* FILE_Q4_1_2023 */
        return (block_view){.d = scaled_f16(row + 4 * (n_blocks + i), factor),
                            .m = scaled_f16(row + 4 * i, factor),
                            .q = row + 8 * n_blocks + 16 * i};
    }
}

/* Nibbles of neighbours (2j, 2j+1) -> of halves (j, j+16). */
static void halve_nibbles(const uint8_t *from, uint8_t *to) {
    for (int i = 0; i < 8; i++) {
        to[2 * i] = (uint8_t)((from[i] & 15) | from[i + 8] << 4);
        to[2 * i + 1] = (uint8_t)(from[i] >> 4 | (from[i + 8] & 0xf0));
    }
}

static void pack_block(file_type type, block_view from, const weight *to, uint8_t *row, long i) {
    write_u16(row + 2 * i, from.d);
    if (has_minimum(to->type)) write_u16(row + to->m + 2 * i, from.m);
    if (from.high) { /* a group's bits of first halves, 8 bytes, then those of second halves */
        uint8_t *high = row + to->high + i / 4 * 16 + i % 4 * 2;
        memcpy(high, from.high, 2);
        memcpy(high + 8, from.high + 2, 2);
    }
    if (type == FILE_Q8_0) {
        uint8_t *q = row + to->q + i / 4 * GROUP + i % 4 * 16;
        for (int j = 0; j < 16; j++) q[j] = from.q[j] ^ 0x80, q[j + 64] = from.q[j + 16] ^ 0x80;
    } else if (type >= FILE_Q4_0_2023) {
        halve_nibbles(from.q, row + to->q + 16 * i);
    } else {
        memcpy(row + to->q + 16 * i, from.q, 16);
    }
}

void pack_rows(const file_blocks *from, const weight *to, long row, long col, long first, long last) {
    long from_bytes = file_row_bytes(from->type, from->n_cols);
    long n_blocks = from->n_cols / BLOCK, start = col / BLOCK;
    for (long r = first; r < last; r++) {
        const uint8_t *source = from->data + r * from_bytes;
        uint8_t *target = to->data + (row + r) * to->row_bytes;
        if (!has_blocks(to->type)) {
            memcpy(target + col * file_types[from->type].bytes, source, (size_t)from_bytes);
            continue;
        }
        for (long i = 0; i < n_blocks; i++)
            pack_block(from->type, view_block(from->type, source, n_blocks, i, to->factor), to, target,
                       start + i);
    }
}

/* ---- and back ---- */

void unpack_block(const weight *w, const uint8_t *row, long block, uint8_t q[BLOCK]) {
    if (w->type == Q8_0) {
        const uint8_t *at = row + w->q + block / 4 * GROUP + block % 4 * 16;
        memcpy(q, at, 16);
        memcpy(q + 16, at + 64, 16);
        return;
    }
    const uint8_t *at = row + w->q + 16 * block;
    for (int j = 0; j < 16; j++) q[j] = at[j] & 15, q[j + 16] = at[j] >> 4;
    if (w->type != Q5_0 && w->type != Q5_1) return;
    const uint8_t *high = row + w->high + block / 4 * 16 + block % 4 * 2;
    uint16_t first = read_u16(high), second = read_u16(high + 8);
    for (int j = 0; j < 16; j++) q[j] |= (first >> j & 1) << 4, q[j + 16] |= (second >> j & 1) << 4;
}

static void unpack_floats(const weight *w, const uint8_t *row, float *out) {
    for (long i = 0; i < w->n_in; i++) {
        if (w->type == F32) {
            out[i] = read_f32(row + 4 * i);
        } else if (w->type == F16) {
            out[i] = f32_from_f16(read_u16(row + 2 * i));
        } else {
            uint32_t word = (uint32_t)read_u16(row + 2 * i) << 16;
            memcpy(&out[i], &word, 4);
        }
    }
}

void unpack_row(const weight *w, long index, float *out) {
    const uint8_t *row = w->data + index * w->row_bytes;
    if (!has_blocks(w->type)) {
        unpack_floats(w, row, out);
        return;
    }
    for (long b = 0; b < w->n_blocks; b++) {
        uint8_t q[BLOCK];
        unpack_block(w, row, b, q);
        float d = w->factor * f32_from_f16(read_u16(row + 2 * b));
        float m = has_minimum(w->type) ? w->factor * f32_from_f16(read_u16(row + w->m + 2 * b)) : 0;
        for (int j = 0; j < BLOCK; j++) out[b * BLOCK + j] = (float)(q[j] - zero_of(w->type)) * d + m;
    }
}
