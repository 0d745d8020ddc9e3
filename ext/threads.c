/* The pool, nothing else: threads that wait for pieces of a job.
 *
 * The calling thread is worker 0. The others spin for a while after a job, since the next one follows
 * within microseconds while a token is computed, and then sleep. They are never joined: a thread that
 * waits for nothing may die with the process, and joining at exit while Python holds its lock could hang. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "kernels.h"

/* Longer than what Python does between two operations, shorter than what a user would feel as heat. */
enum { SPIN_NANOSECONDS = 100000, CACHE_LINE = 64 };

/* What different threads write to lies so far apart: a cache line of Apple's, two of others, which fetch pairs. */
enum { APART = 128 };

/* Each worker's share of 0..n-1. Whoever has finished its own goes on with the others'. */
typedef struct {
    _Alignas(APART) atomic_long next;
    long end;
} share;

typedef struct {
    _Alignas(APART) atomic_uint ticket; /* raised by the caller: there is a job for you */
    atomic_bool asleep;
} worker_state;

static share shares[MAX_THREADS];
static worker_state workers[MAX_THREADS];

/* How many workers are inside the current job, or CLOSED. The caller closes a job when nothing is left of
 * it and waits only for those inside: one whose core the system has given away never holds it up. */
enum { CLOSED = 1 << 30 };
static _Alignas(APART) atomic_int inside = CLOSED;

static struct {
    task *task;
    void *job;
    long grain;
    int threads;
} current;

/* What each worker asks memory for when it has left a job. */
static stretch wanted[MAX_THREADS];

static int started = 1; /* workers that run, the caller included */
static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* one caller at a time */
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static bool enter(void) {
    int n = atomic_load(&inside);
    while (!(n & CLOSED))
        if (atomic_compare_exchange_weak(&inside, &n, n + 1)) return true;
    return false;
}

static void work(int me) {
    if (me >= current.threads) return; /* woken for an earlier, wider job */
    for (int i = 0; i < current.threads; i++) {
        share *s = &shares[(me + i) % current.threads];
        long first;
        while ((first = atomic_fetch_add_explicit(&s->next, current.grain, memory_order_relaxed)) < s->end) {
            long last = first + current.grain;
            current.task(current.job, first, last < s->end ? last : s->end, me);
        }
    }
}

static unsigned wait_for_job(worker_state *me, unsigned seen) {
    long start = now();
    unsigned ticket;
    while ((ticket = atomic_load(&me->ticket)) == seen) {
        for (int i = 0; i < 32; i++) pause_briefly();
        if (now() - start < SPIN_NANOSECONDS) continue;
        pthread_mutex_lock(&bed);
        atomic_store(&me->asleep, true); /* before the ticket is looked at again: no wake-up is lost */
        while (atomic_load(&me->ticket) == seen) pthread_cond_wait(&wake, &bed);
        atomic_store(&me->asleep, false);
        pthread_mutex_unlock(&bed);
    }
    return ticket;
}

/* Brings memory into the caches until the next job comes. */
static void ask_for(stretch s, const worker_state *me, unsigned seen) {
    for (size_t i = 0; i < s.n_bytes && atomic_load_explicit(&me->ticket, memory_order_relaxed) == seen;)
        for (size_t end = i + 4096; i < end; i += CACHE_LINE) __builtin_prefetch(s.start + i);
}

/* macOS gives its fast cores to those whom a user waits for. */
static void ask_for_fast_core(void) {
#if defined(__APPLE__)
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
#endif
}

static void *worker_main(void *argument) {
    int me = (int)(intptr_t)argument;
    unsigned seen = 0;
    ask_for_fast_core();
    for (;;) {
        seen = wait_for_job(&workers[me], seen);
        if (!enter()) continue;
        work(me);
        stretch next = wanted[me];
        atomic_fetch_sub(&inside, 1);
        ask_for(next, &workers[me], seen);
    }
    return NULL;
}

void ask_when_idle(int worker, stretch memory) { wanted[worker] = memory; }

/* As many threads as asked for, or as many as the system gives. */
static int start_workers(int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    for (; started < threads; started++) {
        pthread_t thread;
        atomic_store(&workers[started].ticket, 0);
        atomic_store(&workers[started].asleep, false);
        if (pthread_create(&thread, NULL, worker_main, (void *)(intptr_t)started)) break;
        pthread_detach(thread);
    }
    return threads < started ? threads : started;
}

static void send(int worker) {
    atomic_fetch_add(&workers[worker].ticket, 1);
    if (!atomic_load(&workers[worker].asleep)) return;
    pthread_mutex_lock(&bed);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&bed);
}

void run_parallel(int threads, long n, long grain, task *task, void *job) {
    long pieces = (n + grain - 1) / grain;
    threads = start_workers(threads < pieces ? threads : (int)pieces);
    if (threads <= 1) {
        if (n > 0) task(job, 0, n, 0);
        return;
    }
    current.task = task, current.job = job, current.grain = grain, current.threads = threads;
    for (int i = 0; i < threads; i++) {
        atomic_store(&shares[i].next, pieces * i / threads * grain);
        long end = pieces * (i + 1) / threads * grain;
        shares[i].end = end < n ? end : n;
    }
    atomic_store(&inside, 0);
    for (int i = 1; i < threads; i++) send(i);
    work(0);
    atomic_fetch_or(&inside, CLOSED);
    for (int spins = 0; atomic_load(&inside) != CLOSED; spins++) {
        pause_briefly();
        if (spins > 1000) sched_yield(); /* perhaps a worker waits for this very core */
    }
}

/* A fork waits for the job that another thread is in, whose memory the child would find half done. The child has
 * none of the threads, and locks may be held by threads that it hasn't. */
static void before_fork(void) { pthread_mutex_lock(&calls); }

static void in_parent(void) { pthread_mutex_unlock(&calls); }

static void in_child(void) {
    static const pthread_mutex_t open = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t idle = PTHREAD_COND_INITIALIZER;
    calls = open, bed = open, wake = idle;
    started = 1;
    atomic_store(&inside, CLOSED);
}

static void install_fork_handler(void) { pthread_atfork(before_fork, in_parent, in_child); }

/* Never with Python's lock held: whoever forks holds it, and waits here for those inside. */
void pool_lock(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_fork_handler);
    pthread_mutex_lock(&calls);
}

void pool_unlock(void) { pthread_mutex_unlock(&calls); }
