/* Blocks of 256 weights with scales of their own for every 16 or 32, which one of the whole multiplies, as
 * ggml-quants.c makes them; quant.py has the layouts. One a lane, as in cast.h. */

enum { PARTS = 16 };

typedef struct {
    float x[LARGE][LANES];
    uint32_t q[LARGE][LANES];                          /* unsigned */
    float scale[PARTS][LANES], low[PARTS][LANES];      /* of the parts; low is 0 or less */
    uint32_t s[PARTS][LANES], m[PARTS][LANES];         /* the same as integers, of which this is one: */
    float d[LANES], dmin[LANES];
    uint16_t d16[LANES], dmin16[LANES];
    int32_t none[LANES];
} large_group;

INLINE int has_lows(const weight_type to) { return to == Q2_K || to == Q4_K || to == Q5_K; }
INLINE int part_of(const weight_type to) { return to == Q4_K || to == Q5_K || to == IQ4_XS ? 32 : 16; }

FLATTEN void search_parts(const weight_type to, large_group *b) {
    float best[LANES];
    const int n = part_of(to);
    for (int p = 0; p < LARGE / n; p += to == Q3_K ? PAIR : 1) {
        float (*x)[LANES] = b->x + p * n;
        uint32_t (*q)[LANES] = b->q + p * n;
        if (has_lows(to))
            search_affine(affine_search_of(to), n, x, b->scale[p], b->low[p], q);
        else if (to == Q3_K)
            search_in_turn(n, x, b->scale + p, q);
        else
            search_ratio(to, n, x, b->scale[p], best);
        if (to == Q6_K)
            for (int j = 0; j < n; j++)
                EACH_LANE {
                    int32_t whole = (int32_t)nearest_within(best[lane] * x[j][lane], -32, 31);
                    q[j][lane] = choose_bits(best[lane] != 0, (uint32_t)(whole + 32), 0);
                }
    }
}

/* ---- scales as integers ---- */

/* Steps 0..top from 0 to the largest, and what a step is. */
FLATTEN void to_unsigned(const int n, float x[][LANES], int top, uint32_t steps[][LANES], float *step) {
    float largest[LANES] = {0}, inverse[LANES];
    for (int p = 0; p < n; p++) EACH_LANE largest[lane] = x[p][lane] > largest[lane] ? x[p][lane] : largest[lane];
    EACH_LANE inverse[lane] = largest[lane] > 0 ? (float)top / largest[lane] : 0;
    EACH_LANE step[lane] = largest[lane] / (float)top;
    for (int p = 0; p < n; p++) EACH_LANE steps[p][lane] = (uint32_t)nearest_int(inverse[lane] * x[p][lane]) & 255;
}

/* A scale that came out below 0, by rounding, becomes a byte of 255 in ggml too. */
FLATTEN void affine_scales(const weight_type to, large_group *b) {
    const int n = LARGE / part_of(to), top = to == Q2_K ? 15 : 63;
    for (int p = 0; p < n; p++) EACH_LANE b->low[p][lane] = -b->low[p][lane];
    to_unsigned(n, b->scale, top, b->s, b->d);
    to_unsigned(n, b->low, top, b->m, b->dmin);
    for (int p = 0; p < n; p++)
        EACH_LANE {
            uint32_t s = b->s[p][lane], m = b->m[p][lane];
            b->s[p][lane] = to == Q2_K ? s & 15 : s < 63 ? s : 63;
            b->m[p][lane] = to == Q2_K ? (s >> 4 | m) & 15 : m < 63 ? m : 63;
        }
}

INLINE int scale_zero(const weight_type to) { return to == Q6_K ? 128 : 32; }

/* Steps -zero..zero - 1, stored plus zero: the scale of largest magnitude becomes -zero. */
FLATTEN void signed_scales(const weight_type to, large_group *b) {
    const int zero = scale_zero(to), n = LARGE / part_of(to);
    float largest[LANES], inverse[LANES];
    find_largest(b->scale, n, largest);
    EACH_LANE {
        int32_t none = to == Q6_K ? fabsf(largest[lane]) < NOTHING : largest[lane] == 0;
        float step = -largest[lane] / (float)zero, steps = (float)-zero / largest[lane];
        inverse[lane] = none ? 0 : to == IQ4_XS ? 1 / step : steps;
        b->d[lane] = to == IQ4_XS ? step : none ? 0 : 1 / steps;
        b->none[lane] = none;
    }
    for (int p = 0; p < n; p++)
        EACH_LANE {
            int32_t step = nearest_int(inverse[lane] * b->scale[p][lane]);
            step = step < zero - 1 ? step : zero - 1;
            step = step > -zero ? step : -zero;
            step = to == Q3_K && b->none[lane] ? -zero : step;
            b->s[p][lane] = (uint32_t)(step + zero);
        }
}

/* ---- quants ---- */

/* What the elements of a part become under its scale as it will be read; where that is 0, they stay what they are. */
FLATTEN void round_part(const weight_type to, large_group *b, int p) {
    const int n = part_of(to), zero = to == Q6_K ? 32 : to == Q3_K ? 4 : 0;
    const int top = to == Q2_K ? 3 : to == Q3_K ? 7 : to == Q4_K ? 15 : to == Q5_K ? 31 : 63;
    float d[LANES], m[LANES];
    EACH_LANE {
        int32_t s = (int32_t)b->s[p][lane] - (has_lows(to) ? 0 : scale_zero(to));
        d[lane] = b->d[lane] * (float)s;
        m[lane] = has_lows(to) ? b->dmin[lane] * (float)(int32_t)b->m[p][lane] : 0;
    }
    for (int j = p * n; j < p * n + n; j++)
        EACH_LANE {
            float x = b->x[j][lane];
            float q = nearest_within((x + m[lane]) / d[lane], -zero, top - zero);
            b->q[j][lane] = choose_bits(d[lane] != 0, (uint32_t)((int32_t)q + zero), b->q[j][lane]);
            if (to == Q6_K) b->q[j][lane] = choose_bits(b->none[lane], 0, b->q[j][lane]);
        }
}

FLATTEN void choose_values(large_group *b, int p) {
    float inverse[LANES];
    EACH_LANE {
        float d = b->d[lane] * (float)((int32_t)b->s[p][lane] - scale_zero(IQ4_XS));
        inverse[lane] = d != 0 ? 1 / d : 0;
    }
    for (int j = p * BLOCK; j < p * BLOCK + BLOCK; j++)
        EACH_LANE b->q[j][lane] = value_index(inverse[lane] * b->x[j][lane]);
}

/* To half precision, and, but for iq4_xs, the number that it is. */
FLATTEN void halve(const weight_type to, float *x, uint16_t *half) {
    to_f16(x, LANES, half);
    if (to != IQ4_XS) v_store(x, v_load_f16(half));
}

FLATTEN void quantize_large(const weight_type to, large_group *b) {
    search_parts(to, b);
    has_lows(to) ? affine_scales(to, b) : signed_scales(to, b);
    halve(to, b->d, b->d16);
    if (has_lows(to)) halve(to, b->dmin, b->dmin16);
    for (int p = 0; p < LARGE / part_of(to); p++) to == IQ4_XS ? choose_values(b, p) : round_part(to, b, p);
}

/* ---- into the file's bytes ---- */

/* Puts n_bytes of each lane's block to where it begins plus `at`: byte i holds, from its lowest bits on, `bits` of
 * each of some q, from bit `shift` on; the q lie `apart`, and so many bytes follow each other. */
FLATTEN void put_bits(uint32_t q[][LANES], int bits, int apart, int shift, uint8_t *out, size_t stride, int at, int n_bytes, int n) {
    const int together = 8 / bits, width = n_bytes < 4 ? n_bytes : 4;
    for (int i = 0; i < n_bytes; i += width) {
        uint32_t words[LANES] = {0};
        UNROLL
        for (int k = 0; k < width * together; k++) {
            const int byte = i + k / together, from = byte / apart * apart * together + k % together * apart + byte % apart;
            EACH_LANE words[lane] |= ((q[from][lane] >> shift) & ((1u << bits) - 1)) << (k / together * 8 + k % together * bits);
        }
        for (int lane = 0; lane < n; lane++) memcpy(out + (size_t)lane * stride + at + i, &words[lane], (size_t)width);
    }
}

FLATTEN void put_halves(const uint16_t *d, uint8_t *out, size_t stride, int at, int n) {
    for (int lane = 0; lane < n; lane++) memcpy(out + (size_t)lane * stride + at, &d[lane], 2);
}

/* 12 bytes: the low 6 bits are s 0..3, m 0..3; then come the low nibbles of s and m 4..7, whose upper bits are above
 * those. */
FLATTEN void mix_scales(const large_group *b, uint32_t bytes[][LANES]) {
    for (int p = 0; p < 4; p++)
        EACH_LANE {
            uint32_t s = b->s[p + 4][lane], m = b->m[p + 4][lane];
            bytes[p][lane] = b->s[p][lane] | s >> 4 << 6;
            bytes[p + 4][lane] = b->m[p][lane] | m >> 4 << 6;
            bytes[p + 8][lane] = (s & 15) | (m & 15) << 4;
        }
}

FLATTEN void put_large(const weight_type to, large_group *b, uint8_t *out, int n) {
    const size_t stride = (size_t)types[to].bytes;
    uint32_t bytes[PARTS][LANES];
#define PUT(q, bits, apart, shift, at, n_bytes) put_bits(q, bits, apart, shift, out, stride, at, n_bytes, n)
    switch (to) {
    case Q2_K:
        for (int p = 0; p < PARTS; p++) EACH_LANE bytes[p][lane] = b->s[p][lane] | b->m[p][lane] << 4;
        PUT(bytes, 8, 1, 0, 0, 16);
        PUT(b->q, 2, 32, 0, 16, 64);
        put_halves(b->d16, out, stride, 80, n);
        put_halves(b->dmin16, out, stride, 82, n);
        break;
    case Q3_K:
        PUT(b->q, 1, 32, 2, 0, 32);
        PUT(b->q, 2, 32, 0, 32, 64);
        PUT(b->s, 4, 8, 0, 96, 8);
        PUT(b->s, 2, 4, 4, 104, 4);
        put_halves(b->d16, out, stride, 108, n);
        break;
    case Q6_K:
        PUT(b->q, 4, 64, 0, 0, 128);
        PUT(b->q, 2, 32, 4, 128, 64);
        for (int p = 0; p < PARTS; p++) EACH_LANE bytes[p][lane] = b->s[p][lane] ^ 128;
        PUT(bytes, 8, 1, 0, 192, 16);
        put_halves(b->d16, out, stride, 208, n);
        break;
    case IQ4_XS:
        put_halves(b->d16, out, stride, 0, n);
        PUT(b->s, 2, 1, 4, 2, 2);
        PUT(b->s, 4, 1, 0, 4, 4);
        PUT(b->q, 4, 16, 0, 8, 128);
        break;
    default: /* Q4_K, Q5_K */
        put_halves(b->d16, out, stride, 0, n);
        put_halves(b->dmin16, out, stride, 2, n);
        mix_scales(b, bytes);
        PUT(bytes, 8, 1, 0, 4, 12);
        if (to == Q5_K) PUT(b->q, 1, 32, 4, 16, 32);
        PUT(b->q, 4, 32, 0, to == Q5_K ? 48 : 16, 128);
    }
#undef PUT
}
