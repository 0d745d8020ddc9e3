/* Attention of many queries in tiles, for amx.c: scores = queries x keys, out += e^(score - highest) x values.
 *
 * The exponential turns an error of a score into a share of its weight, and scores may be large. So queries and
 * keys are two bf16 each, the number and what rounding it left, and a score is the sum of three products of tiles;
 * only rest x rest, 2^-18 of it, is left out. Weights and values are rounded once. */

/* A tile of rows while it goes over the positions. */
typedef struct {
    const heads *h;
    long kv_head, first, n_rows; /* the first row, and how many */
    long n_tiles, n_steps, width; /* of 16 rows; of 32 of head_dim; head_dim rounded up to them */
    uint8_t *q;       /* of each 16 rows, of each step: tile, rest */
    uint8_t *keys;    /* of each step, of each 16 positions: tile, rest */
    uint8_t *values;  /* of each 16 of width, of each 32 positions */
    uint8_t *weights; /* of each 16 rows, of each 32 positions */
    float *scores;    /* [rows, SCORES] */
    float *out;       /* [rows, width] */
    float *highest, *sum; /* [rows] */
} attention_piece;

static attention_piece carve_piece(const heads *h, long kv_head, long first, long last, void *scratch) {
    long shared = shared_by(h);
    attention_piece p = {.h = h, .kv_head = kv_head, .first = first * shared, .n_rows = (last - first) * shared};
    p.n_tiles = tiles_of(p.n_rows), p.n_steps = steps_of(h->head_dim), p.width = p.n_steps * STEP;
    p.q = scratch;
    p.keys = p.q + p.n_tiles * p.n_steps * 2 * TILE_BYTES;
    p.values = p.keys + p.n_steps * SCORES / ROWS * 2 * TILE_BYTES;
    p.weights = p.values + p.width / ROWS * SCORES / STEP * TILE_BYTES;
    p.scores = (float *)(p.weights + p.n_tiles * SCORES / STEP * TILE_BYTES);
    p.out = p.scores + p.n_tiles * ROWS * SCORES;
    p.highest = p.out + p.n_tiles * ROWS * p.width;
    p.sum = p.highest + p.n_tiles * ROWS;
    return p;
}

/* 32 numbers as bf16, and what that leaves of them. */
INLINE void split(__m512 low, __m512 high, void *number, void *rest) {
    __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    __m512i a = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded));
    __m512i b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
    _mm512_store_si512(number, rounded);
    _mm512_store_si512(rest, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* The first n (none if n < 0) of 16 numbers in half precision; the others are zeros. */
INLINE __m512 load_halves(const uint16_t *x, long n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}

/* Behind the last row of the last tile are zeros. */
static void load_queries(const attention_piece *p) {
    memset(p->q, 0, (size_t)(p->n_tiles * p->n_steps * 2 * TILE_BYTES));
    for (long r = 0; r < p->n_rows; r++) {
        float q[MAX_HEAD_DIM];
        uint8_t *to = p->q + r / ROWS * p->n_steps * 2 * TILE_BYTES + r % ROWS * 64;
        load_query(p->h, p->kv_head, p->first + r, q);
        for (long k = 0; k < p->width; k += STEP, to += 2 * TILE_BYTES) {
            long have = p->h->head_dim - k;
            split(_mm512_maskz_loadu_ps(first_lanes(have), q + k),
                  _mm512_maskz_loadu_ps(first_lanes(have - 16), q + k + 16), to, to + TILE_BYTES);
        }
    }
}

/* SCORES positions from `first` on, of which n are there. */
static void load_keys(const attention_piece *p, long first, long n) {
    const uint16_t *keys = p->h->keys + (p->kv_head * p->h->n_ctx + first) * p->h->head_dim;
    uint8_t *to = p->keys;
    for (long k = 0; k < p->width; k += STEP)
        for (long at = 0; at < SCORES; at += ROWS, to += 2 * TILE_BYTES) {
            float numbers[ROWS * ROWS] __attribute__((aligned(64)));
            float rests[ROWS * ROWS] __attribute__((aligned(64)));
            for (long r = 0; r < ROWS; r++) {
                long have = at + r < n ? p->h->head_dim - k : 0;
                const uint16_t *key = keys + (have ? (at + r) * p->h->head_dim + k : 0);
                split(load_halves(key, have), load_halves(key + 16, have - 16), numbers + r * ROWS,
                      rests + r * ROWS);
            }
            v_transpose(numbers, ROWS, (float *)to, ROWS);
            v_transpose(rests, ROWS, (float *)(to + TILE_BYTES), ROWS);
        }
}

static void load_values(const attention_piece *p, long first, long n) {
    long head_dim = p->h->head_dim;
    const uint16_t *values = p->h->values + (p->kv_head * p->h->n_ctx + first) * head_dim;
    uint8_t *to = p->values;
    for (long k = 0; k < p->width; k += ROWS)
        for (long at = 0; at < SCORES; at += 2, to += 64) {
            long have = at < n ? head_dim - k : 0, next = at + 1 < n ? head_dim - k : 0;
            __m512 even = load_halves(values + (have > 0 ? at * head_dim + k : 0), have);
            __m512 odd = load_halves(values + (next > 0 ? (at + 1) * head_dim + k : 0), next);
            _mm512_store_si512(to, pair(plain_nan(even), plain_nan(odd)));
        }
}

/* Adds the products of a step of queries, tiles 4 and 5, and of 16 keys to tile n. */
#define ADD_SCORES(n)                                         \
    do {                                                      \
        _tile_loadd(6, keys + (n) * 2 * TILE_BYTES, 64);      \
        _tile_dpbf16ps(n, 4, 6);                              \
        _tile_dpbf16ps(n, 5, 6);                              \
        _tile_loadd(7, keys + ((n) * 2 + 1) * TILE_BYTES, 64); \
        _tile_dpbf16ps(n, 4, 7);                              \
    } while (0)

/* scores[16, SCORES] of the tile'th 16 rows. */
static void score_tile(const attention_piece *p, long tile) {
    const uint8_t *q = p->q + tile * p->n_steps * 2 * TILE_BYTES, *keys = p->keys;
    float *scores = p->scores + tile * ROWS * SCORES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < p->n_steps; step++, q += 2 * TILE_BYTES, keys += 8 * TILE_BYTES) {
        _tile_loadd(4, q, 64);
        _tile_loadd(5, q + TILE_BYTES, 64);
        ADD_SCORES(0);
        ADD_SCORES(1);
        ADD_SCORES(2);
        ADD_SCORES(3);
    }
    _tile_stored(0, scores, 4 * SCORES);
    _tile_stored(1, scores + 16, 4 * SCORES);
    _tile_stored(2, scores + 32, 4 * SCORES);
    _tile_stored(3, scores + 48, 4 * SCORES);
}

/* Scores of positions from `first` on become weights. */
static void weigh_tile(const attention_piece *p, long tile, long first) {
    for (long r = tile * ROWS; r < smaller((tile + 1) * ROWS, p->n_rows); r++) {
        long token = (p->first + r) / shared_by(p->h);
        positions seen = {larger(first_seen(p->h, token) - first, 0),
                          smaller(p->h->pos + token + 1 - first, SCORES)};
        float *scores = p->scores + r * SCORES;
        weigh_scores(scores, seen, p->highest + r, p->sum + r, p->out + r * p->width, p->width);
        uint8_t *to = p->weights + tile * 2 * TILE_BYTES + r % ROWS * 64;
        _mm512_store_si512(to, bf16_from_floats(scores, 32));
        _mm512_store_si512(to + TILE_BYTES, bf16_from_floats(scores + 32, 32));
    }
}

/* out[16, width] += weights x values, 32 of width at a time. */
static void add_values(const attention_piece *p, long tile) {
    const uint8_t *values = p->values;
    float *out = p->out + tile * ROWS * p->width;
    _tile_loadd(4, p->weights + tile * 2 * TILE_BYTES, 64);
    _tile_loadd(5, p->weights + (tile * 2 + 1) * TILE_BYTES, 64);
    for (long step = 0; step < p->n_steps; step++, values += 4 * TILE_BYTES, out += STEP) {
        _tile_loadd(0, out, 4 * p->width);
        _tile_loadd(1, out + ROWS, 4 * p->width);
        _tile_loadd(6, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + 2 * TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(2, values + TILE_BYTES, 64);
        _tile_dpbf16ps(0, 5, 2);
        _tile_loadd(3, values + 3 * TILE_BYTES, 64);
        _tile_dpbf16ps(1, 5, 3);
        _tile_stored(0, out, 4 * p->width);
        _tile_stored(1, out + ROWS, 4 * p->width);
    }
}

static void attend_in_tiles(const heads *h, long kv_head, long first, long last, void *scratch) {
    attention_piece p = carve_piece(h, kv_head, first, last, scratch);
    if (p.n_rows < ROWS) { /* loading the positions would take longer than multiplying by them */
        attend_tile(h, kv_head, first, last, scratch);
        return;
    }
    memset(p.weights, 0, (size_t)(p.n_tiles * 2 * TILE_BYTES));
    memset(p.out, 0, (size_t)(p.n_tiles * ROWS * p.width) * sizeof(float));
    for (long r = 0; r < p.n_rows; r++) p.highest[r] = -INFINITY, p.sum[r] = 0;
    load_queries(&p);
    _tile_loadconfig(&whole_tiles);
    for (long at = first_seen(h, first); at < h->pos + last; at += SCORES) {
        load_keys(&p, at, smaller(h->pos + last - at, SCORES));
        load_values(&p, at, smaller(h->pos + last - at, SCORES));
        for (long tile = 0; tile < p.n_tiles; tile++) {
            STORED();
            score_tile(&p, tile);
            weigh_tile(&p, tile, at);
            STORED();
            add_values(&p, tile);
        }
    }
    _tile_release();
    for (long r = 0; r < p.n_rows; r++) {
        float *out = h->out + row_at(h, kv_head, p.first + r);
        for (long i = 0; i < h->head_dim; i++) out[i] = p.out[r * p.width + i] / p.sum[r];
    }
}
