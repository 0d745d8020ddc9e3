/* What will be multiplied next. Between two products of a token memory would stand still while Python runs, a norm
 * or attention. A model multiplies its weights in the same order for every token, so every product is remembered
 * with the one that came after it, and threads that wait for work ask memory for the beginning of their shares.
 *
 * Only addresses are kept. To ask for memory that has been freed meanwhile does nothing. */
#include "kernels.h"

enum {
    N_SLOTS = 2048,        /* for products; two that fall into the same slot forget each other */
    AT_ONCE = 3,           /* weights of a product that are remembered: more aren't multiplied at once */
    ASKED_FOR = 256 << 10, /* bytes a thread: half of a small second-level cache */
};

typedef struct {
    stretch weights[AT_ONCE];
} followers;

static followers after[N_SLOTS];
static followers *before;

static followers *slot_of(const weight *w) {
    return &after[((uintptr_t)w->data / 64 * 0x9e3779b97f4a7c15u) >> 53];
}

/* Where a thread's share begins, when all bytes of the weights are shared out in order. */
static stretch share_of(const followers *f, int worker, int threads) {
    size_t total = 0, start;
    for (int i = 0; i < AT_ONCE; i++) total += f->weights[i].n_bytes;
    start = total / (size_t)threads * (size_t)worker;
    for (int i = 0; i < AT_ONCE; i++) {
        size_t n = f->weights[i].n_bytes;
        if (start < n) return (stretch){f->weights[i].start + start, n - start < ASKED_FOR ? n - start : ASKED_FOR};
        start -= n;
    }
    return (stretch){0};
}

void ask_for_next(long n_weights, const weight *const *weights, int threads) {
    followers now = {0};
    for (long i = 0; i < n_weights && i < AT_ONCE; i++)
        if (weights[i]->data) now.weights[i] = (stretch){weights[i]->data, weight_bytes(weights[i])};
    if (before) *before = now;
    before = slot_of(weights[0]);
    for (int worker = 1; worker < threads; worker++) ask_when_idle(worker, share_of(before, worker, threads));
}
