/* Blocks side by side, one a lane: element j of LANES of them lies in x[j], and nothing is ever added or compared
 * across lanes. The loops over lanes are plain C, which a compiler turns into vectors of whatever instruction set
 * the including file is for. */
#include "kernels.h"

#define FLATTEN static inline __attribute__((always_inline))
/* Not written out before it has become a vector. */
#if defined(__clang__)
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#else
#define EACH_LANE _Pragma("GCC unroll 1") for (int lane = 0; lane < LANES; lane++)
#endif
#define EACH_OF(n) for (int j = 0; j < (n); j++)
#define EACH_ELEMENT EACH_OF(BLOCK)

/* yes (0 or 1) ? a : b, of which no compiler makes a branch: loops with branches don't become vectors. */
FLATTEN uint32_t choose_bits(int32_t yes, uint32_t a, uint32_t b) {
    const uint32_t mask = (uint32_t)-yes;
    return (a & mask) | (b & ~mask);
}

FLATTEN float choose(int32_t yes, float a, float b) {
    uint32_t bits, others;
    memcpy(&bits, &a, 4);
    memcpy(&others, &b, 4);
    bits = choose_bits(yes, bits, others);
    memcpy(&a, &bits, 4);
    return a;
}

/* The element of largest magnitude with its sign; of two equals the first. Of zeros, +0. */
FLATTEN void find_largest(float x[][LANES], const int n, float *largest) {
    float magnitude[LANES] = {0};
    EACH_LANE largest[lane] = 0;
    EACH_OF(n) EACH_LANE {
        float here = fabsf(x[j][lane]);
        largest[lane] = here > magnitude[lane] ? x[j][lane] : largest[lane];
        magnitude[lane] = here > magnitude[lane] ? here : magnitude[lane];
    }
}

/* The smallest and the largest element; of +0 and -0 the first. */
FLATTEN void find_range(float x[][LANES], const int n, float *low, float *high) {
    EACH_LANE low[lane] = high[lane] = x[0][lane];
    EACH_OF(n) EACH_LANE {
        low[lane] = x[j][lane] < low[lane] ? x[j][lane] : low[lane];
        high[lane] = x[j][lane] > high[lane] ? x[j][lane] : high[lane];
    }
}

/* w = w sqrt(mean + x^2). */
FLATTEN void weigh_elements(const int n, float x[][LANES], const float *mean, float w[][LANES]) {
    EACH_OF(n) {
        const vec here = v_load(x[j]);
        v_store(w[j], v_mul(v_load(w[j]), v_sqrt(v_add(v_load(mean), v_mul(here, here)))));
    }
}

/* Bytes i..i+3 of integers that are packed: each byte holds, from its lowest bits on, `bits` of each of some q, from
 * bit `shift` on, that lie `apart`; `apart` bytes follow each other so. */
FLATTEN void pack_word(uint32_t q[][LANES], const int bits, const int apart, const int shift, int i, uint32_t *word) {
    const int together = 8 / bits;
    EACH_LANE word[lane] = 0;
    for (int byte = i; byte < i + 4; byte++)
        for (int k = 0; k < together; k++) {
            const int from = (byte / apart * together + k) * apart + byte % apart, to = (byte - i) * 8 + k * bits;
            EACH_LANE word[lane] |= (q[from][lane] >> shift & ((1u << bits) - 1)) << to;
        }
}
