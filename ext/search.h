/* Scales that make the error of a block small, to the bit those that ggml-quants.c finds: an element weighs more the
 * larger it is, and the more important its column is, where there is an importance matrix.
 *
 * A search rounds the elements at some inverse scales, and takes the scale that fits what they become best. x holds n
 * elements of each lane's block, w what their errors weigh. Sums run down the elements in their order, and w * q * x is
 * (w * q) * x: each product rounds. Long sums are written with vectors: compilers would put arrays of them back to
 * memory at each step. */
#include "lanes.h"

/* The nearest integer, of two the even one, if |x| < 2^22, where x + 1.5 * 2^23 has no bits for a fraction; of any x
 * what ggml's nearest_int makes of it. */
FLATTEN int32_t nearest_int(float x) {
    int32_t bits;
    x += 12582912;
    memcpy(&bits, &x, 4);
    return (bits & 0x7fffff) - 0x400000;
}

/* That, within bounds, as a number. In steps: of one expression GCC makes two conversions, and a branch. */
FLATTEN float nearest_within(float x, int32_t low, int32_t high) {
    int32_t step = nearest_int(x);
    step = step > low ? step : low;
    step = step < high ? step : high;
    return (float)step;
}

FLATTEN uint32_t to_unsigned(float q, int zero) { return (uint32_t)((int32_t)q + zero); }

/* ---- x = d q + m, q in 0..top ---- */

/* After top / range, the inverse scales (top + first + step i) / range, i <= last, are tried. */
typedef struct {
    int top, last, squared;
    float first, step;
} affine_search;

INLINE affine_search affine_search_of(const weight_type to, int weighed) {
    const int top = (1 << types[to].bits) - 1;
    if (weighed) return (affine_search){top, 36, 1, -0.9f, 0.05f};
    return to == Q4_K ? (affine_search){top, 20, 1, -1, 0.1f} : (affine_search){top, 15, to != Q2_K, -0.5f, 0.1f};
}

typedef struct {
    float origin[LANES], inverse[LANES]; /* q is (x - origin) inverse, rounded */
    float d[LANES], m[LANES];
    float error[LANES];
} affine;

/* Without an importance matrix: |x|, and to that, where errors are squared, the root of the mean square of all. */
FLATTEN void weigh_affine(const affine_search how, const int n, float x[][LANES], float w[][LANES]) {
    float mean[LANES] = {0};
    if (how.squared) {
        EACH_OF(n) EACH_LANE mean[lane] += x[j][lane] * x[j][lane];
        EACH_LANE mean[lane] = sqrtf(mean[lane] / (float)n);
    }
    EACH_OF(n) EACH_LANE w[j][lane] = mean[lane] + fabsf(x[j][lane]);
}

FLATTEN void round_affine(const int top, const int n, float x[][LANES], const affine *at, float q[][LANES]) {
    EACH_OF(n) EACH_LANE q[j][lane] = nearest_within(at->inverse[lane] * (x[j][lane] - at->origin[lane]), 0, top);
}

/* d and m of least squares; m is at most 0. d is NaN where the q don't tell. */
FLATTEN void fit(const int n, float x[][LANES], float w[][LANES], float q[][LANES], const float *sum_w,
                 const float *sum_x, affine *found) {
    float sum_q[LANES], sum_q2[LANES], sum_qx[LANES];
    vec q1 = v_set1(0), q2 = q1, qx = q1;
    EACH_OF(n) {
        const vec here = v_load(q[j]), wq = v_mul(v_load(w[j]), here);
        q1 = v_add(q1, wq);
        q2 = v_add(q2, v_mul(wq, here));
        qx = v_add(qx, v_mul(wq, v_load(x[j])));
    }
    v_store(sum_q, q1), v_store(sum_q2, q2), v_store(sum_qx, qx);
    EACH_LANE {
        float whole = sum_w[lane] * sum_q2[lane] - sum_q[lane] * sum_q[lane];
        float d = (sum_w[lane] * sum_qx[lane] - sum_x[lane] * sum_q[lane]) / whole;
        float m = (sum_q2[lane] * sum_x[lane] - sum_q[lane] * sum_qx[lane]) / whole;
        int32_t above = m > 0;
        d = choose(above, sum_qx[lane] / sum_q2[lane], d);
        found->d[lane] = choose(whole > 0, d, NAN);
        found->m[lane] = choose(above, 0, m);
    }
}

FLATTEN void find_error(const affine_search how, const int n, float x[][LANES], float w[][LANES], float q[][LANES],
                        affine *found) {
    const vec d = v_load(found->d), m = v_load(found->m);
    vec sum = v_set1(0);
    EACH_OF(n) {
        const vec error = v_sub(v_add(v_mul(d, v_load(q[j])), m), v_load(x[j]));
        const vec counts = how.squared ? v_mul(error, error) : v_max(error, v_sub(v_set1(0), error));
        sum = v_add(sum, v_mul(v_load(w[j]), counts));
    }
    v_store(found->error, sum);
}

FLATTEN void keep_better(const affine *found, affine *best) {
    EACH_LANE {
        int32_t better = found->error[lane] < best->error[lane]; /* NaN isn't */
        best->origin[lane] = choose(better, found->origin[lane], best->origin[lane]);
        best->inverse[lane] = choose(better, found->inverse[lane], best->inverse[lane]);
        best->d[lane] = choose(better, found->d[lane], best->d[lane]);
        best->m[lane] = choose(better, found->m[lane], best->m[lane]);
        best->error[lane] = choose(better, found->error[lane], best->error[lane]);
    }
}

/* From the smallest element, or 0, to the largest. */
FLATTEN void span(const affine_search how, const int n, float x[][LANES], float *high, affine *first) {
    find_range(x, n, first->m, high);
    EACH_LANE {
        first->origin[lane] = first->m[lane] = first->m[lane] > 0 ? 0 : first->m[lane];
        first->inverse[lane] = (float)how.top / (high[lane] - first->m[lane]);
        first->d[lane] = 1 / first->inverse[lane] + 0.0f; /* where all are equal +0 */
    }
}

/* Each try starts from the best m so far. */
FLATTEN void search_affine(const affine_search how, const int n, float x[][LANES], float w[][LANES], float *d, float *m,
                           uint32_t steps[][LANES]) {
    float q[BLOCK][LANES], high[LANES], sum_w[LANES] = {0}, sum_x[LANES] = {0};
    affine best, found;
    EACH_OF(n) EACH_LANE sum_w[lane] += w[j][lane], sum_x[lane] += w[j][lane] * x[j][lane];
    span(how, n, x, high, &best);
    round_affine(how.top, n, x, &best, q);
    find_error(how, n, x, w, q, &best);
    for (int i = 0; i <= how.last; i++) {
        const float steps_tried = how.first + how.step * (float)i + (float)how.top;
        EACH_LANE found.inverse[lane] = steps_tried / (high[lane] - best.m[lane]), found.origin[lane] = best.m[lane];
        round_affine(how.top, n, x, &found, q);
        fit(n, x, w, q, sum_w, sum_x, &found);
        find_error(how, n, x, w, q, &found);
        keep_better(&found, &best);
    }
    round_affine(how.top, n, x, &best, q);
    EACH_OF(n) EACH_LANE steps[j][lane] = to_unsigned(q[j][lane], 0);
    EACH_LANE d[lane] = best.d[lane], m[lane] = best.m[lane];
}

/* ---- x = d q, q in -zero..zero - 1, or, with a zero of 0, one of the values of iq4_nl ---- */

static const float NOTHING = 1e-15f; /* blocks whose largest element is smaller are zeros to ggml */

#define HALFWAY(i) ((float)(iq4_values[i] + iq4_values[i - 1]) / 2)

FLATTEN uint32_t value_index(float x) {
    uint32_t index = 0;
    UNROLL
    for (int i = 1; i < 16; i++) index += x >= HALFWAY(i);
    return index;
}

FLATTEN float nearest_value(float x) {
    float value = iq4_values[0];
    UNROLL
    for (int i = 1; i < 16; i++) value = x >= HALFWAY(i) ? (float)iq4_values[i] : value;
    return value;
}

/* Number i of the inverse scales that are tried. */
FLATTEN float inverse_of(const int zero, float largest, int i) {
    if (zero) return -((float)zero + 0.1f * (float)(i == 0 ? 0 : i < 10 ? i - 10 : i - 9)) / largest;
    return i ? (float)(i - 8 + iq4_values[0]) / largest : 1 / (-largest / (float)iq4_values[0]);
}

/* The sums of w x q and w q^2. */
FLATTEN void sum_products(const int zero, const int n, float x[][LANES], float w[][LANES], float q[][LANES],
                          float *sum_qx, float *sum_q2) {
    vec qx = v_set1(0), q2 = qx;
    EACH_OF(n) {
        const vec here = v_load(x[j]), value = v_load(q[j]), weight = v_load(w[j]), wq = v_mul(weight, value);
        qx = v_add(qx, zero ? v_mul(v_mul(weight, here), value) : v_mul(wq, here));
        q2 = v_add(q2, v_mul(wq, value));
    }
    v_store(sum_qx, qx), v_store(sum_q2, q2);
}

/* d, and the inverse scale that it was found at. Of nothing, zeros. */
FLATTEN void search_ratio(const int zero, const int n, float x[][LANES], float w[][LANES], float *d, float *best) {
    float q[BLOCK][LANES], largest[LANES], inverse[LANES], sum_qx[LANES], sum_q2[LANES], gain[LANES];
    find_largest(x, n, largest);
    EACH_LANE d[lane] = best[lane] = gain[lane] = 0;
    for (int i = 0; i < (zero ? 19 : 16); i++) {
        EACH_LANE inverse[lane] = inverse_of(zero, largest[lane], i);
        EACH_OF(n) EACH_LANE {
            float step = inverse[lane] * x[j][lane];
            q[j][lane] = zero ? nearest_within(step, -zero, zero - 1) : nearest_value(step);
        }
        sum_products(zero, n, x, w, q, sum_qx, sum_q2);
        EACH_LANE {
            float qx = sum_qx[lane], q2 = sum_q2[lane], ratio = choose(q2 > 0, qx / q2, 0);
            int32_t better = (i == 0) | ((q2 > 0) & (qx * qx > gain[lane] * q2));
            d[lane] = choose(better, ratio, d[lane]);
            gain[lane] = choose(better, ratio * qx, gain[lane]);
            best[lane] = choose(better, inverse[lane], best[lane]);
        }
    }
    EACH_LANE {
        int32_t nothing = fabsf(largest[lane]) < NOTHING;
        d[lane] = choose(nothing, 0, d[lane]);
        best[lane] = choose(nothing, 0, best[lane]);
    }
}

/* Unsigned q at an inverse scale that search_ratio has found. */
FLATTEN void round_ratio(const int zero, const int n, float x[][LANES], const float *inverse, uint32_t q[][LANES]) {
    EACH_OF(n) EACH_LANE {
        uint32_t step = to_unsigned(nearest_within(inverse[lane] * x[j][lane], -zero, zero - 1), zero);
        q[j][lane] = choose_bits(inverse[lane] != 0, step, 0);
    }
}

/* ---- x = d q, q in 0..top, in bytes: below 0, which only rounding makes, q is one as well ---- */

enum { MOST_PARTS = 16 };

FLATTEN float up_to(float x, int32_t top) {
    int32_t step = nearest_int(x);
    return (float)(step < top ? step : top);
}

FLATTEN float as_byte(float q) { return (float)((int32_t)q & 255); }

/* The errors of rounding at these inverse scales; the first trial rounds to a byte and doesn't clip to top. */
FLATTEN void find_error_from_0(const int n, const int top, int first, float x[][LANES], float w[][LANES],
                               const float *inverse, float *error) {
    float d[LANES];
    EACH_LANE d[lane] = 1 / inverse[lane], error[lane] = 0;
    EACH_OF(n) EACH_LANE {
        float step = inverse[lane] * x[j][lane];
        float q = first ? as_byte((float)nearest_int(step)) : up_to(step, top);
        float off = x[j][lane] - d[lane] * q;
        error[lane] += w[j][lane] * off * off;
    }
}

/* Each q becomes the best for the d of all others, where that is better. */
FLATTEN void improve_from_0(const int n, const int top, float x[][LANES], float w[][LANES], float q[][LANES],
                            float *sum_qx, float *sum_q2) {
    EACH_OF(n) EACH_LANE {
        float here = x[j][lane], weight = w[j][lane], old = q[j][lane], qx = sum_qx[lane], q2 = sum_q2[lane];
        float others_qx = qx - weight * here * old, others_q2 = q2 - weight * old * old;
        float new = up_to(here * others_q2 / others_qx, top);
        float new_qx = others_qx + weight * here * new, new_q2 = others_q2 + weight * new * new;
        int32_t better = (others_qx > 0) & (others_q2 > 0) & (new != old) & (new_qx * new_qx * q2 > qx * qx * new_q2);
        q[j][lane] = choose(better, as_byte(new), old);
        sum_qx[lane] = choose(better, new_qx, qx);
        sum_q2[lane] = choose(better, new_q2, q2);
    }
}

/* Nine inverse scales are tried, then each q in turn. */
FLATTEN void search_from_0(const int n, const int top, float x[][LANES], float w[][LANES], uint32_t steps[][LANES],
                           float *d) {
    float q[MOST_PARTS][LANES], largest[LANES] = {0}, best[LANES], inverse[LANES], least[LANES], error[LANES];
    float qx[LANES] = {0}, q2[LANES] = {0};
    EACH_OF(n) EACH_LANE largest[lane] = x[j][lane] > largest[lane] ? x[j][lane] : largest[lane];
    EACH_LANE best[lane] = (float)top / largest[lane];
    find_error_from_0(n, top, 1, x, w, best, least);
    for (int i = -4; i <= 4; i++) {
        if (i == 0) continue;
        EACH_LANE inverse[lane] = (0.1f * (float)i + (float)top) / largest[lane];
        find_error_from_0(n, top, 0, x, w, inverse, error);
        EACH_LANE {
            int32_t better = error[lane] < least[lane];
            least[lane] = choose(better, error[lane], least[lane]);
            best[lane] = choose(better, inverse[lane], best[lane]);
        }
    }
    EACH_OF(n) EACH_LANE {
        float step = up_to(best[lane] * x[j][lane], top);
        qx[lane] += w[j][lane] * x[j][lane] * step;
        q2[lane] += w[j][lane] * step * step;
        q[j][lane] = as_byte(step);
    }
    for (int i = 0; i < 5; i++) improve_from_0(n, top, x, w, q, qx, q2);
    EACH_LANE d[lane] = choose((largest[lane] >= NOTHING) & (q2[lane] > 0), qx[lane] / q2[lane], 0);
    EACH_OF(n) EACH_LANE steps[j][lane] = choose_bits(largest[lane] >= NOTHING, to_unsigned(q[j][lane], 0), 0);
}

/* ---- x = d q, each q in -4..3 in turn; w is x^2 ---- */

enum { PAIR = 2 }; /* blocks that a lane searches at once: steps wait for each other, so there are two at a time */

/* Each q becomes the best for the d of all others, where that is better. Returns whether any did. */
FLATTEN int improve(const int n, float x[][LANES], float q[][LANES], float qx[][LANES], float q2[][LANES]) {
    int32_t changed[LANES] = {0}, any = 0;
    EACH_OF(n) {
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

/* From q at the inverse scale of the largest element, up to 5 times. */
FLATTEN void search_in_turn(const int n, float x[][LANES], float d[][LANES], uint32_t steps[][LANES]) {
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
    for (int i = 0; i < 5 && improve(n, x, q, qx, q2); i++);
    for (int k = 0; k < PAIR; k++) {
        int32_t something[LANES];
        EACH_LANE something[lane] = fabsf(largest[k][lane]) >= NOTHING;
        EACH_LANE d[k][lane] = choose(something[lane] & (q2[k][lane] > 0), qx[k][lane] / q2[k][lane], 0);
        for (int j = k * n; j < k * n + n; j++)
            EACH_LANE steps[j][lane] = choose_bits(something[lane], to_unsigned(q[j][lane], 4), 0);
    }
}
