/* Scales that make the error of a block small, as ggml-quants.c searches for them without an importance matrix, to
 * the bit: an element weighs more the larger it is.
 *
 * As in cast.h, x is [n][LANES], n elements of one block a lane, and sums run down the elements in their order. A
 * search tries some inverse scales 1 / d; what an element becomes follows from the one it found.
 *
 * Products are left to right, since each rounds: w * x * l is (w * x) * l. */

/* The nearest integer, of two the even one, if |x| < 2^22, where x + 1.5 * 2^23 has no bits for a fraction; of any x
 * what ggml's nearest_int makes of it. */
FLATTEN int32_t nearest_int(float x) {
    int32_t bits;
    x += 12582912;
    memcpy(&bits, &x, 4);
    return (bits & 0x7fffff) - 0x400000;
}

/* That, within bounds, as a number. In two statements: GCC would make two conversions of one, and a branch. */
FLATTEN float nearest_within(float x, int32_t low, int32_t high) {
    int32_t step = nearest_int(x);
    step = step > low ? step : low;
    step = step < high ? step : high;
    return (float)step;
}

/* yes (0 or 1) ? a : b, of which no compiler makes a branch: loops with branches don't become vectors. */
FLATTEN uint32_t choose_bits(int32_t yes, uint32_t a, uint32_t b) { return (a & (uint32_t)-yes) | (b & ~(uint32_t)-yes); }
FLATTEN float choose(int32_t yes, float a, float b) {
    uint32_t bits, others;
    memcpy(&bits, &a, 4);
    memcpy(&others, &b, 4);
    bits = choose_bits(yes, bits, others);
    memcpy(&a, &bits, 4);
    return a;
}

/* ---- x = d q + m, q in 0..top ---- */

/* Its inverse scales are (top + first + 0.1 i) / (largest - smallest), i <= last. */
typedef struct {
    int top, last, squared;
    float first;
} affine_search;

INLINE affine_search affine_search_of(const weight_type to) {
    if (to == Q2_K) return (affine_search){3, 15, 0, -0.5f};
    return to == Q4_K ? (affine_search){15, 20, 1, -1} : (affine_search){31, 15, 1, -0.5f};
}

/* |x|, and to that, where errors are squared, the root of the mean square of all. */
FLATTEN void weigh(const affine_search how, const int n, float x[][LANES], float w[][LANES]) {
    float mean[LANES] = {0};
    if (how.squared) {
        for (int j = 0; j < n; j++) EACH_LANE mean[lane] += x[j][lane] * x[j][lane];
        EACH_LANE mean[lane] = sqrtf(mean[lane] / (float)n);
    }
    for (int j = 0; j < n; j++) EACH_LANE w[j][lane] = mean[lane] + fabsf(x[j][lane]);
}

FLATTEN float step_of(float x, float origin, float inverse, int top) {
    return nearest_within(inverse * (x - origin), 0, top);
}

FLATTEN void affine_errors(const affine_search how, const int n, float x[][LANES], float w[][LANES], float q[][LANES],
                           const float *d, const float *m, float *errors) {
    float sum[LANES] = {0};
    for (int j = 0; j < n; j++)
        EACH_LANE {
            float error = d[lane] * q[j][lane] + m[lane] - x[j][lane];
            sum[lane] += w[j][lane] * (how.squared ? error * error : fabsf(error));
        }
    EACH_LANE errors[lane] = sum[lane];
}

/* d and m of least weighed squares for some q; m is at most 0. d is NaN where the q don't tell. */
FLATTEN void fit(const int n, float x[][LANES], float w[][LANES], float q[][LANES], const float *sum_w,
                 const float *sum_x, float *d, float *m) {
    float sum_q[LANES] = {0}, sum_q2[LANES] = {0}, sum_qx[LANES] = {0};
    for (int j = 0; j < n; j++)
        EACH_LANE {
            float wq = w[j][lane] * q[j][lane];
            sum_q[lane] += wq;
            sum_q2[lane] += wq * q[j][lane];
            sum_qx[lane] += wq * x[j][lane];
        }
    EACH_LANE {
        float whole = sum_w[lane] * sum_q2[lane] - sum_q[lane] * sum_q[lane];
        float slope = (sum_w[lane] * sum_qx[lane] - sum_x[lane] * sum_q[lane]) / whole;
        float lowest = (sum_q2[lane] * sum_x[lane] - sum_q[lane] * sum_qx[lane]) / whole;
        int32_t above = lowest > 0;
        slope = choose(above, sum_qx[lane] / sum_q2[lane], slope);
        d[lane] = choose(whole > 0, slope, NAN);
        m[lane] = choose(above, 0, lowest);
    }
}

FLATTEN void search_affine(const affine_search how, const int n, float x[][LANES], float *d, float *m,
                           uint32_t found[][LANES]) {
    float w[BLOCK][LANES], q[BLOCK][LANES];
    float high[LANES], sum_w[LANES] = {0}, sum_x[LANES] = {0};
    float inverse[LANES], best_inverse[LANES], best_origin[LANES], least[LANES], new_d[LANES], new_m[LANES], errors[LANES];
    weigh(how, n, x, w);
    find_range(x, n, m, high);
    for (int j = 0; j < n; j++) EACH_LANE sum_w[lane] += w[j][lane], sum_x[lane] += w[j][lane] * x[j][lane];
    EACH_LANE {
        best_origin[lane] = m[lane] = m[lane] < 0 ? m[lane] : 0;
        best_inverse[lane] = (float)how.top / (high[lane] - m[lane]);
        d[lane] = 1 / best_inverse[lane];
    }
    for (int j = 0; j < n; j++) EACH_LANE q[j][lane] = step_of(x[j][lane], m[lane], best_inverse[lane], how.top);
    affine_errors(how, n, x, w, q, d, m, least);
    for (int i = 0; i <= how.last; i++) {
        EACH_LANE inverse[lane] = (how.first + 0.1f * (float)i + (float)how.top) / (high[lane] - m[lane]);
        for (int j = 0; j < n; j++) EACH_LANE q[j][lane] = step_of(x[j][lane], m[lane], inverse[lane], how.top);
        fit(n, x, w, q, sum_w, sum_x, new_d, new_m);
        affine_errors(how, n, x, w, q, new_d, new_m, errors);
        EACH_LANE {
            int32_t better = errors[lane] < least[lane]; /* NaN isn't */
            best_inverse[lane] = choose(better, inverse[lane], best_inverse[lane]);
            best_origin[lane] = choose(better, m[lane], best_origin[lane]);
            d[lane] = choose(better, new_d[lane], d[lane]);
            m[lane] = choose(better, new_m[lane], m[lane]);
            least[lane] = choose(better, errors[lane], least[lane]);
        }
    }
    for (int j = 0; j < n; j++)
        EACH_LANE found[j][lane] =
            (uint32_t)(int32_t)step_of(x[j][lane], best_origin[lane], best_inverse[lane], how.top);
}

/* ---- x = d q, q one of some values ---- */

/* Blocks whose largest element is smaller are zeros to ggml. */
static const float NOTHING = 1e-15f;

/* The values of iq4_nl and iq4_xs, and what lies halfway between each and the next. */
static const float VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#define HALFWAY(i) ((VALUES[i] + VALUES[i - 1]) / 2)

FLATTEN uint32_t value_index(float x) {
    uint32_t index = 0;
    UNROLL
    for (int i = 1; i < 16; i++) index += x >= HALFWAY(i);
    return index;
}

FLATTEN float nearest_value(float x) {
    float value = VALUES[0];
    UNROLL
    for (int i = 1; i < 16; i++) value = x >= HALFWAY(i) ? VALUES[i] : value;
    return value;
}

/* Number i of the inverse scales that are tried, for a block's largest element; i = 0 is the first. */
INLINE float candidate(const weight_type to, float largest, int i) {
    if (to == Q6_K) return -(32 + 0.1f * (float)(i == 0 ? 0 : i < 10 ? i - 10 : i - 9)) / largest;
    return i ? ((float)(i - 8) + VALUES[0]) / largest : 1 / (-largest / VALUES[0]);
}

/* Sums w x q and w q^2 with w = x^2. */
FLATTEN void ratio_sums(const weight_type to, const int n, float x[][LANES], const float *inverse, float *sum_qx,
                        float *sum_q2) {
    float qx[LANES] = {0}, q2[LANES] = {0};
    for (int j = 0; j < n; j++)
        EACH_LANE {
            float here = x[j][lane], w = here * here, step = inverse[lane] * here;
            float q = to == Q6_K ? nearest_within(step, -32, 31) : nearest_value(step);
            qx[lane] += to == Q6_K ? w * here * q : w * q * here;
            q2[lane] += w * q * q;
        }
    EACH_LANE sum_qx[lane] = qx[lane], sum_q2[lane] = q2[lane];
}

/* d, and the inverse scale it was found with. */
FLATTEN void search_ratio(const weight_type to, const int n, float x[][LANES], float *d, float *best) {
    const int last = to == Q6_K ? 18 : 15;
    float largest[LANES], inverse[LANES], sum_qx[LANES], sum_q2[LANES], gain[LANES];
    find_largest(x, n, largest);
    EACH_LANE d[lane] = best[lane] = 0, gain[lane] = -1;
    for (int i = 0; i <= last; i++) {
        EACH_LANE inverse[lane] = candidate(to, largest[lane], i);
        ratio_sums(to, n, x, inverse, sum_qx, sum_q2);
        EACH_LANE {
            float qx = sum_qx[lane], q2 = sum_q2[lane], ratio = qx / q2;
            int32_t better = (q2 > 0) & (qx * qx > gain[lane] * q2);
            d[lane] = choose(better, ratio, d[lane]);
            gain[lane] = choose(better, ratio * qx, gain[lane]);
            best[lane] = choose(better, inverse[lane], best[lane]);
        }
    }
    EACH_LANE d[lane] = fabsf(largest[lane]) < NOTHING ? 0 : d[lane];
    EACH_LANE best[lane] = fabsf(largest[lane]) < NOTHING ? 0 : best[lane];
}

/* ---- q3_k: x = d q, each q in turn ---- */

enum { PAIR = 2 }; /* parts that are searched at once: each step waits for the one before, and so there are two of it */

/* Each q in turn becomes the best for the d of all others, if that is better. Returns whether any did. */
FLATTEN int improve_in_turn(const int n, float x[][LANES], float q[][LANES], float qx[][LANES], float q2[][LANES]) {
    int32_t changed[LANES] = {0}, any = 0;
    for (int j = 0; j < n; j++) {
        UNROLL
        for (int k = 0; k < PAIR; k++)
            EACH_LANE {
                float here = x[k * n + j][lane], w = here * here, old = q[k * n + j][lane];
                float sum_qx = qx[k][lane], sum_q2 = q2[k][lane];
                float others_qx = sum_qx - w * here * old, others_q2 = sum_q2 - w * old * old;
                float new = nearest_within(here * others_q2 / others_qx, -4, 3);
                float new_qx = others_qx + w * here * new, new_q2 = others_q2 + w * new * new;
                int32_t better = (others_qx > 0) & (new != old) & (new_q2 > 0) &
                                 (new_qx * new_qx * sum_q2 > sum_qx * sum_qx * new_q2);
                q[k * n + j][lane] = choose(better, new, old);
                qx[k][lane] = choose(better, new_qx, sum_qx);
                q2[k][lane] = choose(better, new_q2, sum_q2);
                changed[lane] |= better;
            }
    }
    EACH_LANE any |= changed[lane];
    return any;
}

/* From q at the inverse scale of the largest element, up to 5 rounds. x and found are those of PAIR parts. */
FLATTEN void search_in_turn(const int n, float x[][LANES], float d[][LANES], uint32_t found[][LANES]) {
    float q[PAIR * BLOCK][LANES], largest[PAIR][LANES], qx[PAIR][LANES] = {{0}}, q2[PAIR][LANES] = {{0}};
    for (int k = 0; k < PAIR; k++) {
        find_largest(x + k * n, n, largest[k]);
        for (int j = k * n; j < k * n + n; j++)
            EACH_LANE {
                float here = x[j][lane], w = here * here;
                q[j][lane] = nearest_within(-4 / largest[k][lane] * here, -4, 3);
                qx[k][lane] += w * here * q[j][lane];
                q2[k][lane] += w * q[j][lane] * q[j][lane];
            }
    }
    for (int round = 0; round < 5; round++)
        if (!improve_in_turn(n, x, q, qx, q2)) break;
    for (int k = 0; k < PAIR; k++) {
        EACH_LANE largest[k][lane] = choose(fabsf(largest[k][lane]) < NOTHING, 0, largest[k][lane]);
        EACH_LANE d[k][lane] = choose((largest[k][lane] != 0) & (q2[k][lane] > 0), qx[k][lane] / q2[k][lane], 0);
        for (int j = k * n; j < k * n + n; j++)
            EACH_LANE found[j][lane] = choose_bits(largest[k][lane] != 0, (uint32_t)((int32_t)q[j][lane] + 4), 0);
    }
}
