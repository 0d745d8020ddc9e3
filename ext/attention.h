/* Attention, for generic.h. Rows are (token, query head) pairs that share one key/value head: row r is the head
 * r % shared of the token r / shared. */

/* Where a row's numbers begin in q and out. */
static long row_at(const heads *h, long kv_head, long row) {
    long shared = shared_by(h);
    return (row / shared * h->n_heads + kv_head * shared + row % shared) * h->head_dim;
}

/* Queries are scaled instead of scores, of which there are more. */
static void load_query(const heads *h, long kv_head, long row, float *out) {
    const float *q = h->q + row_at(h, kv_head, row);
    vec scale = v_set1(1 / sqrtf((float)h->head_dim));
    for (long i = 0; i < h->head_dim; i += LANES) {
        long left = h->head_dim - i;
        v_store_part(out + i, v_mul(v_load_part(q + i, left), scale), left);
    }
}

static float highest_of(const float *scores, long n) {
    float lanes[LANES], highest = scores[0];
    long i = 0;
    if (n >= LANES) {
        vec top = v_load(scores);
        for (i = LANES; i + LANES <= n; i += LANES) top = v_max(top, v_load(scores + i));
        v_store(lanes, top);
        for (int j = 0; j < LANES; j++) highest = lanes[j] > highest ? lanes[j] : highest;
    }
    for (; i < n; i++) highest = scores[i] > highest ? scores[i] : highest;
    return highest;
}

/* scores -> e^(score - highest) for n scores, of which it returns the sum. */
static float exponentials(float *scores, long n, float highest) {
    enum { AT_ONCE = 4 };
    vec sum = v_set1(0), e[AT_ONCE];
    long i = 0;
    for (; i + AT_ONCE * LANES <= n; i += AT_ONCE * LANES) {
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) e[j] = v_sub(v_load(scores + i + j * LANES), v_set1(highest));
        v_exps(AT_ONCE, e);
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            v_store(scores + i + j * LANES, e[j]);
            sum = v_add(sum, e[j]);
        }
    }
    for (; i < n; i += LANES) {
        v_store_part(scores + i, v_exp(v_sub(v_load_part(scores + i, n - i), v_set1(highest))), n - i);
        sum = v_add(sum, v_load_part(scores + i, n - i)); /* whose padding is 0 */
    }
    return v_sum(sum);
}

/* ---- a few tokens: spans of positions ---- */

/* Memory is read once: every few positions meet all rows of a set while they are in the first-level cache, and a
 * span the next set while it is in the second. No sum of a row depends on which others are in its set. */
enum {
    SET = 16,              /* rows */
    TURN = 16,             /* positions whose values are added up before the next rows take their turn */
    SEEN = SPAN + FEW + 4, /* positions that a set sees, at most, and room for the last four */
    AHEAD_IN_CACHE = 4096, /* halves of the KV cache that are asked for ahead of their use: 8 KB */
};

/* Of a head, whose positions follow each other. */
static inline void prefetch(const uint16_t *p, long n) {
    for (long i = 0; i < n; i += 32) __builtin_prefetch(p + i); /* a cache line */
}

/* Adds up the products of a vector of each key and query; n numbers of it are there. */
INLINE void add_scores(const int rows, const float *q, const uint16_t *const keys[4], long i, long n,
                       vec sums[ABREAST][4]) {
    vec v[ABREAST];
    UNROLL
    for (int r = 0; r < rows; r++) v[r] = v_load_part(q + r * MAX_HEAD_DIM + i, n);
    UNROLL
    for (int p = 0; p < 4; p++) {
        vec key = v_load_f16_part(keys[p] + i, n);
        UNROLL
        for (int r = 0; r < rows; r++) sums[r][p] = v_fma(key, v[r], sums[r][p]);
    }
}

/* scores[r * SEEN + 0..3] of four keys and the rows q[r * MAX_HEAD_DIM]. */
INLINE void score_keys(const int rows, const float *q, const uint16_t *const keys[4], long head_dim, float *scores) {
    vec sums[ABREAST][4];
    long i = 0;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < 4; p++) sums[r][p] = v_set1(0);
    for (; i + LANES <= head_dim; i += LANES) add_scores(rows, q, keys, i, LANES, sums);
    if (i < head_dim) add_scores(rows, q, keys, i, head_dim - i, sums);
    UNROLL
    for (int r = 0; r < rows; r++) v_sum4(sums[r], scores + r * SEEN);
}

/* out[r * head_dim + ..] += weights[r * SEEN + ..n] @ values [n, head_dim], for so many vectors. */
INLINE void weigh_vectors(const int rows, const int vectors, const float *weights, const uint16_t *values, long n,
                          long head_dim, float *out) {
    vec sums[ABREAST][8];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int j = 0; j < vectors; j++) sums[r][j] = v_load(out + r * head_dim + j * LANES);
    for (long p = 0; p < n; p++, values += head_dim) {
        vec weight[ABREAST];
        UNROLL
        for (int r = 0; r < rows; r++) weight[r] = v_set1(weights[r * SEEN + p]);
        UNROLL
        for (int j = 0; j < vectors; j++) {
            vec value = v_load_f16(values + j * LANES);
            UNROLL
            for (int r = 0; r < rows; r++) sums[r][j] = v_fma(weight[r], value, sums[r][j]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int j = 0; j < vectors; j++) v_store(out + r * head_dim + j * LANES, sums[r][j]);
}

INLINE void weigh_rows(const int rows, const float *weights, const uint16_t *values, long n, long head_dim,
                       float *out) {
    const int many = rows == 1 ? 8 : 4;
    long i = 0;
    for (; i + many * LANES <= head_dim; i += many * LANES)
        weigh_vectors(rows, many, weights, values + i, n, head_dim, out + i);
    for (; i + LANES <= head_dim; i += LANES) weigh_vectors(rows, 1, weights, values + i, n, head_dim, out + i);
    for (long p = 0; i < head_dim && p < n; p++) {
        vec value = v_load_f16_part(values + p * head_dim + i, head_dim - i);
        for (int r = 0; r < rows; r++) {
            float *to = out + r * head_dim + i;
            vec weight = v_set1(weights[r * SEEN + p]);
            v_store_part(to, v_fma(weight, value, v_load_part(to, head_dim - i)), head_dim - i);
        }
    }
}

/* A set of rows and the positions that any of them sees, the first of which is 0 here. */
typedef struct {
    long rows, head_dim;
    const uint16_t *keys, *values; /* [positions, head_dim] */
    float q[SET * MAX_HEAD_DIM];
    float scores[SET * SEEN]; /* which become weights */
    float *out; /* [rows, head_dim] */
} set_state;

static void score_positions(set_state *s, long n) {
    for (long p = 0; p < n; p += 4) {
        const uint16_t *keys[4]; /* behind the last one it is repeated */
        for (int i = 0; i < 4; i++) keys[i] = s->keys + smaller(p + i, n - 1) * s->head_dim;
        prefetch(keys[0] + AHEAD_IN_CACHE, 4 * s->head_dim);
        for (long r = 0, some; r < s->rows; r += some) {
            some = abreast(s->rows - r);
            ABREAST_CASES(some, score_keys, s->q + r * MAX_HEAD_DIM, keys, s->head_dim, s->scores + r * SEEN + p)
        }
    }
}

/* Adds up the values of positions first..last-1 for some of the rows. */
static void weigh_positions(set_state *s, long row, long rows, long first, long last) {
    for (long p = first; p < last; p += TURN) {
        const uint16_t *values = s->values + p * s->head_dim;
        prefetch(values + AHEAD_IN_CACHE, TURN * s->head_dim);
        for (long r = row, some; r < row + rows; r += some) {
            some = abreast(row + rows - r);
            ABREAST_CASES(some, weigh_rows, s->scores + r * SEEN + p, values, smaller(last - p, TURN), s->head_dim,
                          s->out + r * s->head_dim)
        }
    }
}

/* Tokens that see different positions, in a window or at the end, must not meet those that only others see, where
 * NaN may be. So the values that all see are added up together, and those before and behind them by each row alone. */
static void attend_set(const heads *h, long kv_head, long span, long row, long rows, float *highest, float *sum,
                       float *out) {
    long shared = shared_by(h);
    positions first = span_of(h, row / shared, span), last = span_of(h, (row + rows - 1) / shared, span);
    long start = first.first, at = (kv_head * h->n_ctx + start) * h->head_dim;
    long from = last.first - start, to = larger(from, first.last - start); /* what all see */
    set_state s = {rows, h->head_dim, h->keys + at, h->values + at, .out = out};
    for (long r = 0; r < rows; r++) load_query(h, kv_head, row + r, s.q + r * MAX_HEAD_DIM);
    score_positions(&s, last.last - start);
    memset(out, 0, (size_t)(rows * h->head_dim) * sizeof *out);
    for (long r = 0; r < rows; r++) {
        positions seen = span_of(h, (row + r) / shared, span);
        long n = seen.last - seen.first;
        if (n <= 0) continue;
        float *scores = s.scores + r * SEEN + seen.first - start;
        highest[r] = highest_of(scores, n);
        sum[r] = exponentials(scores, n, highest[r]);
        weigh_positions(&s, r, 1, seen.first - start, smaller(from, seen.last - start));
    }
    weigh_positions(&s, 0, rows, from, to);
    for (long r = 0; r < rows; r++) {
        positions seen = span_of(h, (row + r) / shared, span);
        weigh_positions(&s, r, 1, larger(to, seen.first - start), seen.last - start);
    }
}

static void attend_span(const heads *h, long kv_head, long span, float *highest, float *sum, float *values) {
    long rows = h->n_tokens * shared_by(h);
    for (long r = 0; r < rows; r += SET)
        attend_set(h, kv_head, span, r, smaller(rows - r, SET), highest + r, sum + r, values + r * h->head_dim);
}

/* ---- many tokens: tiles of queries ---- */

/* A tile of rows while it goes over the positions, a block of them at a time. */
typedef struct {
    const heads *h;
    long kv_head, first, rows; /* the first row and how many */
    long depth, width;         /* head_dim rounded up to whole vectors and to whole tiles of sums */
    float *q;                  /* [rows, depth] */
    float *keys;               /* [SCORES / COLUMNS, depth, COLUMNS] */
    float *values;             /* [width / COLUMNS, SCORES, COLUMNS] */
    float *scores;             /* [rows, SCORES] */
    float *out;                /* [rows, width] */
    float *highest, *sum;      /* [rows] */
    positions *seen;           /* [rows] */
} tile_state;

static tile_state carve(const heads *h, long kv_head, long first, long last, void *scratch) {
    long shared = shared_by(h);
    tile_state s = {.h = h, .kv_head = kv_head, .first = first * shared, .rows = (last - first) * shared};
    s.depth = (h->head_dim + LANES - 1) / LANES * LANES;
    s.width = (h->head_dim + COLUMNS - 1) / COLUMNS * COLUMNS;
    s.seen = scratch;
    s.keys = (float *)(s.seen + s.rows);
    s.values = s.keys + SCORES * s.depth;
    s.q = s.values + SCORES * s.width;
    s.scores = s.q + s.rows * s.depth;
    s.out = s.scores + s.rows * SCORES;
    s.highest = s.out + s.rows * s.width;
    s.sum = s.highest + s.rows;
    return s;
}

/* Keys first..last-1 of the block at `start` become columns, values rows of numbers. */
static void load_positions(const tile_state *s, long start, long first, long last) {
    long hd = s->h->head_dim, at = (s->kv_head * s->h->n_ctx + start) * hd;
    const uint16_t *keys = s->h->keys + at, *values = s->h->values + at;
    float rows[LANES * MAX_HEAD_DIM];
    for (long p = first / LANES * LANES; p < last; p += LANES) {
        for (long r = 0; r < LANES; r++)
            for (long i = 0; p + r >= first && p + r < last && i < hd; i += LANES)
                v_store(rows + r * s->depth + i, v_load_f16_part(keys + (p + r) * hd + i, hd - i));
        float *to = s->keys + p / COLUMNS * COLUMNS * s->depth + p % COLUMNS;
        for (long i = 0; i < hd; i += LANES) v_transpose(rows + i, s->depth, to + i * COLUMNS, COLUMNS);
    }
    for (long p = first; p < last; p++)
        for (long i = 0; i < hd; i += LANES)
            v_store(s->values + (i / COLUMNS * SCORES + p) * COLUMNS + i % COLUMNS,
                    v_load_f16_part(values + p * hd + i, hd - i));
}

/* Positions of the block at `start` that a row sees. */
static positions seen_in_block(const tile_state *s, long row, long start) {
    return (positions){larger(s->seen[row].first - start, 0), smaller(s->seen[row].last - start, SCORES)};
}

/* Scores that a row sees become weights, others 0. Softmax goes on from block to block: where the highest score
 * rises, what was summed shrinks (online softmax, arXiv:1805.02867). */
static void weigh_scores(float *scores, positions seen, float *highest, float *sum, float *out, long width) {
    if (seen.first >= seen.last) {
        memset(scores, 0, SCORES * sizeof *scores);
        return;
    }
    float top = highest_of(scores + seen.first, seen.last - seen.first);
    if (top > *highest) {
        float shrink = v_sum(v_exp(v_set1(*highest - top))) / LANES;
        for (long i = 0; i < width; i += LANES) v_store(out + i, v_mul(v_load(out + i), v_set1(shrink)));
        *sum *= shrink;
        *highest = top;
    }
    *sum += exponentials(scores + seen.first, seen.last - seen.first, *highest);
    for (long i = 0; i < seen.first; i++) scores[i] = 0;
    for (long i = seen.last; i < SCORES; i++) scores[i] = 0;
}

/* Asks for the share'th of so many parts of a block, and the next ones up to those of TILE_TOKENS rows. */
static void ask_for_part(const tile_state *s, long start, long share, long shares) {
    long n = smaller(s->seen[s->rows - 1].last - start, SCORES) * s->h->head_dim;
    long at = (s->kv_head * s->h->n_ctx + start) * s->h->head_dim;
    for (long i = n * share / shares; i < n * (share + TILE_TOKENS * COLUMNS) / shares; i += 32) {
        __builtin_prefetch(s->h->keys + at + i, 0, 2);
        __builtin_prefetch(s->h->values + at + i, 0, 2);
    }
}

/* TILE_TOKENS rows at a time. Products of positions that none of these sees are left out. */
static void attend_block(const tile_state *s, long start) {
    for (long c = 0; c < SCORES; c += COLUMNS)
        for (long r = 0; r < s->rows; r += TILE_TOKENS) {
            long rows = smaller(s->rows - r, TILE_TOKENS);
            long from = seen_in_block(s, r, start).first, to = seen_in_block(s, r + rows - 1, start).last;
            ask_for_part(s, start + SCORES, c * s->rows + r * COLUMNS, SCORES * s->rows);
            if (from < c + COLUMNS && to > c)
                tile(rows, s->q + r * s->depth, s->depth, s->keys + c * s->depth, COLUMNS, s->h->head_dim,
                     s->scores + r * SCORES + c, SCORES, 0);
        }
    for (long r = 0; r < s->rows; r++)
        weigh_scores(s->scores + r * SCORES, seen_in_block(s, r, start), s->highest + r, s->sum + r,
                     s->out + r * s->width, s->width);
    for (long i = 0; i < s->width; i += COLUMNS)
        for (long r = 0; r < s->rows; r += TILE_TOKENS) {
            long rows = smaller(s->rows - r, TILE_TOKENS);
            long from = seen_in_block(s, r, start).first, to = seen_in_block(s, r + rows - 1, start).last;
            if (from < to)
                tile(rows, s->scores + r * SCORES + from, SCORES, s->values + (i * SCORES + from * COLUMNS), COLUMNS,
                     to - from, s->out + r * s->width + i, s->width, 1);
        }
}

static void attend_tile(const heads *h, long kv_head, long first, long last, void *scratch) {
    tile_state s = carve(h, kv_head, first, last, scratch);
    long seen = first_seen(h, first), end = h->pos + last;
    memset(s.out, 0, (size_t)(s.rows * s.width) * sizeof(float));
    for (long r = 0; r < s.rows; r++) {
        load_query(h, kv_head, s.first + r, s.q + r * s.depth);
        s.highest[r] = -INFINITY, s.sum[r] = 0;
        long token = (s.first + r) / shared_by(h);
        s.seen[r] = (positions){first_seen(h, token), h->pos + token + 1};
    }
    for (long p = seen / SCORES * SCORES; p < end; p += SCORES) {
        load_positions(&s, p, larger(seen - p, 0), smaller(end - p, SCORES));
        attend_block(&s, p);
    }
    for (long r = 0; r < s.rows; r++) {
        float *out = h->out + row_at(h, kv_head, s.first + r);
        for (long i = 0; i < h->head_dim; i++) out[i] = s.out[r * s.width + i] / s.sum[r];
    }
}
