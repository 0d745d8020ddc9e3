/* What the files of this folder share: the layout of prepared weights, the table of kernels that each
 * instruction set fills, and the pool. README.md has the map and the drawing.
 *
 * Axis names are those of tinyllama/config.py. A weight [n_out, n_in] computes x @ weight.T. */
#ifndef TINYLLAMA_KERNELS_H
#define TINYLLAMA_KERNELS_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    BLOCK = 32,        /* weights that share a scale */
    SUPER = 8,         /* blocks of a super-block, which share the scale of their scales */
    STRIP = 32,        /* rows of a weight that lie, and are multiplied, side by side */
    MAX_THREADS = 256,
    MAX_HEAD_DIM = 256,
    MAX_SHARED = 64,   /* query heads that share a key/value head */
    SPAN = 256,        /* positions of the KV cache that one piece of decoding attends to */
    TILE_ROWS = 256,   /* rows, (token, query head) pairs, that one piece of prefill attention handles, at most */
    SCORES = 64,       /* positions that these meet at a time */
    FEW = 16,          /* tokens at once up to which each gets the bits that it gets alone */
};

#define INLINE static inline __attribute__((always_inline))

/* The instructions that everything up to TARGET_END may use, as clang and as GCC name them. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET(for_clang, for_gcc) PRAGMA(clang attribute push(__attribute__((target(for_clang))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define TARGET(for_clang, for_gcc) PRAGMA(GCC target(for_gcc))
#define TARGET_END
#endif

/* Before a loop of a known, small number of steps: sums in registers need it written out. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Between sums of some rows and of others: GCC would mix them and put half of what they need aside on the stack. */
#if defined(__clang__)
#define IN_ORDER (void)0
#else
#define IN_ORDER __asm__ volatile("" ::: "memory")
#endif

/* ---- weights (weights.c, pack.c) ---- */

/* Every type of weights, once. Files hold all of them (quant.py says what their numbers mean); kernels multiply by the
 * first three lists, and the last is prepared as one of these when it is loaded.
 *
 *       id                  name                prepared as
 *                                                       block: weights, bytes
 *                                                                quants: bits, zero, has a minimum
 *                                                                          scales: bytes, those of a row first,
 *                                                                          weights that share one
 *                                                                                     where in a super-block: d,
 *                                                                                     small scales, high bits, quants */
#define NUMBER_TYPES(T)                                                                                   \
    T(F32,                "f32",              F32,      1,   4,   0,   0, 0,   0, 0,  0,    0,   0,   0,  0) \
    T(F16,                "f16",              F16,      1,   2,   0,   0, 0,   0, 0,  0,    0,   0,   0,  0) \
    T(BF16,               "bf16",             BF16,     1,   2,   0,   0, 0,   0, 0,  0,    0,   0,   0,  0)
#define PLAIN_TYPES(T)                                                                                    \
    T(Q4_0,               "q4_0",             Q4_0,    32,  18,   4,   8, 0,   2, 0, 32,    0,   0,   0,  0) \
    T(Q4_1,               "q4_1",             Q4_1,    32,  20,   4,   0, 1,   2, 0, 32,    0,   0,   0,  0) \
    T(Q5_0,               "q5_0",             Q5_0,    32,  22,   5,  16, 0,   2, 0, 32,    0,   0,   0,  0) \
    T(Q5_1,               "q5_1",             Q5_1,    32,  24,   5,   0, 1,   2, 0, 32,    0,   0,   0,  0) \
    T(Q8_0,               "q8_0",             Q8_0,    32,  34,   8, 128, 0,   2, 0, 32,    0,   0,   0,  0)
#define K_TYPES(T)                                                                                        \
    T(Q2_K,               "q2_k",             Q2_K,   256,  84,   2,   0, 1,   2, 0, 16,   80,   0,   0, 16) \
    T(Q3_K,               "q3_k",             Q3_K,   256, 110,   3,   4, 0,   2, 0, 16,  108,  96,   0, 32) \
    T(Q4_K,               "q4_k",             Q4_K,   256, 144,   4,   0, 1,   2, 0, 32,    0,   4,   0, 16) \
    T(Q5_K,               "q5_k",             Q5_K,   256, 176,   5,   0, 1,   2, 0, 32,    0,   4,  16, 48) \
    T(Q6_K,               "q6_k",             Q6_K,   256, 210,   6,  32, 0,   2, 0, 16,  208, 192, 128,  0) \
    T(IQ4_NL,             "iq4_nl",           IQ4_NL,  32,  18,   4, 128, 0,   2, 0, 32,    0,   0,   0,  0) \
    T(IQ4_XS,             "iq4_xs",           IQ4_XS, 256, 136,   4, 128, 0,   2, 0, 32,    0,   4,   0,  8)
#define FILE_TYPES(T)                                                                                     \
    T(Q4_0_2023,          "q4_0_2023",        Q4_0,    32,  20,   4,   8, 0,   4, 0, 32,    0,   0,   0,  0) \
    T(Q4_0_2023_PLANAR,   "q4_0_2023_planar", Q4_0,    32,  20,   4,   8, 0,   4, 1, 32,    0,   0,   0,  0) \
    T(Q4_1_2023,          "q4_1_2023",        Q4_1,    32,  24,   4,   0, 1,   4, 1, 32,    0,   0,   0,  0)
#define BLOCK_TYPES(T) PLAIN_TYPES(T) K_TYPES(T)
#define TYPES(T) NUMBER_TYPES(T) BLOCK_TYPES(T) FILE_TYPES(T)

#define ID(id, ...) id,
typedef enum { TYPES(ID) N_TYPES } weight_type;
#undef ID

#define FACTS(id, ...) [id] = {__VA_ARGS__},
static const struct {
    const char *name;
    weight_type prepared;
    int block, bytes, bits, zero, has_minimum, scale_bytes, planar, shared, d, scales, high, q;
} types[N_TYPES] = {TYPES(FACTS)};
#undef FACTS

/* Of a compile-time constant these are constants too. `zero` is what is subtracted from unsigned quants. */
static inline int zero_of(weight_type type) { return types[type].zero; }
static inline int has_minimum(weight_type type) { return types[type].has_minimum; }
static inline int has_fifth_bits(weight_type type) { return types[type].bits == 5; }
static inline int has_blocks(weight_type type) { return types[type].block > 1; }
static inline int has_super_blocks(weight_type type) { return types[type].block == SUPER * BLOCK; }
static inline int has_halves(weight_type type) { return types[type].shared == BLOCK / 2; } /* with scales of their own */
static inline int has_table(weight_type type) { return type == IQ4_NL || type == IQ4_XS; }
static inline int low_bits(weight_type type) { /* that lie together: 2, 4 or 8 */
    return types[type].bits > 4 && types[type].bits < 8 ? 4 : types[type].bits & -2;
}
static inline int high_bits(weight_type type) { return types[type].bits - low_bits(type); }
static inline long file_row_bytes(weight_type type, long n_cols) { return n_cols / types[type].block * types[type].bytes; }

/* Where the parts of a block of 32 rows start, in bytes: minima, high and low bits; its size; the size of what lies in front
 * of a super-block. Constants where the type is one. README.md draws it, and so does `weight`. */
typedef struct {
    long m, high, low, block_bytes, head_bytes;
} layout;
INLINE layout layout_of(const weight_type type) {
    const int super = has_super_blocks(type), minimum = has_minimum(type) && type != Q2_K; /* whose lie beside scales */
    layout at = {.m = STRIP * (super ? BLOCK / types[type].shared : 2)};
    at.high = at.m + (minimum ? at.m : 0);
    at.low = at.high + STRIP * BLOCK / 8 * high_bits(type);
    at.block_bytes = at.low + STRIP * BLOCK / 8 * low_bits(type);
    at.head_bytes = super ? 2 * STRIP * (1 + has_minimum(type)) : 0;
    return at;
}

/* What the nibbles of iq4_nl and iq4_xs stand for. */
static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Where the pieces of block i lie in a file's row of n_blocks, unless it is a part of a super-block; m and fifth bits of
 * types that have them. */
typedef struct {
    long d, m, fifth, q;
} places;
INLINE places places_of(const weight_type type, long n_blocks, long i) {
    const long scale = types[type].scale_bytes, scales = scale * (1 + has_minimum(type)), at = i * types[type].bytes;
    if (types[type].planar)
        return (places){scales * n_blocks - scale * (n_blocks - i), scale * i, 0, scales * n_blocks + BLOCK / 2 * i};
    return (places){at, at + scale, at + scales, at + scales + 4 * has_fifth_bits(type)};
}

/* Blocks as a file holds them. */
typedef struct {
    weight_type type;
    long n_rows, n_cols;
    const uint8_t *data;
} file_blocks;

/* Blocks whose first row and column are those of a weight. */
typedef struct {
    file_blocks blocks;
    long row, col;
} piece;

/* A prepared weight. Rows of numbers follow each other as in the file. Blocks come in strips of 32 rows, and in
 * a strip one block of every row after the other, so that a strip is read from front to back and lanes of a
 * vector are rows. README.md draws it. Of each block of 32 rows there are
 *
 *     scales   [32] f16                 or, of a super-block's blocks,
 *              [32] int8                or, where each half of a block has its own,
 *              [32][2] int8             of q2_k: in the low nibbles, and in the high ones the minima
 *     minima   [32] f16 or int8         of q4_1 and q5_1; of q4_k and q5_k
 *     high     [bits][32][4] bytes      of types of 3, 5 and 6 bits: the upper one or two
 *     low      [bits][32][4] bytes      the others: 2, 4 or 8
 *
 * and in front of each 8 blocks that are a super-block
 *
 *     scales   [32] f16                 times the int8 ones
 *     minima   [32] f16                 the same, negated, of q2_k, q4_k and q5_k
 *
 * Fours of neighbouring elements have numbers: four 2k is elements 4k..4k+3, four 2k + 1 elements 16 + those. Of a row,
 * four bytes hold 8 / bits fours of `bits` bits, the first in the lowest bits, and its next four bytes the next ones. So
 * nibbles are quarters of the block, the high ones 16 elements behind the low ones.
 *
 * Quants are unsigned here: value = factor * (d * (q - zero) + m). Nibbles that stand for others are what the file has.
 * Rows missing in the last strip are zeros.
 *
 * A mapped weight has no data: it lies in its file, as pieces, and a strip of it is packed when it is needed. */
typedef struct {
    weight_type type;
    long n_out, n_in;
    long row_bytes;               /* of numbers */
    long n_blocks, n_strips;      /* a row's; all */
    layout at;
    long strip_bytes;
    float factor;                 /* a power of two, so that scales that were float32 fit into f16 */
    uint8_t *data;                /* SLACK bytes behind the last row can be read; NULL: mapped */
    const piece *pieces;
    long n_pieces;
} weight;

enum { SLACK = 256 };

/* Fills in everything but data, for rows of n_in weights. */
void weight_layout(weight *w, weight_type type, long n_out, long n_in);
size_t weight_bytes(const weight *w);
size_t strips_bytes(const weight *w, long n); /* of n of its strips and SLACK, rounded to cache lines */

/* Memory for weights: zeros, in huge pages where the system has them, since reading through gigabytes by 4 KB pages
 * would cost a tenth of the speed. Small weights share a slab, which lives for as long as one of them does. Python's
 * lock guards these. NULL where the system gives none. */
typedef struct slab slab;
slab *take_memory(size_t n_bytes, uint8_t **memory); /* on a cache line */
void return_memory(slab *slab);

/* Puts rows first..last-1 of the file's blocks to (row + i, col) of a weight. No two threads may put rows into
 * the same strip. */
void pack_rows(const file_blocks *from, const weight *to, long row, long col, long first, long last);

/* Rows first..last-1 of a mapped weight as a weight of their own: packed into `memory`, which has room for their
 * strips, or, if they are numbers and lie in the file in the same way, there. */
weight rows_of(const weight *w, long first, long last, uint8_t *memory);

/* One row of a prepared weight as float32, out[n_in]. */
void unpack_row(const weight *w, long row, float *out);

/* Where in a strip a block begins, and what is in front of the super-block that it belongs to. */
INLINE long block_place(const layout at, long block) { return block * at.block_bytes + (block / SUPER + 1) * at.head_bytes; }
INLINE long head_place(const layout at, long block) { return block / SUPER * (SUPER * at.block_bytes + at.head_bytes); }

/* One block of one row. */
typedef struct {
    uint8_t q[BLOCK];  /* unsigned, what nibbles stand for plus zero */
    float d[2], m[2];  /* of each half, without the weight's factor */
} plain_block;
plain_block unpack_block(const weight *w, long row, long block);

float f32_from_f16(uint16_t half);
uint16_t f16_from_f32(float value);

/* Numbers at any address. */
static inline uint16_t read_u16(const uint8_t *p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}
static inline int32_t read_i32(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}
static inline float read_f32(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}
static inline void write_u16(uint8_t *p, uint16_t x) { memcpy(p, &x, 2); }

/* ---- activations ---- */

/* Inputs as int8, quantized once for all weights that share them, in tiles of one or several tokens: all the
 * numbers of a tile of n tokens that meet one block of weights lie side by side, as a tile_block
 *
 *     q          [32 / run][n][run] int8    `run` neighbouring elements of each token (4 or 8)
 *     scale      [n] float                  x = scale * q
 *     minus_sum  [n] float                  of the 32 q
 *     offset     [n] float                  scale * minus_sum, for minima
 *     halves     [n][2] int16               minus the sum of the first 16 q, and of the last
 *     number     int32                      which block of the weights
 *
 * A few inputs of a model are far larger than the rest and make their blocks coarse. So blocks that are much coarser than
 * others of the same token are refined: what rounding left is quantized too, as a second tile_block for the same block of
 * weights. Where another token of the tile has no rest, it has zeros, which add nothing: the result of a token
 * doesn't depend on those beside it. */
typedef struct {
    long first, n_tokens; /* which tokens */
    long n;               /* as the tile is laid out: n_tokens, or one more, a token of zeros */
    uint8_t *blocks;
    long n_blocks;
    int turn, turns;      /* which tile this is of how many */
} token_tile;

typedef struct {
    long n_tokens, n_in, n_tiles;
    token_tile *tiles;
} activations;

INLINE size_t tile_block_bytes(long n) { return (size_t)(48 * n + 4 + 15) / 16 * 16; }
INLINE uint8_t *scale_at(const uint8_t *x, long n, long t) { return (uint8_t *)x + 32 * n + 4 * t; }
INLINE uint8_t *minus_sum_at(const uint8_t *x, long n, long t) { return (uint8_t *)x + 36 * n + 4 * t; }
INLINE uint8_t *offset_at(const uint8_t *x, long n, long t) { return (uint8_t *)x + 40 * n + 4 * t; }
INLINE uint8_t *minus_halves_at(const uint8_t *x, long n, long t) { return (uint8_t *)x + 44 * n + 4 * t; }
INLINE uint8_t *number_at(const uint8_t *x, long n) { return (uint8_t *)x + 48 * n; }

/* One token's blocks on their way into a tile. */
typedef struct {
    int8_t q[BLOCK];
    float scale;
    int32_t half, sum; /* of the first 16 q; of all */
} input_block;

static const float REST = 254; /* what rounding leaves is at most half a unit of q: 127 / 254 */

/* top / x for x >= 0, what numbers up to x are multiplied by to become steps up to top. 0 where that is infinite: the
 * numbers are as good as zeros. 0 also where x isn't finite: steps are zeros, and x as their scale makes NaN of them. */
INLINE float finite_inverse(float top, float x) {
    float inverse = top / x;
    return inverse <= FLT_MAX ? inverse : 0;
}

/* ---- one instruction set's kernels ---- */

/* Heads of one sequence. q, out: [n_tokens, n_heads, head_dim]; keys, values: [n_kv_heads, n_ctx, head_dim]
 * in f16, in which this call's n_tokens are already stored from pos on. */
typedef struct {
    const float *q;
    const uint16_t *keys, *values;
    float *out;
    long n_tokens, n_heads, n_kv_heads, head_dim, n_ctx, pos;
    long window; /* positions that a query attends to, its own the last: at least 1, at most pos + n_tokens */
} heads;

static inline long shared_by(const heads *h) { return h->n_heads / h->n_kv_heads; }

/* The first position that a token of these attends to. */
static inline long first_seen(const heads *h, long token) {
    long first = h->pos + token + 1 - h->window;
    return first > 0 ? first : 0;
}

/* Positions first..last-1; none where last <= first. */
typedef struct {
    long first, last;
} positions;

/* The span'th SPAN positions that a token attends to. */
static inline positions span_of(const heads *h, long token, long span) {
    long first = first_seen(h, token) + span * SPAN, last = h->pos + token + 1;
    return (positions){first, last < first + SPAN ? last : first + SPAN};
}

/* Products of many tokens, for a level that has a faster way once numbers have been made of the weights: a panel
 * of strips becomes numbers once, and is multiplied by all tokens. What a row becomes may not depend on the
 * rows beside it, since how many strips a panel has is up to the caller. Any type of weight. */
typedef struct {
    long from_tokens;    /* fewer go to multiply_blocks and multiply_floats */
    long panel_strips;   /* that multiply takes, at most */
    long packed_tokens;  /* that pack_inputs wants together */
    /* Room for the inputs of all weights in the form that multiply reads. NULL, as pack_inputs: it reads x. */
    size_t (*inputs_bytes)(long n_tokens, long n_in);
    /* Tokens first..last-1 of x [n_tokens, n_in]. */
    void (*pack_inputs)(const float *x, long n_tokens, long n_in, long first, long last, void *inputs);
    size_t (*scratch_bytes)(long n_tokens, long n_in); /* of one thread */
    /* out[t * stride + row] for all tokens and the rows of strips first..last-1. Both buffers begin on a cache line. */
    void (*multiply)(const weight *w, const void *inputs, long n_tokens, long first, long last, float *out,
                     long stride, void *scratch);
} panel_kernels;

typedef struct {
    const char *name;
    long tile_tokens; /* that multiply_blocks takes at once, at most */
    long run;         /* of a token's elements in a tile; of 8, tiles have an even number of tokens, or one */
    void (*quantize)(const float *x, long n_blocks, input_block *out);
    /* What `of` has left of x, in units of its scale / REST. */
    void (*refine)(const float *x, const input_block *of, input_block *out);
    /* out[t * stride + row] for all tokens and the rows of a strip. */
    void (*multiply_blocks)(const weight *w, const activations *acts, long strip, float *out, long stride);
    /* The same for rows first..last-1, last - first <= STRIP. `scratch` has scratch_bytes() of room. */
    void (*multiply_floats)(const weight *w, const float *x, long n_tokens, long first, long last, float *out,
                            long stride, void *scratch);
    void (*rms_norm)(const float *x, const float *scale, float eps, long dim, float *out);
    void (*swiglu)(const float *gate, const float *up, long n, float *out);
    /* freqs: [head_dim / 2] pairs of cos and sin. */
    void (*rope)(const float *x, const float *freqs, long n_heads, long head_dim, float *out);
    void (*to_f16)(const float *x, long n, uint16_t *out);
    /* Numbers (f32, f16 or bf16) as numbers or blocks of another type. -1 where one is NaN or too large for it.
     * importance: [n_cols], how much errors in a column count; or NULL. */
    int (*cast)(const file_blocks *from, weight_type to, const float *importance, uint8_t *out);
    /* Up to FEW tokens, the query heads of one key/value head, the span'th SPAN positions that each token sees: for
     * each row, the query heads of one token after those of another, its highest score, the sum of e^(score -
     * highest), and the values weighted by it. Nothing for rows that see none. */
    void (*attend_span)(const heads *h, long kv_head, long span, float *highest, float *sum, float *values);
    /* More tokens: those from first to last - 1, at most TILE_ROWS rows, all positions they see. */
    void (*attend_tile)(const heads *h, long kv_head, long first, long last, void *scratch);
    /* Multiplies registers of small integers `rounds` times and returns how many products that were: the
     * speed that prefill can't exceed. `sink` takes the sum, so that none can be left out. */
    double (*multiply_registers)(long rounds, float *sink);
    const panel_kernels *panels; /* or NULL */
} kernels;

/* multiply_blocks of levels that others share it with. */
void avx512_multiply_blocks(const weight *w, const activations *acts, long strip, float *out, long stride);
void dotprod_multiply_tile(const weight *w, const token_tile *x, long strip, float *out, long stride);
void dotprod_multiply_blocks(const weight *w, const activations *acts, long strip, float *out, long stride);

/* What each level's file ends with: its table, of what generic.h, cast.h, blocks.h and the file itself define under the
 * kernels' names. */
#define LEVEL(name, tile_tokens, run, multiply_blocks, attend_tile, panels)                                  \
    const kernels name##_kernels = {                                                                          \
        #name, tile_tokens, run, quantize, refine, multiply_blocks, multiply_floats, rms_norm_one, swiglu_run, \
        rope_one, to_f16, cast, attend_span, attend_tile, multiply_registers, panels,                         \
    };

/* Room that a thread needs for any kernel above. */
size_t scratch_bytes(void);

extern const kernels ref_kernels;
extern const kernels avx2_kernels, avx512_kernels, amx_kernels;
extern const kernels neon_kernels, dotprod_kernels, i8mm_kernels, accelerate_kernels;

/* Compilers know AMX since GCC 11 and clang 11. */
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>)
#define HAVE_AMX
#endif
#endif

/* Apple's library, or what stands for it in tests on Linux. */
#if defined(__aarch64__) && (defined(__APPLE__) || defined(TINYLLAMA_EMULATE_ACCELERATE))
#define HAVE_ACCELERATE
#endif

/* ---- the choice among them (dispatch.c) ---- */

const kernels *active_kernels(void);
/* Names of the levels that this CPU and system have, best first; NULL ends the list. */
const char *const *available_levels(void);
/* Returns 0, or -1 where the CPU lacks the level. */
int use_level(const char *name);
/* Why a CPU that has AMX can't use it here; NULL where it can, or has none. */
const char *amx_obstacle(void);
/* Whether one product of tiles is what it should be, for that (amx.c). */
int tiles_are_right(void);

/* ---- the pool (threads.c) ---- */

typedef void task(void *job, long first, long last, int worker);

/* Calls task for pieces of 0..n-1 of at most `grain` on `threads` threads and returns when all are done.
 * The caller is worker 0. Only between pool_lock and pool_unlock. */
void run_parallel(int threads, long n, long grain, task *task, void *job);

typedef struct {
    const uint8_t *start;
    size_t n_bytes;
} stretch;

/* Memory that a worker, not the caller, asks for from now on whenever it has left a job and has no other. */
void ask_when_idle(int worker, stretch memory);

void pool_lock(void);
void pool_unlock(void);

/* To be called before every product; lets idle workers ask for the one that followed it the last time (ahead.c). */
void ask_for_next(long n_weights, const weight *const *weights, int threads);

/* ---- whole operations (operations.c): 0, or -1 where memory is short ---- */

int matmul(const float *x, long n_tokens, long n_weights, const weight *const *weights, float *const *outs,
           int threads);
int rms_norm(const float *x, const float *scale, float eps, long n_tokens, long dim, float *out, int threads);
int swiglu(const float *gate, const float *up, long n, float *out, int threads);
int rope(const float *x, const float *freqs, long n_tokens, long n_heads, long head_dim, float *out,
         int threads);
int attention(const heads *h, int threads);
void store_heads(const float *x, long n_tokens, long n_heads, long head_dim, long n_ctx, long pos,
                 uint16_t *cache);
int unpack_rows(const weight *w, const int64_t *rows, long n, float *out);
int pack(const file_blocks *from, const weight *to, long row, long col, int threads);
/* All of a mapped weight, into memory for weight_bytes of it. */
void pack_pieces(const weight *w, uint8_t *memory, int threads);

/* The two limits that `tinyllama bench` holds speeds against: bytes read, products of registers. */
uint64_t read_all(long n, const stretch *stretches, int threads);
double multiply_all(long rounds, int threads);

#endif
