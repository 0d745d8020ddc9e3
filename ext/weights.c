/* Prepared weights: how they lie in memory, and back to numbers. Portable, the same for every level. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

/* ---- layout ---- */

static long padded(long bytes, long multiple) { return (bytes + multiple - 1) / multiple * multiple; }

void weight_layout(weight *w, weight_type type, long n_out, long n_in) {
    memset(w, 0, sizeof *w);
    w->type = type, w->n_out = n_out, w->n_in = n_in, w->factor = 1;
    if (!has_blocks(type)) {
        w->row_bytes = padded(n_in * types[type].bytes, 4);
        return;
    }
    w->n_blocks = n_in / BLOCK, w->n_strips = (n_out + STRIP - 1) / STRIP;
    w->at = layout_of(type);
    w->strip_bytes = w->n_blocks * w->at.block_bytes + w->n_blocks / SUPER * w->at.head_bytes;
}

size_t weight_bytes(const weight *w) {
    return (size_t)(has_blocks(w->type) ? w->n_strips * w->strip_bytes : w->n_out * w->row_bytes) + SLACK;
}

size_t strips_bytes(const weight *w, long n) {
    return (size_t)padded(n * (has_blocks(w->type) ? w->strip_bytes : STRIP * w->row_bytes) + SLACK, 64);
}

/* ---- memory ---- */

enum { HUGE_PAGE = 2 << 20, SLAB = 32 * HUGE_PAGE };

struct slab {
    uint8_t *data;
    size_t size, used;
    long weights; /* that lie in it */
};

static slab *filling; /* the one that small weights are put into */

/* Fresh memory that begins at a huge page. What is mapped in front of it and behind goes back. */
static uint8_t *map_huge_pages(size_t size) {
    uint8_t *mapped = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return NULL;
    size_t before = -(uintptr_t)mapped % HUGE_PAGE;
    if (before) munmap(mapped, before);
    munmap(mapped + before + size, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(mapped + before, size, MADV_HUGEPAGE);
#endif
    return mapped + before;
}

static slab *new_slab(size_t n_bytes) {
    slab *made = calloc(1, sizeof *made);
    if (!made) return NULL;
    made->size = (n_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    made->data = map_huge_pages(made->size);
    if (made->data) return made;
    free(made);
    return NULL;
}

slab *take_memory(size_t n_bytes, uint8_t **memory) {
    size_t size = (n_bytes + 63) / 64 * 64;
    slab *from = filling;
    if (size > SLAB / 2)
        from = new_slab(size);
    else if (!from || from->size - from->used < size)
        from = filling = new_slab(SLAB);
    if (!from) return NULL;
    *memory = from->data + from->used;
    from->used += size;
    from->weights++;
    return from;
}

void return_memory(slab *slab) {
    if (--slab->weights) return;
    if (filling == slab) filling = NULL;
    munmap(slab->data, slab->size);
    free(slab);
}

/* ---- back to numbers ---- */

/* The scale and the minimum of each half of a row's block, whose strip begins at `strip`. */
static void unpack_scales(const weight *w, const uint8_t *strip, long lane, long block, float *d, float *m) {
    const uint8_t *at = strip + block_place(w->at, block), *head = strip + head_place(w->at, block);
    const int8_t *scales = (const int8_t *)at, *minima = (const int8_t *)at + w->at.m;
    const uint8_t *from = has_super_blocks(w->type) ? head : at;
    const long m_place = has_super_blocks(w->type) ? 2 * STRIP : w->at.m;
    for (int half = 0; half < 2; half++) {
        const long i = has_halves(w->type) ? 2 * lane + half : lane;
        d[half] = f32_from_f16(read_u16(from + 2 * lane));
        m[half] = has_minimum(w->type) ? f32_from_f16(read_u16(from + m_place + 2 * lane)) : 0;
        if (!has_super_blocks(w->type)) continue;
        d[half] *= (float)(w->type == Q2_K ? scales[i] & 15 : scales[i]);
        if (has_minimum(w->type)) m[half] *= (float)(w->type == Q2_K ? at[i] >> 4 : minima[i]);
    }
}

/* `bits` bits of element j of the r-th four of a row. */
static int unpack_bits(const uint8_t *from, int bits, long lane, int r, int j) {
    const int fours = 8 / bits;
    return from[r / fours * 4 * STRIP + lane * 4 + j] >> r % fours * bits & ((1 << bits) - 1);
}

plain_block unpack_block(const weight *w, long row, long block) {
    plain_block plain;
    const uint8_t *strip = w->data + row / STRIP * w->strip_bytes, *at = strip + block_place(w->at, block);
    const int low = low_bits(w->type), high = high_bits(w->type);
    unpack_scales(w, strip, row % STRIP, block, plain.d, plain.m);
    for (int i = 0; i < BLOCK; i++) {
        const int r = i % 16 / 4 * 2 + i / 16;
        int q = unpack_bits(at + w->at.low, low, row % STRIP, r, i % 4);
        if (high) q |= unpack_bits(at + w->at.high, high, row % STRIP, r, i % 4) << low;
        plain.q[i] = (uint8_t)(has_table(w->type) ? iq4_values[q] + zero_of(w->type) : q);
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
        for (int j = 0; j < BLOCK; j++) {
            const float d = w->factor * plain.d[j / 16], m = w->factor * plain.m[j / 16];
            out[b * BLOCK + j] = (float)(plain.q[j] - zero_of(w->type)) * d + m;
        }
    }
}
