/* Super-blocks: 256 weights in parts of 16 or 32 with a small integer as their scale, which the super-block's own scale
 * multiplies. To the byte those of ggml-quants.c; tinyllama/superblocks has the layouts. LANES of them at a time, one a
 * lane. */
#include "search.h"

enum { LARGE = SUPER * BLOCK, PARTS = MOST_PARTS };

typedef struct {
    float x[LARGE][LANES];
    float w[LARGE][LANES]; /* with an importance matrix what errors weigh, and their sums in parts */
    float sum_w[PARTS][LANES];
    int weighed;
    uint32_t q[LARGE][LANES];                                  /* unsigned */
    float scale[PARTS][LANES], minimum[PARTS][LANES];          /* of parts; minima are subtracted */
    uint32_t small_scale[PARTS][LANES], small_minimum[PARTS][LANES]; /* as integers, unsigned */
    float d[LANES], m[LANES];                                  /* what these are multiplied by */
    uint16_t half_d[LANES], half_m[LANES];
    int32_t empty[LANES];                                      /* all scales are as good as 0 */
} super_group;

INLINE int part_of(const weight_type to) { return types[to].shared; }
INLINE int parts_of(const weight_type to) { return LARGE / types[to].shared; }

/* ---- scales of the parts ---- */

/* The importance of each element, in w, times the root of its square and once or twice the mean square; of q6_k, the
 * importance alone. */
FLATTEN void weigh_super(const weight_type to, super_group *b) {
    const int n = part_of(to);
    float mean[LANES] = {0};
    EACH_OF(LARGE) EACH_LANE mean[lane] += b->x[j][lane] * b->x[j][lane];
    EACH_LANE mean[lane] *= (to == Q2_K ? 1.0f : 2.0f) / LARGE;
    if (to != Q6_K) weigh_elements(LARGE, b->x, mean, b->w);
    for (int p = 0; p < parts_of(to); p++) {
        EACH_LANE b->sum_w[p][lane] = 0;
        EACH_OF(n) EACH_LANE b->sum_w[p][lane] += b->w[p * n + j][lane];
    }
}

/* Each search is written out twice, with the number of its steps known to the compiler. */
FLATTEN void search_part(const weight_type to, const int weighed, super_group *b, int p) {
    const int n = part_of(to), zero = has_table(to) ? 0 : zero_of(to);
    const affine_search how = affine_search_of(to, weighed);
    float plain[BLOCK][LANES], inverse[LANES], (*x)[LANES] = b->x + p * n, (*w)[LANES] = weighed ? b->w + p * n : plain;
    uint32_t (*q)[LANES] = b->q + p * n;
    if (has_minimum(to)) {
        if (!weighed) weigh_affine(how, n, x, plain);
        search_affine(how, n, x, w, b->scale[p], b->minimum[p], q);
        return;
    }
    if (!weighed) EACH_OF(n) EACH_LANE plain[j][lane] = x[j][lane] * x[j][lane];
    search_ratio(zero, n, x, w, b->scale[p], inverse);
    if (zero) round_ratio(zero, n, x, inverse, q);
}

FLATTEN void search_parts(const weight_type to, super_group *b) {
    const int n = part_of(to), n_parts = parts_of(to);
    if (b->weighed)
        for (int p = 0; p < n_parts; p++) search_part(to, 1, b, p);
    else if (to == Q3_K)
        for (int p = 0; p < n_parts; p += PAIR) search_in_turn(n, b->x + p * n, b->scale + p, b->q + p * n);
    else
        for (int p = 0; p < n_parts; p++) search_part(to, 0, b, p);
}

/* ---- these as small integers ---- */

/* Steps 0..top from 0 to the largest, and how large a step is. One below 0, which only rounding makes, is a byte of
 * ggml, 255. */
FLATTEN void to_steps_from_0(const int n, const int top, float x[][LANES], uint32_t steps[][LANES], float *step) {
    float largest[LANES] = {0};
    EACH_OF(n) EACH_LANE largest[lane] = x[j][lane] > largest[lane] ? x[j][lane] : largest[lane];
    EACH_LANE step[lane] = largest[lane] / (float)top;
    EACH_LANE largest[lane] = choose(largest[lane] > 0, (float)top / largest[lane], 0);
    EACH_OF(n) EACH_LANE steps[j][lane] = (uint32_t)nearest_int(largest[lane] * x[j][lane]) & 255;
}

/* What bytes above 63, which ggml doesn't expect here, will be read as: their upper bits are those of others. */
FLATTEN void overflow(uint32_t small[][LANES]) {
    EACH_OF(4) EACH_LANE {
        small[j + 4][lane] = (small[j + 4][lane] | (small[j][lane] >> 2 & 0x30)) & 63;
        small[j][lane] &= 63;
    }
}

FLATTEN void affine_scales(const weight_type to, super_group *b) {
    const int n = parts_of(to), top = to == Q2_K ? 15 : 63;
    EACH_OF(n) EACH_LANE b->minimum[j][lane] = -b->minimum[j][lane];
    if (b->weighed) {
        search_from_0(n, top, b->scale, b->sum_w, b->small_scale, b->d);
        search_from_0(n, top, b->minimum, b->sum_w, b->small_minimum, b->m);
    } else {
        to_steps_from_0(n, top, b->scale, b->small_scale, b->d);
        to_steps_from_0(n, top, b->minimum, b->small_minimum, b->m);
    }
    if (to == Q4_K && b->weighed) {
        overflow(b->small_scale), overflow(b->small_minimum);
        return;
    }
    EACH_OF(n) EACH_LANE {
        uint32_t s = b->small_scale[j][lane], m = b->small_minimum[j][lane];
        b->small_scale[j][lane] = to == Q2_K ? s & 15 : s < 63 ? s : 63;
        b->small_minimum[j][lane] = to == Q2_K ? (m | s >> 4) & 15 : m < 63 ? m : 63;
    }
}

INLINE int scale_zero(const weight_type to) { return has_minimum(to) ? 0 : to == Q6_K ? 128 : 32; }

/* Steps -zero..zero - 1: the scale of largest magnitude becomes -zero. */
FLATTEN void signed_scales(const weight_type to, super_group *b) {
    const int zero = scale_zero(to), n = parts_of(to);
    float largest[LANES], inverse[LANES];
    if (to == Q3_K && b->weighed) {
        search_ratio(zero, n, b->scale, b->sum_w, b->d, inverse);
        round_ratio(zero, n, b->scale, inverse, b->small_scale);
        return;
    }
    find_largest(b->scale, n, largest);
    EACH_LANE {
        int32_t empty = to == Q6_K ? fabsf(largest[lane]) < NOTHING : largest[lane] == 0;
        float d = -largest[lane] / (float)zero, steps = to == IQ4_XS ? 1 / d : (float)-zero / largest[lane];
        inverse[lane] = choose(empty, 0, steps);
        b->d[lane] = to == IQ4_XS ? d : choose(empty, 0, 1 / steps);
        b->empty[lane] = empty;
    }
    EACH_OF(n) EACH_LANE {
        float step = nearest_within(inverse[lane] * b->scale[j][lane], -zero, zero - 1);
        if (to == Q3_K) step = choose(b->empty[lane], (float)-zero, step);
        b->small_scale[j][lane] = to_unsigned(step, zero);
    }
}

/* ---- quants ---- */

/* The nearest under the scale that will be read; where that is 0, what the search has found. */
FLATTEN void round_part(const weight_type to, super_group *b, int p) {
    const int n = part_of(to), zero = zero_of(to), top = (1 << types[to].bits) - 1;
    float d[LANES], m[LANES];
    EACH_LANE {
        d[lane] = b->d[lane] * (float)((int32_t)b->small_scale[p][lane] - scale_zero(to));
        m[lane] = has_minimum(to) ? b->m[lane] * (float)(int32_t)b->small_minimum[p][lane] : 0;
    }
    for (int j = p * n; j < p * n + n; j++)
        EACH_LANE {
            float q = nearest_within((b->x[j][lane] + m[lane]) / d[lane], -zero, top - zero);
            b->q[j][lane] = choose_bits(d[lane] != 0, to_unsigned(q, zero), b->q[j][lane]);
            if (to == Q6_K) b->q[j][lane] = choose_bits(b->empty[lane], 0, b->q[j][lane]);
        }
}

/* Of iq4_xs, under the scale before it is halved. */
FLATTEN void choose_values(super_group *b, int p) {
    float inverse[LANES];
    EACH_LANE {
        float d = b->d[lane] * (float)((int32_t)b->small_scale[p][lane] - scale_zero(IQ4_XS));
        inverse[lane] = choose(d != 0, 1 / d, 0);
    }
    for (int j = p * BLOCK; j < p * BLOCK + BLOCK; j++)
        EACH_LANE b->q[j][lane] = value_index(inverse[lane] * b->x[j][lane]);
}

/* Half precision, and the number that this is. */
FLATTEN void halve(float *x, uint16_t *half) {
    to_f16(x, LANES, half);
    v_store(x, v_load_f16(half));
}

/* Where b->weighed, w holds the importance of each element. */
FLATTEN void quantize_super(const weight_type to, super_group *b) {
    if (b->weighed) weigh_super(to, b);
    search_parts(to, b);
    if (to == IQ4_XS) {
        signed_scales(to, b);
        for (int p = 0; p < parts_of(to); p++) choose_values(b, p);
        to_f16(b->d, LANES, b->half_d);
        return;
    }
    has_minimum(to) ? affine_scales(to, b) : signed_scales(to, b);
    halve(b->d, b->half_d);
    if (has_minimum(to)) halve(b->m, b->half_m);
    for (int p = 0; p < parts_of(to); p++) round_part(to, b, p);
}

/* ---- into the file's bytes ---- */

/* Where each lane's block goes. */
typedef struct {
    uint8_t *at;
    size_t stride;
    int n;
} destination;

FLATTEN void put(const destination *out, int at, const void *x, const size_t each) {
    for (int lane = 0; lane < out->n; lane++)
        memcpy(out->at + (size_t)lane * out->stride + at, (const uint8_t *)x + (size_t)lane * each, each);
}

/* As pack_word has them, so many bytes. */
FLATTEN void put_bits(uint32_t q[][LANES], const int bits, const int apart, const int shift, const destination *out,
                      int at, int n_bytes) {
    uint32_t word[LANES];
    for (int i = 0; i < n_bytes; i += 4) {
        pack_word(q, bits, apart, shift, i, word);
        put(out, at + i, word, 4);
    }
}

/* Bytes of 6-bit scales s and minima m: s 0..3, m 0..3, then the low nibbles of s and m 4..7, whose upper bits are
 * above the others. */
FLATTEN void mix_scales(const super_group *b, uint32_t bytes[][LANES]) {
    for (int p = 0; p < 4; p++)
        EACH_LANE {
            uint32_t s = b->small_scale[p + 4][lane], m = b->small_minimum[p + 4][lane];
            bytes[p][lane] = b->small_scale[p][lane] | s >> 4 << 6;
            bytes[p + 4][lane] = b->small_minimum[p][lane] | m >> 4 << 6;
            bytes[p + 8][lane] = (s & 15) | (m & 15) << 4;
        }
}

FLATTEN void put_scales(const weight_type to, super_group *b, const destination *out) {
    uint32_t bytes[PARTS][LANES], (*s)[LANES] = b->small_scale;
    const int at = types[to].scales;
    if (to == IQ4_XS) {
        uint16_t upper[LANES] = {0};
        EACH_OF(parts_of(to)) EACH_LANE upper[lane] |= (uint16_t)(s[j][lane] >> 4 << 2 * j);
        put(out, at - 2, upper, 2);
        put_bits(s, 4, 1, 0, out, at, 4);
    } else if (to == Q3_K) {
        put_bits(s, 4, 8, 0, out, at, 8);
        put_bits(s, 2, 4, 4, out, at + 8, 4);
    } else if (to == Q2_K) {
        EACH_OF(PARTS) EACH_LANE bytes[j][lane] = s[j][lane] | b->small_minimum[j][lane] << 4;
        put_bits(bytes, 8, 1, 0, out, at, 16);
    } else if (to == Q6_K) {
        EACH_OF(PARTS) EACH_LANE bytes[j][lane] = s[j][lane] ^ 128; /* signed */
        put_bits(bytes, 8, 1, 0, out, at, 16);
    } else {
        mix_scales(b, bytes);
        put_bits(bytes, 8, 1, 0, out, at, 12);
    }
}

FLATTEN void put_super(const weight_type to, super_group *b, const destination *out) {
    const int low = low_bits(to), high = high_bits(to), apart = to == IQ4_XS ? 16 : to == Q6_K ? 64 : 32;
    put(out, types[to].d, b->half_d, 2);
    if (has_minimum(to)) put(out, types[to].d + 2, b->half_m, 2);
    put_scales(to, b, out);
    if (high) put_bits(b->q, high ? high : 1, 32, low, out, types[to].high, LARGE / 8 * high);
    put_bits(b->q, low, apart, 0, out, types[to].q, LARGE / 8 * low);
}
