/* The pool under a sanitizer: several callers, changing numbers of threads, pieces that must each be done once. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../../ext/kernels.h"

enum { N = 1000, CALLERS = 3, ROUNDS = 3000 };

static void count(void *job, long first, long last, int worker) {
    int *done = job;
    (void)worker;
    for (long i = first; i < last; i++) done[i]++;
}

static void *call(void *failed) {
    int done[N];
    for (int round = 0; round < ROUNDS; round++) {
        memset(done, 0, sizeof done);
        pool_lock();
        run_parallel(1 + round % 5, N, 1 + round % 7, count, done);
        pool_unlock();
        for (int i = 0; i < N; i++) *(int *)failed |= done[i] != 1;
        if (round % 500 == 0) usleep(1000); /* long enough for the workers to fall asleep */
    }
    return NULL;
}

int main(void) {
    pthread_t callers[CALLERS];
    int failed[CALLERS] = {0}, any = 0;
    for (int i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, call, &failed[i]);
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL), any |= failed[i];
    puts(any ? "some piece was not done once" : "every piece was done once");
    return any;
}
