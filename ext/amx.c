/* x86-64 with AMX (Sapphire Rapids and later): as avx512.c, but many tokens are multiplied in tiles.
 *
 * A tile is a register of 16 rows of 64 bytes. One instruction multiplies 16 tokens, 32 inputs of each in bf16, by
 * the same 32 inputs of 16 rows of a weight, and adds to 16 x 16 sums in float32. Its second operand wants two
 * neighbouring inputs of each row side by side and rows next to each other: so lie the lanes of a strip that has
 * just been unpacked. Nothing is transposed but rows of numbers.
 *
 * Rounding both operands to 8 bits leaves an error of 6e-6 of a product's mean square. */
#include "kernels.h"

#if defined(HAVE_AMX)
TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16",
       "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#include "avx512.h"

/* ---- tiles ---- */

enum {
    ROWS = 16,         /* of a tile: tokens, pairs of inputs, sums of a token */
    STEP = 32,         /* inputs that one product of tiles sums up; a block */
    TILE_BYTES = 1024,
    SUM_FLOATS = 256,  /* of a tile of sums */
};

/* All eight tiles are whole ones. Static, since GCC 12 believes that only 8 bytes of it are read. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* GCC doesn't know that loading a tile reads memory: what has been stored must be there by now. */
#define STORED() __asm__ volatile("" ::: "memory")

static long tiles_of(long n) { return (n + ROWS - 1) / ROWS; }
static long steps_of(long n_in) { return (n_in + STEP - 1) / STEP; }

INLINE __mmask16 first_lanes(long n) { return n >= 16 ? 0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }
INLINE __mmask32 first_words(long n) { return n >= 32 ? 0xffffffff : n > 0 ? (1u << n) - 1 : 0; }

/* The first n of 32 numbers as bf16; the others are zeros. */
INLINE __m512i bf16_from_floats(const float *x, long n) {
    __m512 low = _mm512_maskz_loadu_ps(first_lanes(n), x);
    __m512 high = _mm512_maskz_loadu_ps(first_lanes(n - 16), x + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

INLINE __m512i bf16_from_halves(const uint16_t *x, long n) {
    __m512i halves = _mm512_maskz_loadu_epi16(first_words(n), x);
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), low);
}

/* x, and for any NaN one that doesn't become a number where `pair` rounds it up. */
INLINE __m512 plain_nan(__m512 x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_ps(NAN));
}

/* Two numbers of each lane, rounded to bf16, as its low and high half. */
INLINE __m512i pair(__m512 low, __m512 high) {
    const __m512i half = _mm512_set1_epi32(0x8000); /* of the last place that stays */
    __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
    __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, a, b);
}

/* ---- inputs: 16 tokens x 32 inputs a tile ---- */

/* Tiles of tokens that are multiplied in one go, steps of a chunk, strips of a panel. For 512 tokens the sums of a
 * panel are 512 KB and so are the inputs of a chunk: both stay in the second-level cache, while the next chunk's
 * come. A chunk of a strip is 32 KB and stays in the first-level cache, since tiles of inputs are loaded with the hint
 * not to put them there. Shorter chunks would move sums more often than the second-level cache can take beside the
 * inputs. */
enum { TOGETHER_TILES = 32, CHUNK = 16, PANEL = 8, FITS = 1 << 20 };

/* Where a tile of inputs lies: chunks follow each other, in a chunk tokens, of 16 tokens the steps. */
static size_t input_tile(long n_tokens, long n_steps, long tile, long step) {
    long first = tile - tile % TOGETHER_TILES, tiles = smaller(tiles_of(n_tokens) - first, TOGETHER_TILES);
    long chunk = step - step % CHUNK, steps = smaller(n_steps - chunk, CHUNK);
    return (size_t)(first * n_steps + tiles * chunk + (tile - first) * steps + step - chunk) * TILE_BYTES;
}

static size_t inputs_bytes(long n_tokens, long n_in) {
    return (size_t)(tiles_of(n_tokens) * steps_of(n_in)) * TILE_BYTES;
}

/* A tile after the other, each written from front to back. */
static void pack_inputs(const float *x, long n_tokens, long n_in, long first, long last, void *inputs) {
    for (long tile = first / ROWS; tile < tiles_of(last); tile++)
        for (long step = 0; step < steps_of(n_in); step++) {
            uint8_t *to = (uint8_t *)inputs + input_tile(n_tokens, steps_of(n_in), tile, step);
            for (long t = tile * ROWS; t < (tile + 1) * ROWS; t++, to += 64) {
                long n = t < last ? n_in - step * STEP : 0;
                _mm512_store_si512(to, bf16_from_floats(x + t * n_in + step * STEP, n));
            }
        }
}

/* ---- weights: [32 / 2 pairs of inputs][16 rows][2] a tile, two of them a step of a strip ---- */

/* Bits 8..15 of each lane of q, as d * q + c. In the middle of a float of the size of 2^15 they are 2^15 + q. */
INLINE __m512 number(__m512i q, __m512 d, __m512 c) {
    const __m512i field = _mm512_set1_epi32(0xff00), power = _mm512_set1_epi32(0x47000000);
    __m512i bits = _mm512_ternarylogic_epi32(q, field, power, 0xea); /* (q & field) | power */
    return _mm512_fmadd_ps(_mm512_castsi512_ps(bits), d, c);
}

/* Four bytes of each lane become two rows of a tile. */
INLINE void two_pairs(__m512i q, __m512 d, __m512 c, uint8_t *to) {
    __m512 first = number(_mm512_slli_epi32(q, 8), d, c), second = number(q, d, c);
    __m512 third = number(_mm512_srli_epi32(q, 8), d, c), fourth = number(_mm512_srli_epi32(q, 16), d, c);
    _mm512_store_si512(to, pair(first, second));
    _mm512_store_si512(to + 64, pair(third, fourth));
}

INLINE void numbers_of_block(const weight_type type, const uint8_t *block, const uint8_t *head, int side,
                             const __m512 factor, uint8_t *to) {
    const __m512 shift = _mm512_set1_ps((float)(0x8000 + zero_of(type)));
    const scales s = scales_of(type, block, head, side);
    UNROLL
    for (int r = 0; r < 8; r++) {
        const int part = has_halves(type) ? r % 2 : 0;
        const __m512 d = plain_nan(_mm512_mul_ps(s.d[part], factor));
        const __m512 m = has_minimum(type) ? plain_nan(_mm512_mul_ps(s.m[part], factor)) : s.m[part];
        const __m512 c = _mm512_fnmadd_ps(d, shift, m); /* m - (2^15 + zero) d */
        two_pairs(unpack(type, block, r, side), d, c, to + 128 * (r % 2 * 4 + r / 2));
    }
}

INLINE void numbers_of_blocks(const weight_type type, const weight *w, long strip, long step, int side, uint8_t *to) {
    const layout at = layout_of(type);
    const uint8_t *data = w->data + strip * w->strip_bytes;
    const uint8_t *block = data + block_place(at, step), *head = data + head_place(at, step);
    numbers_of_block(type, block, head, side, _mm512_set1_ps(w->factor), to);
}

/* 16 rows of numbers from `row` on; behind the last they repeat it. A pair is to v_transpose what a float is. */
INLINE void numbers_of_rows(const weight_type type, const weight *w, long row, long first, uint8_t *to) {
    float pairs[ROWS * ROWS];
    for (long r = 0; r < ROWS; r++) {
        const uint8_t *data = w->data + smaller(row + r, w->n_out - 1) * w->row_bytes;
        const uint16_t *words = (const uint16_t *)data + first;
        __m512i numbers = type == F32   ? bf16_from_floats((const float *)data + first, w->n_in - first)
                          : type == F16 ? bf16_from_halves(words, w->n_in - first)
                                        : _mm512_maskz_loadu_epi16(first_words(w->n_in - first), words);
        _mm512_storeu_si512(pairs + r * ROWS, numbers);
    }
    v_transpose(pairs, ROWS, (float *)to, ROWS);
}

/* Rows 0-15 of a strip or, side 1, the others, of one step. */
static void make_numbers(const weight *w, long strip, long step, int side, uint8_t *to) {
#define NUMBERS_CASE(id, ...) case id: numbers_of_rows(id, w, strip * STRIP + side * ROWS, step * STEP, to); break;
#define BLOCK_CASE(id, ...) case id: numbers_of_blocks(id, w, strip, step, side, to); break;
    switch (w->type) { /* each with its type known to the compiler */
        NUMBER_TYPES(NUMBERS_CASE)
        BLOCK_TYPES(BLOCK_CASE)
    default: break;
    }
}

/* Asks for what make_numbers will read. */
static void ask_for_step(const weight *w, long strip, long step) {
    if (has_blocks(w->type)) {
        const uint8_t *block = w->data + strip * w->strip_bytes + block_place(w->at, step);
        for (long at = 0; at < w->at.block_bytes; at += 64) __builtin_prefetch(block + at);
        return;
    }
    long at = step * STEP * (w->type == F32 ? 4 : 2);
    for (long row = strip * STRIP; row < smaller((strip + 1) * STRIP, w->n_out); row++)
        __builtin_prefetch(w->data + row * w->row_bytes + at);
}

/* ---- products ---- */

/* Chunks of strips in the order in which they are multiplied: one chunk of each strip, then the next of each.
 * While one is multiplied, the numbers of the one behind it are made in passing, and the one behind that is asked
 * for. */
typedef struct {
    const weight *w;
    const uint8_t *inputs; /* of these tokens */
    long n_tokens, n_tiles, n_steps;
    long first, n_strips, n_chunks;
    uint8_t *numbers[2];
    float *sums; /* of each strip, of each 16 tokens: [2][16, 16] */
} panel;

static long chunk_of(const panel *p, long i) { return i / p->n_strips * CHUNK; }
static long strip_of(const panel *p, long i) { return p->first + i % p->n_strips; }
static long chunk_steps(const panel *p, long i) {
    return i < p->n_chunks * p->n_strips ? smaller(p->n_steps - chunk_of(p, i), CHUNK) : 0;
}

/* What else happens while chunk i - 1 is multiplied, a little in each step of it. Products take tiles and making takes
 * vectors: the smaller the pieces, the better they overlap. */
typedef struct {
    const panel *p;
    long i, turns;         /* chunk i is made in so many turns */
    long sides, behind;    /* tiles of 16 rows to be made; to be asked for, of the chunk behind it */
    long made, due;        /* those that are; sides x turns so far - made x turns */
    const uint8_t *inputs; /* of the next chunk, which all strips will read from the second-level cache: this strip's */
    const uint8_t *end;    /* share of asking for them */
    long lines;            /* of them in a turn */
    float *results;        /* of the next tokens, if these products are the last: where so many lie, so far apart */
    long n_results, stride;
} aside;

static aside begin_aside(const panel *p, long i, long turns) {
    aside a = {.p = p, .i = i, .turns = turns, .sides = 2 * chunk_steps(p, i), .behind = 2 * chunk_steps(p, i + 1)};
    long chunk = chunk_of(p, i - 1) + CHUNK, steps = smaller(p->n_steps - chunk, CHUNK), share = (i - 1) % p->n_strips;
    if (p->n_strips == 1 || steps <= 0) return a;
    long bytes = p->n_tiles * steps * TILE_BYTES;
    const uint8_t *first = p->inputs + p->n_tiles * chunk * TILE_BYTES;
    a.inputs = first + bytes * share / p->n_strips, a.end = first + bytes * (share + 1) / p->n_strips;
    a.lines = (a.end - a.inputs) / 64 / turns + 1;
    return a;
}

static void make_some(aside *a) {
    const panel *p = a->p;
    for (a->due += a->sides; a->due >= a->turns; a->due -= a->turns, a->made++) {
        long step = a->made / 2, side = a->made % 2;
        if (!side && a->made < a->behind) ask_for_step(p->w, strip_of(p, a->i + 1), chunk_of(p, a->i + 1) + step);
        make_numbers(p->w, strip_of(p, a->i), chunk_of(p, a->i) + step, (int)side,
                     p->numbers[a->i % 2] + a->made * TILE_BYTES);
    }
}

static void ask_for_some(aside *a) {
    for (long n = 0; n < a->lines && a->inputs < a->end; n++, a->inputs += 64) __builtin_prefetch(a->inputs, 0, 2);
    for (long n = 0; n < 2 && a->n_results; n++, a->n_results--, a->results += a->stride) {
        __builtin_prefetch(a->results, 1);
        __builtin_prefetch(a->results + ROWS, 1);
    }
}

/* Where tiles of sums go, and the distance of their rows in bytes. */
typedef struct {
    float *at[4];
    long stride;
} four_tiles;

static four_tiles tiles_at(float *sums) {
    return (four_tiles){{sums, sums + SUM_FLOATS, sums + 2 * SUM_FLOATS, sums + 3 * SUM_FLOATS}, 64};
}

/* to = 16 or 32 tokens x a strip, added to sums if there are any. Tiles 0-3: sums of the first 16 tokens, rows 0-15 and
 * 16-31, and of the others; 4, 5: the tokens; 6, 7: the rows. Four independent sums hide the 52 cycles that a product
 * takes. What is to be done meanwhile is done in between. */
INLINE void multiply_tiles(const int both, long steps, const uint8_t *tokens, const uint8_t *rows, const float *sums,
                           four_tiles to, aside *meanwhile) {
    const uint8_t *others = tokens + steps * TILE_BYTES;
    STORED();
    if (sums) {
        _tile_stream_loadd(0, sums, 64);
        _tile_stream_loadd(1, sums + SUM_FLOATS, 64);
        if (both) _tile_stream_loadd(2, sums + 2 * SUM_FLOATS, 64);
        if (both) _tile_stream_loadd(3, sums + 3 * SUM_FLOATS, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (both) _tile_zero(2);
        if (both) _tile_zero(3);
    }
    for (long s = 0; s < steps; s++) {
        if (meanwhile) make_some(meanwhile);
        if (meanwhile) ask_for_some(meanwhile);
        _tile_loadd(6, rows + s * 2 * TILE_BYTES, 64);
        _tile_stream_loadd(4, tokens + s * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, rows + (s * 2 + 1) * TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (both) _tile_stream_loadd(5, others + s * TILE_BYTES, 64);
        if (both) _tile_dpbf16ps(2, 5, 6);
        if (both) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to.at[0], to.stride);
    _tile_stored(1, to.at[1], to.stride);
    if (both) _tile_stored(2, to.at[2], to.stride);
    if (both) _tile_stored(3, to.at[3], to.stride);
}

/* All eight tiles once, with whole numbers, whose sums are exact. The tests may have run on emulated tiles alone; a
 * processor on which this differs is not trusted with the rest. */
int tiles_are_right(void) {
    union { float value; uint32_t word; } token, row;
    uint16_t tokens[2 * ROWS][STEP], rows[2][STEP / 2][ROWS][2]; /* the upper halves of floats are bf16 */
    float sums[2][2][ROWS][ROWS], expected[2][2][ROWS][ROWS];
    for (int t = 0; t < 2 * ROWS; t++)
        for (int r = 0; r < 2 * ROWS; r++) {
            float sum = sums[t / ROWS][r / ROWS][t % ROWS][r % ROWS] = (float)(t - 2 * r);
            for (int k = 0; k < STEP; k++) {
                token.value = (float)((3 * t + 5 * k) % 17 - 8), row.value = (float)((7 * r + 3 * k) % 19 - 9);
                tokens[t][k] = (uint16_t)(token.word >> 16);
                rows[r / ROWS][k / 2][r % ROWS][k % 2] = (uint16_t)(row.word >> 16);
                sum += token.value * row.value;
            }
            expected[t / ROWS][r / ROWS][t % ROWS][r % ROWS] = sum;
        }
    _tile_loadconfig(&whole_tiles);
    multiply_tiles(1, 1, (uint8_t *)tokens, (uint8_t *)rows, sums[0][0][0], tiles_at(sums[0][0][0]), NULL);
    _tile_release();
    return !memcmp(sums, expected, sizeof sums);
}

static void put_sums(const float *sums, long n_tokens, long n_rows, float *out, long stride) {
    for (long t = 0; t < n_tokens; t++) {
        const float *from = sums + t / ROWS * 2 * SUM_FLOATS + t % ROWS * ROWS;
        _mm512_mask_storeu_ps(out + t * stride, first_lanes(n_rows), _mm512_loadu_ps(from));
        _mm512_mask_storeu_ps(out + t * stride + 16, first_lanes(n_rows - 16), _mm512_loadu_ps(from + SUM_FLOATS));
    }
}

/* Chunk i times all tokens, 32 at a time. Whole tiles of results go to `out` at once. */
static void multiply_chunk(const panel *p, long i, float *out, long stride) {
    long chunk = chunk_of(p, i), steps = chunk_steps(p, i), pairs = (p->n_tiles + 1) / 2;
    long strip = strip_of(p, i), n_rows = smaller(p->w->n_out - strip * STRIP, STRIP);
    int last = chunk + CHUNK >= p->n_steps;
    aside next = begin_aside(p, i + 1, pairs * steps);
    for (long n = 0; n < pairs; n++) {
        long n_tokens = smaller(p->n_tokens - 2 * n * ROWS, 2 * ROWS);
        const uint8_t *tokens = p->inputs + (p->n_tiles * chunk + 2 * n * steps) * TILE_BYTES;
        float *sums = p->sums + (i % p->n_strips * p->n_tiles + 2 * n) * 2 * SUM_FLOATS;
        float *results = out + 2 * n * ROWS * stride + strip * STRIP, *others = results + ROWS * stride;
        four_tiles to = tiles_at(sums);
        next.results = results + 2 * ROWS * stride, next.stride = stride;
        next.n_results = last && n + 1 < pairs ? smaller(p->n_tokens - 2 * (n + 1) * ROWS, 2 * ROWS) : 0;
        int whole = last && n_rows == STRIP && n_tokens % ROWS == 0;
        if (whole) to = (four_tiles){{results, results + ROWS, others, others + ROWS}, 4 * stride};
        if (2 * n + 1 < p->n_tiles)
            multiply_tiles(1, steps, tokens, p->numbers[i % 2], chunk ? sums : NULL, to, &next);
        else
            multiply_tiles(0, steps, tokens, p->numbers[i % 2], chunk ? sums : NULL, to, &next);
        if (last && !whole) put_sums(sums, n_tokens, n_rows, results, stride);
    }
}

static size_t panel_scratch(long n_tokens, long n_in) {
    (void)n_in;
    long tiles = smaller(tiles_of(n_tokens), TOGETHER_TILES);
    return (size_t)(2 * 2 * CHUNK + PANEL * 2 * tiles) * TILE_BYTES;
}

/* Where the inputs fit into the second-level cache, strips follow each other as they lie in memory. */
static void multiply_panel_of_strips(const weight *w, const void *inputs, long n_tokens, long first, long last,
                                     float *out, long stride, void *scratch) {
    enum { TOKENS = TOGETHER_TILES * ROWS };
    long n_steps = steps_of(w->n_in), n_chunks = (n_steps + CHUNK - 1) / CHUNK;
    uint8_t *numbers = scratch, *sums = numbers + 2 * 2 * CHUNK * TILE_BYTES;
    int fits = inputs_bytes(smaller(n_tokens, TOKENS), w->n_in) <= FITS;
    _tile_loadconfig(&whole_tiles);
    for (long token = 0; token < n_tokens; token += TOKENS)
        for (long strip = first; strip < last; strip += fits ? 1 : last - first) {
            panel p = {w, (const uint8_t *)inputs + input_tile(n_tokens, n_steps, token / ROWS, 0),
                       smaller(n_tokens - token, TOKENS), 0, n_steps, strip, fits ? 1 : last - first, n_chunks,
                       {numbers, numbers + 2 * CHUNK * TILE_BYTES}, (float *)sums};
            p.n_tiles = tiles_of(p.n_tokens);
            aside all = {.p = &p, .turns = 1, .sides = 2 * chunk_steps(&p, 0), .behind = 2 * chunk_steps(&p, 1)};
            make_some(&all);
            for (long i = 0; i < p.n_chunks * p.n_strips; i++)
                multiply_chunk(&p, i, out + token * stride, stride);
        }
    _tile_release();
}

#include "amx_attention.h"

/* FEW tokens are multiplied one by one or side by side with the same result, which these sums wouldn't give. */
static const panel_kernels panels = {
    FEW + 1, PANEL, ROWS, inputs_bytes, pack_inputs, panel_scratch, multiply_panel_of_strips,
};

static double multiply_registers(long rounds, float *sink) {
    float sums[SUM_FLOATS] = {0};
    _tile_loadconfig(&whole_tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(6);
    for (long n = 0; n < rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_release();
    *sink += sums[0];
    return (double)rounds * 4 * ROWS * ROWS * STEP;
}

LEVEL(amx, 6, 4, avx512_multiply_blocks, attend_in_tiles, &panels)
TARGET_END
#endif
