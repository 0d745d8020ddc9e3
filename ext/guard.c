/* What happens when a mapped file loses pages that are still to be read, because somebody cut it short or its disk
 * fails: the system sends SIGBUS, and a process that nobody prepared dies without a word.
 *
 * While a file is watched, somebody will ask `guard_lost` before they believe what they read, and zeros are as good
 * as anything: the handler puts them where the file was, and the computation goes on to its end and the question.
 * Otherwise it says which file it was and leaves the rest to whoever handled the signal before. */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

typedef struct {
    atomic_uintptr_t start, end; /* 0, 0: free */
    atomic_int watched, lost;
    char line[512];
} guarded;

static guarded files[MAX_GUARDED];
static struct sigaction before;

static guarded *file_at(uintptr_t address) {
    for (int i = 0; i < MAX_GUARDED; i++)
        if (address >= atomic_load(&files[i].start) && address < atomic_load(&files[i].end)) return &files[i];
    return NULL;
}

static int put_zeros(guarded *file) {
    uintptr_t start = atomic_load(&file->start);
    size_t n = atomic_load(&file->end) - start;
    return mmap((void *)start, n, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
}

/* Returning repeats the access: of zeros it succeeds, otherwise the signal comes again, to the former handler. */
static void on_bus_error(int number, siginfo_t *info, void *context) {
    static atomic_int given_up;
    (void)context;
    guarded *file = file_at((uintptr_t)info->si_addr);
    if (file && atomic_load(&file->watched) > 0) {
        atomic_store(&file->lost, 1);
        if (!put_zeros(file)) return;
    }
    if (file && write(STDERR_FILENO, file->line, strlen(file->line)) < 0) _exit(128 + number);
    if (atomic_fetch_add(&given_up, 1))
        signal(number, SIG_DFL); /* the former handler has called this one again */
    else
        sigaction(number, &before, NULL);
    if (info->si_code <= 0) raise(number); /* another process has sent it */
}

static void install(void) {
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &before);
}

int guard(const void *start, size_t n_bytes, const char *name) {
    static int installed;
    if (!installed++) install();
    for (int i = 0; i < MAX_GUARDED; i++) {
        guarded *file = &files[i];
        if (atomic_load(&file->start)) continue;
        snprintf(file->line, sizeof file->line, "tinyllama: %.400s was cut short or can't be read any more\n", name);
        atomic_store(&file->watched, 0);
        atomic_store(&file->lost, 0);
        atomic_store(&file->end, (uintptr_t)start + n_bytes);
        atomic_store(&file->start, (uintptr_t)start);
        return i;
    }
    return -1;
}

void unguard(int file) {
    atomic_store(&files[file].end, 0);
    atomic_store(&files[file].start, 0);
}

void guard_watch(int file, int change) { atomic_fetch_add(&files[file].watched, change); }

int guard_lost(int file) { return atomic_load(&files[file].lost); }
