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
static int has_palette(void) { return 1; }
#else
static int has_tiles(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d, wanted = AMX_BF16 | AMX_TILE;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted;
}

/* Palette 1: eight tiles of 16 rows of 64 bytes. Some virtual machines have AMX and the system saves it, but there
 * is no palette, and every instruction faults (github.com/actions/runner-images/issues/14483). */
static int has_palette(void) {
    unsigned a, b, c, d;
    if (!system_saves(XCR0_TILES) || !__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return 0;
    __cpuid_count(0x1d, 1, a, b, c, d);
    return b >> 16 >= 8 && (b & 0xffff) >= 64 && (c & 0xffff) >= 16;
}
#endif

#if defined(__linux__)
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux saves 8 KB of tiles only for a process that has asked for it; its threads and children may then, too. */
static const char *ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    if (!syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return NULL;
    return errno == ENOSPC ? "a thread's stack for signals has no room for tiles" : "the system refuses tiles";
}
#else
static const char *ask_for_tiles(void) { return "only Linux is known to allow it"; }
#endif

static const char *obstacle(void) {
    const char *refused;
    if (!has_palette()) return "the system or the virtual machine provides no tiles";
    if ((refused = ask_for_tiles())) return refused;
    return tiles_are_right() ? NULL : "tiles multiply wrongly here";
}

static int cpu_has_amx(void) {
    enum { AVX512_BF16 = 1 << 5 };
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16) && has_tiles();
}

const char *amx_obstacle(void) {
    static const char *found;
    static int asked;
    if (!asked && cpu_has_amx()) found = obstacle();
    asked = 1;
    return found;
}

static int has_amx(void) { return cpu_has_amx() && !amx_obstacle(); }
#else
const char *amx_obstacle(void) { return NULL; }
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
