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
    if (!has_blocks(type)) {
        w->row_bytes = padded(n_in * bytes[type], 4);
        return;
    }
    w->n_blocks = n_in / BLOCK, w->n_strips = (n_out + STRIP - 1) / STRIP;
    w->m = 2 * STRIP;
    w->fifth = w->m + (has_minimum(type) ? 2 * STRIP : 0);
    w->q = w->fifth + (type == Q5_0 || type == Q5_1 ? STRIP * BLOCK / 8 : 0);
    w->block_bytes = w->q + STRIP * (type == Q8_0 ? BLOCK : BLOCK / 2);
    w->strip_bytes = w->n_blocks * w->block_bytes;
}

size_t weight_bytes(const weight *w) {
    return (size_t)(has_blocks(w->type) ? w->n_strips * w->strip_bytes : w->n_out * w->row_bytes) + SLACK;
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

/* Where a block of a row's strip begins. */
static uint8_t *block_at(const weight *w, long row, long block) {
    return w->data + row / STRIP * w->strip_bytes + block * w->block_bytes;
}

/* The nibble with the fifth bits of elements 4k..4k+3 (half 0) or 16 + those (half 1). */
static uint8_t *fifth_at(const weight *w, uint8_t *block, long lane, int k, int half) {
    return block + w->fifth + k * 32 + lane / 16 * 16 + half * 8 + lane % 16 / 2;
}

static void pack_fifth_bits(const weight *to, uint8_t *block, long lane, const uint8_t bits[4]) {
    int shift = lane % 2 * 4;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++) {
            uint8_t four = bits[half * 2 + k / 2] >> k % 2 * 4 & 15, *at = fifth_at(to, block, lane, k, half);
            *at = (uint8_t)((*at & ~(15 << shift)) | four << shift);
        }
}

static void pack_block(file_type type, block_view from, const weight *to, uint8_t *block, long lane) {
    uint8_t halves[BLOCK], *q = block + to->q + lane * 4;
    write_u16(block + 2 * lane, from.d);
    if (has_minimum(to->type)) write_u16(block + to->m + 2 * lane, from.m);
    if (from.high) pack_fifth_bits(to, block, lane, from.high);
    if (type == FILE_Q8_0) {
        for (int j = 0; j < BLOCK; j++) halves[j] = from.q[j] ^ 0x80;
        for (int k = 0; k < 8; k++) memcpy(q + k * 4 * STRIP, halves + 4 * k, 4);
        return;
    }
    if (type >= FILE_Q4_0_2023) {
        halve_nibbles(from.q, halves);
        from.q = halves;
    }
    for (int k = 0; k < 4; k++) memcpy(q + k * 4 * STRIP, from.q + 4 * k, 4);
}

void pack_rows(const file_blocks *from, const weight *to, long row, long col, long first, long last) {
    long from_bytes = file_row_bytes(from->type, from->n_cols), n_blocks = from->n_cols / BLOCK;
    for (long r = first; r < last; r++) {
        const uint8_t *source = from->data + r * from_bytes;
        if (!has_blocks(to->type)) {
            uint8_t *target = to->data + (row + r) * to->row_bytes;
            memcpy(target + col * file_types[from->type].bytes, source, (size_t)from_bytes);
            continue;
        }
        for (long i = 0; i < n_blocks; i++)
            pack_block(from->type, view_block(from->type, source, n_blocks, i, to->factor), to,
                       block_at(to, row + r, col / BLOCK + i), (row + r) % STRIP);
    }
}

/* ---- and back ---- */

plain_block unpack_block(const weight *w, long row, long block) {
    plain_block plain;
    long lane = row % STRIP;
    uint8_t *at = block_at(w, row, block), *q = at + w->q + lane * 4;
    plain.d = f32_from_f16(read_u16(at + 2 * lane));
    plain.m = has_minimum(w->type) ? f32_from_f16(read_u16(at + w->m + 2 * lane)) : 0;
    for (int i = 0; i < BLOCK; i++) {
        int half = i / 16, k = i % 16 / 4, j = i % 4;
        if (w->type == Q8_0) {
            plain.q[i] = q[(half * 4 + k) * 4 * STRIP + j];
            continue;
        }
        plain.q[i] = q[k * 4 * STRIP + j] >> half * 4 & 15;
        if (w->type == Q5_0 || w->type == Q5_1)
            plain.q[i] |= (*fifth_at(w, at, lane, k, half) >> (lane % 2 * 4 + j) & 1) << 4;
    }
    return plain;
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

void unpack_row(const weight *w, long row, float *out) {
    if (!has_blocks(w->type)) {
        unpack_floats(w, w->data + row * w->row_bytes, out);
        return;
    }
    for (long b = 0; b < w->n_blocks; b++) {
        plain_block plain = unpack_block(w, row, b);
        float d = w->factor * plain.d, m = w->factor * plain.m;
        for (int j = 0; j < BLOCK; j++) out[b * BLOCK + j] = (float)(plain.q[j] - zero_of(w->type)) * d + m;
    }
}
