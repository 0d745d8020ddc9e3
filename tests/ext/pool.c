/* The pool and the operations under a sanitizer: several callers at once, changing numbers of threads, pieces that must
 * each be done once, results that must be those of a single caller, children that are forked meanwhile. The kernels
 * are the reference: what threads share is none of theirs. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../ext/kernels.h"

enum { N = 1000, CALLERS = 8, ROUNDS = 1000, CALLS = 30 };

const kernels *active_kernels(void) { return &ref_kernels; }

/* A forked child goes on. It starts no threads of its own, which the sanitizer couldn't tell from those it lost. */
const char *__tsan_default_options(void) { return "die_after_fork=0"; }

static void count(void *job, long first, long last, int worker) {
    int *done = job;
    (void)worker;
    for (long i = first; i < last; i++) done[i]++;
}

static int count_once(int round) {
    int done[N] = {0}, wrong = 0;
    pool_lock();
    run_parallel(1 + round % 5, N, 1 + round % 7, count, done);
    pool_unlock();
    for (int i = 0; i < N; i++) wrong |= done[i] != 1;
    return wrong;
}

/* ---- a layer: what all callers share, and what each has for itself ---- */

enum { TOKENS = 13, DIM = 96, HEADS = 3, HEAD_DIM = 32, CONTEXT = 300, OUT = 70 };

static weight shared[2];
static float inputs[TOKENS * DIM], freqs[TOKENS * HEAD_DIM];

typedef struct {
    uint16_t keys[CONTEXT * DIM], values[CONTEXT * DIM];
    float products[2][TOKENS * OUT], rows[2 * DIM], normed[TOKENS * DIM], turned[TOKENS * DIM], attended[TOKENS * DIM];
    uint64_t sum;
} results;

static void prepare(weight *w, weight_type type, weight_type from) {
    size_t n = (size_t)(OUT * file_row_bytes(from, DIM));
    uint8_t *blocks = malloc(n);
    weight_layout(w, type, OUT, DIM);
    take_memory(weight_bytes(w), &w->data);
    for (size_t i = 0; i < n; i++) blocks[i] = (uint8_t)(i % 18 == 1 ? 0x2c : i % 18 * 7); /* scales of 0.06 */
    pack(&(file_blocks){from, OUT, DIM, blocks}, w, 0, 0, 3);
    free(blocks);
}

static void compute(results *r, int threads) {
    const weight *weights[2] = {&shared[0], &shared[1]};
    float *outs[2] = {r->products[0], r->products[1]};
    const int64_t rows[2] = {69, 0};
    heads h = {inputs, r->keys, r->values, r->attended, TOKENS, HEADS, HEADS, HEAD_DIM, CONTEXT, 250, 250 + TOKENS};
    matmul(inputs, TOKENS, 2, weights, outs, threads);
    unpack_rows(&shared[0], rows, 2, r->rows);
    rms_norm(inputs, inputs, 1e-6f, TOKENS, DIM, r->normed, threads);
    swiglu(r->normed, inputs, TOKENS * DIM, r->normed, threads);
    rope(inputs, freqs, TOKENS, HEADS, HEAD_DIM, r->turned, threads);
    store_heads(r->turned, TOKENS, HEADS, HEAD_DIM, CONTEXT, 250, r->keys);
    store_heads(inputs, TOKENS, HEADS, HEAD_DIM, CONTEXT, 250, r->values);
    attention(&h, threads);
    const stretch all[2] = {{shared[0].data, weight_bytes(&shared[0])}, {shared[1].data, weight_bytes(&shared[1])}};
    r->sum = read_all(2, all, threads) + (uint64_t)multiply_all(100, threads);
}

static results *alone;

static int compute_as_alone(int round) {
    results *mine = calloc(1, sizeof *mine);
    pool_lock();
    compute(mine, 1 + round % 5);
    pool_unlock();
    int wrong = memcmp(mine, alone, sizeof *mine) != 0;
    free(mine);
    return wrong;
}

static int fork_once(void) {
    int status;
    pid_t child = fork();
    if (!child) _exit(count_once(0) | compute_as_alone(0)); /* on one thread */
    return waitpid(child, &status, 0) != child || status != 0;
}

static void *call(void *failed) {
    for (int round = 0; round < ROUNDS; round++) {
        *(int *)failed |= count_once(round);
        if (round % (ROUNDS / CALLS) == 0) *(int *)failed |= compute_as_alone(round / CALLS);
        if (round % 500 == 0) usleep(1000); /* long enough for the workers to fall asleep */
    }
    return NULL;
}

int main(void) {
    pthread_t callers[CALLERS];
    int failed[CALLERS] = {0}, any = 0;
    for (int i = 0; i < TOKENS * DIM; i++) inputs[i] = (float)(i % 31 - 15) / 8;
    for (int i = 0; i < TOKENS * HEAD_DIM; i++) freqs[i] = (float)(i % 7) / 7;
    pool_lock();
    prepare(&shared[0], Q4_0, Q4_0), prepare(&shared[1], Q8_0, Q8_0);
    compute(alone = calloc(1, sizeof *alone), 1);
    pool_unlock();
    for (int i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, call, &failed[i]);
    for (int i = 0; i < 5; i++) any |= fork_once();
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL), any |= failed[i];
    puts(any ? "some piece or result was wrong" : "every piece was done once, every result as of one caller");
    return any;
}
