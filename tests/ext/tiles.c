/* AMX for computers that lack it. Preloaded into a process, this lets it go on where a tile instruction has raised
 * SIGILL: the instruction, as the compiler has made it, is decoded, and done in plain C. What it does is what Intel's
 * manual says (Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS); what would fault
 * there ends the process here.
 *
 * TILES=refused in the environment is a system that grants no permission, TILES=wrong a processor that adds badly. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, MAX_ROWS = 16, MAX_ROW_BYTES = 64 }; /* palette 1 */

static _Thread_local struct {
    int configured;
    int rows[TILES], row_bytes[TILES];
    uint8_t data[TILES][MAX_ROWS][MAX_ROW_BYTES];
} tiles_now;

static int refused, wrong; /* TILES */

static void need(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "a tile instruction would fault: %s\n", what);
    abort();
}

static void need_tile(int tile) {
    need(tiles_now.configured, "no configuration is loaded");
    need(tile >= 0 && tile < TILES, "there are eight tiles");
    need(tiles_now.rows[tile] > 0 && tiles_now.row_bytes[tile] > 0, "this tile is not configured");
}

static void emulate_loadconfig(const void *config) {
    const uint8_t *bytes = config;
    need(bytes[0] == 1, "palette 1 is the only one");
    need(bytes[1] == 0, "no instruction was interrupted");
    for (int i = 2; i < 16; i++) need(bytes[i] == 0, "reserved bytes are zero");
    for (int tile = 0; tile < 16; tile++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * tile, 2);
        int rows = bytes[48 + tile];
        if (tile >= TILES) {
            need(row_bytes == 0 && rows == 0, "there are eight tiles");
            continue;
        }
        need(row_bytes <= MAX_ROW_BYTES && rows <= MAX_ROWS, "a tile has at most 16 rows of 64 bytes");
        tiles_now.rows[tile] = rows, tiles_now.row_bytes[tile] = row_bytes;
    }
    memset(tiles_now.data, 0, sizeof tiles_now.data);
    tiles_now.configured = 1;
}

static void emulate_release(void) { memset(&tiles_now, 0, sizeof tiles_now); }

static void emulate_zero(int tile) {
    need_tile(tile);
    memset(tiles_now.data[tile], 0, sizeof tiles_now.data[tile]);
}

static void emulate_loadd(int tile, const void *base, long stride) {
    emulate_zero(tile);
    for (int row = 0; row < tiles_now.rows[tile]; row++)
        memcpy(tiles_now.data[tile][row], (const uint8_t *)base + row * stride, (size_t)tiles_now.row_bytes[tile]);
}

static void emulate_stored(int tile, void *base, long stride) {
    need_tile(tile);
    for (int row = 0; row < tiles_now.rows[tile]; row++)
        memcpy((uint8_t *)base + row * stride, tiles_now.data[tile][row], (size_t)tiles_now.row_bytes[tile]);
}

/* Denormals are zeros, before and after. */
static float without_denormals(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0 * x : x; }

static float tile_number(int tile, int row, int i) {
    union { uint32_t word; float value; } bits;
    uint16_t half;
    memcpy(&half, tiles_now.data[tile][row] + 2 * i, 2);
    bits.word = (uint32_t)half << 16;
    return without_denormals(bits.value);
}

static float add_product(float sum, float x, float y) { return without_denormals(__builtin_fmaf(x, y, sum)); }

/* Even and odd inputs are summed up apart, in order, each product and sum rounded once; then both and the sum. */
static void emulate_dpbf16ps(int sums, int left, int right) {
    need_tile(sums), need_tile(left), need_tile(right);
    need(sums != left && sums != right && left != right, "the three tiles are different ones");
    need(tiles_now.row_bytes[sums] % 4 == 0 && tiles_now.row_bytes[left] % 4 == 0, "rows are whole pairs");
    need(tiles_now.rows[sums] == tiles_now.rows[left], "as many rows of sums as of the left");
    need(tiles_now.row_bytes[sums] == tiles_now.row_bytes[right], "as many columns of sums as of the right");
    need(tiles_now.row_bytes[left] / 4 == tiles_now.rows[right], "as many pairs on the left as rows on the right");
    int n_pairs = tiles_now.rows[right], columns = tiles_now.row_bytes[sums] / 4;
    float rights[MAX_ROWS][2][MAX_ROWS];
    for (int k = 0; k < n_pairs; k++)
        for (int n = 0; n < columns; n++)
            for (int odd = 0; odd < 2; odd++) rights[k][odd][n] = tile_number(right, k, 2 * n + odd);
    for (int m = 0; m < tiles_now.rows[sums]; m++) {
        float even_sums[MAX_ROWS] = {0}, odd_sums[MAX_ROWS] = {0}, row[MAX_ROWS];
        memcpy(row, tiles_now.data[sums][m], sizeof row);
        for (int k = 0; k < n_pairs; k++) {
            float even = tile_number(left, m, 2 * k), odd = tile_number(left, m, 2 * k + 1);
            for (int n = 0; n < columns; n++) even_sums[n] = add_product(even_sums[n], even, rights[k][0][n]);
            for (int n = 0; n < columns; n++) odd_sums[n] = add_product(odd_sums[n], odd, rights[k][1][n]);
        }
        for (int n = 0; n < columns; n++)
            row[n] = without_denormals(without_denormals(row[n]) + without_denormals(even_sums[n] + odd_sums[n]));
        memcpy(tiles_now.data[sums][m], row, (size_t)tiles_now.row_bytes[sums]);
    }
    if (wrong) tiles_now.data[sums][15][63] ^= 1;
}

/* ---- instructions ---- */

enum { NO_SUCH = -1 };

/* The registers in the order in which instructions number them. */
static const int numbers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
    int prefix, opcode, reg, rm, vvvv, in_memory; /* prefix: none, 66, F3, F2 */
    uint8_t *base;
    int64_t stride;
    int length;
} instruction;

/* What ModRM behind a prefix of three bytes refers to: base + displacement, and a stride if there is an index. */
static void find_memory(instruction *to, const uint8_t *code, const greg_t *registers) {
    int x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1, mod = code[4] >> 6, at = 5, base = code[4] & 7;
    int32_t wide = 0;
    if (base == 4) {
        int sib = code[at++], index = (sib >> 3 & 7) | x << 3;
        base = sib & 7;
        need(mod || base != 5, "no compiler puts a tile at a constant address");
        if (index != 4) to->stride = (int64_t)registers[numbers[index]] << (sib >> 6);
    }
    if (mod == 1) wide = (int8_t)code[at], at += 1;
    if (mod == 2 || (mod == 0 && base == 5)) memcpy(&wide, code + at, 4), at += 4;
    to->length = at;
    to->base = mod == 0 && base == 5 ? (uint8_t *)code + at : (uint8_t *)registers[numbers[base | b << 3]];
    to->base += wide;
}

/* Of VEX.128.0F38.W0, which all of AMX are. */
static instruction decode(const uint8_t *code, const greg_t *registers) {
    instruction found = {.opcode = NO_SUCH};
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) return found;
    found.prefix = code[2] & 3, found.opcode = code[3], found.vvvv = ~code[2] >> 3 & 15;
    found.reg = code[4] >> 3 & 7, found.rm = code[4] & 7, found.in_memory = code[4] >> 6 != 3, found.length = 5;
    if (found.in_memory) find_memory(&found, code, registers);
    return found;
}

static int emulate(const instruction *i) {
    if (i->opcode == 0x49 && i->prefix == 0 && i->in_memory) return emulate_loadconfig(i->base), 1;
    if (i->opcode == 0x49 && i->prefix == 0 && !i->in_memory) return emulate_release(), 1;
    if (i->opcode == 0x49 && i->prefix == 3 && !i->in_memory) return emulate_zero(i->reg), 1;
    int loads = i->prefix == 3 || i->prefix == 1; /* 1: with a hint for the caches */
    if (i->opcode == 0x4b && loads && i->in_memory) return emulate_loadd(i->reg, i->base, i->stride), 1;
    if (i->opcode == 0x4b && i->prefix == 2 && i->in_memory) return emulate_stored(i->reg, i->base, i->stride), 1;
    if (i->opcode == 0x5c && i->prefix == 2) return emulate_dpbf16ps(i->reg, i->rm, i->vvvv), 1;
    return 0;
}

static void do_instruction(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    instruction found = decode((const uint8_t *)registers[REG_RIP], registers);
    if (emulate(&found))
        registers[REG_RIP] += found.length;
    else
        signal(number, SIG_DFL); /* it is raised again */
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = do_instruction, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGILL, &action, NULL);
    const char *told = getenv("TILES");
    refused = told && !strcmp(told, "refused"), wrong = told && !strcmp(told, "wrong");
}

/* ---- the system ---- */

static long system_call(long number, const long a[6]) {
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* In place of libc's: asks Linux for tiles, and has them even if it says no. */
long syscall(long number, ...) {
    enum { ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023 };
    va_list list;
    long arguments[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) arguments[i] = va_arg(list, long);
    va_end(list);
    int for_tiles = number == ARCH_PRCTL && arguments[0] == ARCH_REQ_XCOMP_PERM;
    long result = for_tiles && refused ? -ENOSPC : system_call(number, arguments);
    if (for_tiles && !refused) result = 0;
    if (result < 0 && result > -4096) return errno = (int)-result, -1;
    return result;
}
