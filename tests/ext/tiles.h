/* The tile instructions in plain C, for tests on computers that lack them: what Intel's manual says that they do
 * (Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS). What would fault there ends
 * the process here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, MAX_ROWS = 16, MAX_ROW_BYTES = 64 }; /* palette 1 */

static _Thread_local struct {
    int configured;
    int rows[TILES], row_bytes[TILES];
    uint8_t data[TILES][MAX_ROWS][MAX_ROW_BYTES];
} tiles_now;

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
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulate_loadconfig
#define _tile_release emulate_release
#define _tile_zero emulate_zero
#define _tile_loadd emulate_loadd
#define _tile_stored emulate_stored
#define _tile_dpbf16ps emulate_dpbf16ps
