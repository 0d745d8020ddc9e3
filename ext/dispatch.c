/* Looks at the CPU once and chooses the kernels; TINYLLAMA_CPU overrides. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Registers that the system saves when it switches threads (XCR0): without that they can't be used. */
enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6, XCR0_TILES = 0x60000 };

static int system_saves(unsigned wanted) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

static int has_avx2(void) {
    unsigned a, b, c, d;
    if (!system_saves(XCR0_AVX) || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!(c & bit_FMA) || !(c & bit_F16C)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static int has_avx512(void) {
    unsigned a, b, c, d, wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if (!has_avx2() || !system_saves(XCR0_AVX512)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (b & wanted) == wanted && (c & bit_AVX512VNNI);
}
#endif

#if defined(HAVE_AMX)
#if defined(TINYLLAMA_EMULATE_TILES)
static int has_tiles(void) { return 1; }
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Linux saves 8 KB of tiles only for a process that has asked for it. It refuses where a thread has too little room
 * for signals. */
static int has_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d, wanted = AMX_BF16 | AMX_TILE;
    if (!system_saves(XCR0_TILES) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static int has_tiles(void) { return 0; }
#endif

static int has_amx(void) {
    enum { AVX512_BF16 = 1 << 5 };
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return 0;
    static int tiles = -1; /* asked once */
    return tiles < 0 ? (tiles = has_tiles()) : tiles;
}
#endif

#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *feature) {
    int yes = 0;
    size_t size = sizeof yes;
    return sysctlbyname(feature, &yes, &size, NULL, 0) == 0 && yes;
}

static int has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
static int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
#endif

static int always(void) { return 1; }

static const struct {
    const kernels *kernels;
    int (*available)(void);
} levels[] = {
#if defined(HAVE_AMX)
    {&amx_kernels, has_amx},
#endif
#if defined(__x86_64__)
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&i8mm_kernels, has_i8mm},
#if defined(HAVE_ACCELERATE)
    {&accelerate_kernels, has_dotprod},
#endif
    {&dotprod_kernels, has_dotprod},
    {&neon_kernels, always},
#endif
    {&ref_kernels, always},
};

enum { N_LEVELS = sizeof levels / sizeof *levels };

const char *const *available_levels(void) {
    static const char *names[N_LEVELS + 1];
    int n = 0;
    for (int i = 0; i < N_LEVELS; i++)
        if (levels[i].available()) names[n++] = levels[i].kernels->name;
    names[n] = NULL;
    return names;
}

static const kernels *active;

int use_level(const char *name) {
    for (int i = 0; i < N_LEVELS; i++) {
        if (strcmp(name, levels[i].kernels->name) || !levels[i].available()) continue;
        active = levels[i].kernels;
        return 0;
    }
    return -1;
}

const kernels *active_kernels(void) {
    if (!active) use_level(available_levels()[0]);
    return active;
}
