/* Whole operations: each cut into pieces for the pool, in a way in which no sum depends on the number of
 * threads, so that the same input gives the same bits at any number. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* Work below this many bytes of weights, or as much in float operations, isn't worth waking a thread. Pieces of a
 * product are shorter: whoever shares the last of them with a slow core should not wait long. */
enum { WORTH_A_THREAD = 48 * 1024, PIECE = 32 * 1024, CACHE_LINE = 64 };

/* A block of inputs this many times as coarse as the average is refined. */
static const float COARSE = 1.75f;

/* Memory that is kept from call to call, since fresh pages would cost more than a small product. One
 * buffer for the activations and one a thread; the pool's lock guards them. */
typedef struct {
    void *data;
    size_t size;
} buffer;

static buffer shared_buffer, thread_buffers[MAX_THREADS];

static void *reserve(buffer *b, size_t size) {
    if (size <= b->size) return b->data;
    size = (size + size / 4 + 4095) / 4096 * 4096;
    void *grown = NULL;
    if (posix_memalign(&grown, 4096, size)) return NULL;
    void *old = b->data;
    b->data = grown, b->size = size;
    free(old); /* last: a child that is forked now may use what it finds */
    return grown;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

size_t scratch_bytes(void) {
    size_t rows = TILE_ROWS + 16, width = MAX_HEAD_DIM + 64; /* rounded up to tiles of sums */
    size_t tile = 2 * SCORES * width + rows * (2 * width + 2 * SCORES + 8);
    return larger(2 * STRIP * 1024, tile) * sizeof(float);
}

static int reserve_scratch(int threads, size_t size) {
    for (int i = 0; i < threads && i < MAX_THREADS; i++)
        if (!reserve(&thread_buffers[i], size)) return -1;
    return 0;
}

static int worthwhile(int threads, double work) { return work < WORTH_A_THREAD ? 1 : threads; }

/* ---- matmul ---- */

typedef struct {
    const kernels *k;
    const float *x;
    const activations *acts;
    long n_tokens, n_weights;
    const weight *const *weights;
    float *const *outs;
    const void *inputs; /* as panels want them */
    size_t room;        /* for strips of a mapped weight, in front of each thread's scratch memory */
} product;

/* Marks the blocks of a token whose scale is more than COARSE times the average. The error that rounding leaves goes with
 * the square of the scale: of a real model's inputs these few, a tenth, carry most of it. */
static void choose_blocks(const input_block *blocks, long n_blocks, char *chosen) {
    float sum = 0;
    for (long b = 0; b < n_blocks; b++) sum += blocks[b].scale;
    for (long b = 0; b < n_blocks; b++) chosen[b] = blocks[b].scale * (float)n_blocks > COARSE * sum;
}

/* A tile's last token, if there is none. */
static void clear_spare(uint8_t *to, const token_tile *of) {
    if (of->n > of->n_tokens) memset(to, 0, tile_block_bytes(of->n));
}

INLINE void put_runs(const long run, uint8_t *to, long n, long t, const int8_t *q) {
    UNROLL
    for (long k = 0; k < BLOCK; k += run) memcpy(to + k * n + t * run, q + k, (size_t)run);
}

static void put_block(uint8_t *to, long n, long run, long t, int32_t block, const input_block *from) {
    if (run == 8) /* each known to the compiler */
        put_runs(8, to, n, t, from->q);
    else
        put_runs(4, to, n, t, from->q);
    float minus_sum = (float)-from->sum, offset = from->scale * minus_sum;
    int16_t minus_halves[2] = {(int16_t)-from->half, (int16_t)(from->half - from->sum)};
    memcpy(scale_at(to, n, t), &from->scale, 4);
    memcpy(minus_sum_at(to, n, t), &minus_sum, 4);
    memcpy(offset_at(to, n, t), &offset, 4);
    memcpy(minus_halves_at(to, n, t), minus_halves, 4);
    memcpy(number_at(to, n), &block, 4);
}

/* What a thread needs to quantize the tokens of a tile: of each its blocks, and which of them are chosen. */
static size_t quantizing_bytes(long n_in, long n_tokens) {
    return (size_t)(n_in / BLOCK * n_tokens) * (sizeof(input_block) + 1);
}

static void make_tile(const product *p, token_tile *made, input_block *blocks, char *chosen) {
    const long n_in = p->acts->n_in, n_blocks = n_in / BLOCK, n = made->n;
    const float *x = p->x + made->first * n_in;
    uint8_t *to = made->blocks;
    for (long t = 0; t < made->n_tokens; t++) {
        p->k->quantize(x + t * n_in, n_blocks, blocks + t * n_blocks);
        choose_blocks(blocks + t * n_blocks, n_blocks, chosen + t * n_blocks);
    }
    for (long b = 0; b < n_blocks; b++, to += tile_block_bytes(n)) {
        int refined = 0;
        clear_spare(to, made);
        for (long t = 0; t < made->n_tokens; t++) {
            put_block(to, n, p->k->run, t, (int32_t)b, &blocks[t * n_blocks + b]);
            refined |= chosen[t * n_blocks + b];
        }
        if (!refined) continue;
        to += tile_block_bytes(n);
        clear_spare(to, made);
        for (long t = 0; t < made->n_tokens; t++) {
            input_block rest = {.scale = 0};
            if (chosen[t * n_blocks + b]) p->k->refine(x + t * n_in + b * BLOCK, &blocks[t * n_blocks + b], &rest);
            put_block(to, n, p->k->run, t, (int32_t)b, &rest);
        }
    }
    made->n_blocks = (to - made->blocks) / (long)tile_block_bytes(n);
}

static void make_tiles(void *job, long first, long last, int worker) {
    const product *p = job;
    input_block *blocks = thread_buffers[worker].data;
    for (long i = first; i < last; i++) {
        token_tile *made = p->acts->tiles + i;
        make_tile(p, made, blocks, (char *)(blocks + made->n_tokens * (p->acts->n_in / BLOCK)));
    }
}

static long strips_of(const weight *w) { return (w->n_out + STRIP - 1) / STRIP; }

/* Strips first..last-1 of a weight and where their outputs begin: of a mapped weight, a copy of just these. */
static const weight *at_hand(const weight *w, long *first, long *last, float **out, weight *copy, void *memory) {
    if (w->data) return w;
    *copy = rows_of(w, *first * STRIP, *last * STRIP < w->n_out ? *last * STRIP : w->n_out, memory);
    *out += *first * STRIP;
    *last -= *first, *first = 0;
    return copy;
}

static void multiply_strip(const product *p, long i, long first, uint8_t *memory) {
    weight copy;
    float *out = p->outs[i];
    long stride = p->weights[i]->n_out, last = first + 1;
    const weight *w = at_hand(p->weights[i], &first, &last, &out, &copy, memory);
    if (has_blocks(w->type)) {
        p->k->multiply_blocks(w, p->acts, first, out, stride);
    } else {
        long end = last * STRIP < w->n_out ? last * STRIP : w->n_out;
        p->k->multiply_floats(w, p->x, p->n_tokens, first * STRIP, end, out, stride, memory + p->room);
    }
}

/* All weights' strips follow each other as one range. */
static void multiply_strips(void *job, long first, long last, int worker) {
    product *p = job;
    for (long i = 0; i < p->n_weights; i++) {
        long n = strips_of(p->weights[i]);
        for (long s = first > 0 ? first : 0; s < last && s < n; s++)
            multiply_strip(p, i, s, thread_buffers[worker].data);
        first -= n, last -= n;
    }
}

/* ---- and of many tokens ---- */

static void pack_inputs(void *job, long first, long last, int worker) {
    (void)worker;
    product *p = job;
    const panel_kernels *panels = p->k->panels;
    first *= panels->packed_tokens, last *= panels->packed_tokens;
    panels->pack_inputs(p->x, p->n_tokens, p->weights[0]->n_in, first, last < p->n_tokens ? last : p->n_tokens,
                        shared_buffer.data);
}

static void multiply_panels(void *job, long first, long last, int worker) {
    product *p = job;
    const panel_kernels *panels = p->k->panels;
    uint8_t *memory = thread_buffers[worker].data;
    for (long i = 0; i < p->n_weights; i++) {
        long stride = p->weights[i]->n_out, n = strips_of(p->weights[i]), end = last < n ? last : n;
        for (long s = first > 0 ? first : 0; s < end; s += panels->panel_strips) {
            weight copy;
            float *out = p->outs[i];
            long start = s, stop = s + panels->panel_strips < end ? s + panels->panel_strips : end;
            const weight *w = at_hand(p->weights[i], &start, &stop, &out, &copy, memory);
            panels->multiply(w, p->inputs, p->n_tokens, start, stop, out, stride, memory + p->room);
        }
        first -= n, last -= n;
    }
}

/* Wide panels read the inputs less often, but each thread should get several. */
static int multiply_many(product *p, long n_in, long strips, int threads) {
    const panel_kernels *panels = p->k->panels;
    if (reserve_scratch(threads, p->room + panels->scratch_bytes(p->n_tokens, n_in))) return -1;
    if (panels->pack_inputs) {
        p->inputs = reserve(&shared_buffer, panels->inputs_bytes(p->n_tokens, n_in));
        if (!p->inputs) return -1;
        long pieces = (p->n_tokens + panels->packed_tokens - 1) / panels->packed_tokens;
        run_parallel(threads, pieces, 1, pack_inputs, p);
    }
    long grain = strips / (4L * (threads > 1 ? threads : 1));
    grain = grain < 1 ? 1 : grain < panels->panel_strips ? grain : panels->panel_strips;
    run_parallel(threads, strips, grain, multiply_panels, p);
    return 0;
}

/* As few tiles as possible, as equal as possible. */
static int plan_tiles(const kernels *k, activations *acts) {
    const long n_tiles = (acts->n_tokens + k->tile_tokens - 1) / k->tile_tokens;
    const long most = (acts->n_tokens + n_tiles - 1) / n_tiles, even = k->run == 8 && most > 1;
    const size_t size = 2 * (size_t)(acts->n_in / BLOCK) * tile_block_bytes(most + (even && most % 2));
    uint8_t *memory = reserve(&shared_buffer, (size_t)n_tiles * (size + sizeof(token_tile)));
    if (!memory) return -1;
    acts->n_tiles = n_tiles, acts->tiles = (token_tile *)(memory + (size_t)n_tiles * size);
    for (long i = 0; i < n_tiles; i++) {
        const long first = acts->n_tokens * i / n_tiles, n = acts->n_tokens * (i + 1) / n_tiles - first;
        acts->tiles[i] = (token_tile){first, n, n + (even && n % 2), memory + (size_t)i * size, 0, (int)i, (int)n_tiles};
    }
    return 0;
}

int matmul(const float *x, long n_tokens, long n_weights, const weight *const *weights, float *const *outs,
           int threads) {
    const kernels *k = active_kernels();
    long n_in = weights[0]->n_in, strips = 0;
    activations acts = {.n_tokens = n_tokens, .n_in = n_in};
    product job = {k, x, &acts, n_tokens, n_weights, weights, outs, x, 0};
    int many = k->panels && n_tokens >= k->panels->from_tokens, blocks = 0;
    double bytes = 0;
    for (long i = 0; i < n_weights; i++) {
        strips += strips_of(weights[i]);
        bytes += (double)weight_bytes(weights[i]);
        blocks |= has_blocks(weights[i]->type);
        if (!weights[i]->data)
            job.room = larger(job.room, strips_bytes(weights[i], many ? k->panels->panel_strips : 1));
    }
    double work = bytes * (double)n_tokens;
    threads = worthwhile(threads, work);
    if (many) return multiply_many(&job, n_in, strips, threads);
    if (reserve_scratch(threads, larger(job.room + scratch_bytes(), quantizing_bytes(n_in, k->tile_tokens)))) return -1;
    if (blocks && plan_tiles(k, &acts)) return -1;
    if (blocks) run_parallel(threads, acts.n_tiles, 1, make_tiles, &job);
    ask_for_next(n_weights, weights, threads);
    run_parallel(threads, strips, 1 + (long)(PIECE * (double)strips / work), multiply_strips, &job);
    return 0;
}

/* ---- attention ---- */

void store_heads(const float *x, long n_tokens, long n_heads, long head_dim, long n_ctx, long pos,
                 uint16_t *cache) {
    for (long t = 0; t < n_tokens; t++)
        for (long head = 0; head < n_heads; head++, x += head_dim)
            active_kernels()->to_f16(x, head_dim, cache + (head * n_ctx + pos + t) * head_dim);
}

typedef struct {
    const kernels *k;
    const heads *h;
    long pieces;    /* of a key/value head: spans, or tiles */
    long tokens;    /* of a tile */
    float *partial; /* of each span: highest [rows], sum [rows], values [rows, head_dim] */
} attending;

static long head_rows(const heads *h) { return h->n_tokens * shared_by(h); }
static long partial_size(const heads *h) { return head_rows(h) * (h->head_dim + 2); }

static long spans_of(const heads *h, long token) {
    return (h->pos + token - first_seen(h, token)) / SPAN + 1;
}

static void attend_spans(void *job, long first, long last, int worker) {
    (void)worker;
    attending *a = job;
    long rows = head_rows(a->h);
    for (long i = first; i < last; i++) {
        float *partial = a->partial + i * partial_size(a->h);
        a->k->attend_span(a->h, i / a->pieces, i % a->pieces, partial, partial + rows, partial + 2 * rows);
    }
}

/* The spans of one row -> its output. */
static void merge_row(const attending *a, long kv_head, long row) {
    const heads *h = a->h;
    long rows = head_rows(h), size = partial_size(h), shared = shared_by(h), token = row / shared;
    const float *spans = a->partial + kv_head * a->pieces * size;
    float *out = h->out + (token * h->n_heads + kv_head * shared + row % shared) * h->head_dim;
    float top = spans[row], total = 0;
    for (long i = 1; i < spans_of(h, token); i++) top = spans[i * size + row] > top ? spans[i * size + row] : top;
    memset(out, 0, (size_t)h->head_dim * sizeof *out);
    for (long i = 0; i < spans_of(h, token); i++) {
        const float *span = spans + i * size, *values = span + 2 * rows + row * h->head_dim;
        float share = __builtin_expf(span[row] - top);
        total += share * span[rows + row];
        for (long j = 0; j < h->head_dim; j++) out[j] += share * values[j];
    }
    for (long j = 0; j < h->head_dim; j++) out[j] /= total;
}

static void merge_rows(void *job, long first, long last, int worker) {
    (void)worker;
    attending *a = job;
    for (long i = first; i < last; i++) merge_row(a, i / head_rows(a->h), i % head_rows(a->h));
}

/* By spans, so that a few tokens are work for many threads; the later a token, the more it has. */
static int attend_few(const heads *h, int threads) {
    attending job = {active_kernels(), h, spans_of(h, h->n_tokens - 1), h->n_tokens, NULL};
    long pieces = h->n_kv_heads * job.pieces;
    job.partial = reserve(&shared_buffer, (size_t)(pieces * partial_size(h)) * sizeof(float));
    if (!job.partial) return -1;
    double numbers = (double)(h->pos + h->n_tokens - first_seen(h, 0)) * (double)(h->n_kv_heads * h->head_dim);
    run_parallel(worthwhile(threads, 4 * numbers), pieces, 1, attend_spans, &job);
    double merged = (double)(pieces * head_rows(h) * h->head_dim);
    run_parallel(worthwhile(threads, merged), h->n_kv_heads * head_rows(h), 8, merge_rows, &job);
    return 0;
}

/* Causal work is triangular: the last tiles are the longest and go first. */
static void attend_tiles(void *job, long first, long last, int worker) {
    attending *a = job;
    for (long i = first; i < last; i++) {
        long start = (a->pieces - 1 - i / a->h->n_kv_heads) * a->tokens;
        long end = start + a->tokens < a->h->n_tokens ? start + a->tokens : a->h->n_tokens;
        a->k->attend_tile(a->h, i % a->h->n_kv_heads, start, end, thread_buffers[worker].data);
    }
}

/* Of a tile, all about as many. Large tiles load each position less often, but threads should have enough to share. */
static long tile_tokens(const heads *h) {
    enum { PIECES = 32 };
    long most = TILE_ROWS / shared_by(h), least = most / 5 + 1, shared_out = h->n_tokens * h->n_kv_heads / PIECES;
    long tokens = shared_out < least ? least : shared_out < most ? shared_out : most;
    long tiles = (h->n_tokens - 1) / tokens + 1;
    return (h->n_tokens - 1) / tiles + 1;
}

int attention(const heads *h, int threads) {
    if (h->n_tokens <= FEW) return attend_few(h, threads);
    long tokens = tile_tokens(h);
    attending job = {active_kernels(), h, (h->n_tokens - 1) / tokens + 1, tokens, NULL};
    double work = (double)h->n_tokens * (double)h->window * (double)h->n_heads;
    threads = worthwhile(threads, work * (double)h->head_dim / 16);
    if (reserve_scratch(threads, scratch_bytes())) return -1;
    run_parallel(threads, job.pieces * h->n_kv_heads, 1, attend_tiles, &job);
    return 0;
}

/* ---- element-wise ---- */

typedef struct {
    const kernels *k;
    const float *x, *y;
    float eps, *out;
    long n_heads, width;
} elementwise;

static void norm_tokens(void *job, long first, long last, int worker) {
    (void)worker;
    elementwise *e = job;
    for (long t = first; t < last; t++)
        e->k->rms_norm(e->x + t * e->width, e->y, e->eps, e->width, e->out + t * e->width);
}

int rms_norm(const float *x, const float *scale, float eps, long n_tokens, long dim, float *out, int threads) {
    elementwise job = {active_kernels(), x, scale, eps, out, 1, dim};
    run_parallel(worthwhile(threads, (double)n_tokens * (double)dim), n_tokens, 4, norm_tokens, &job);
    return 0;
}

static void swiglu_some(void *job, long first, long last, int worker) {
    (void)worker;
    elementwise *e = job;
    e->k->swiglu(e->x + first, e->y + first, last - first, e->out + first);
}

int swiglu(const float *gate, const float *up, long n, float *out, int threads) {
    elementwise job = {active_kernels(), gate, up, 0, out, 1, 1};
    run_parallel(worthwhile(threads, (double)n * 4), n, 4096, swiglu_some, &job);
    return 0;
}

static void rope_tokens(void *job, long first, long last, int worker) {
    (void)worker;
    elementwise *e = job;
    for (long t = first; t < last; t++)
        e->k->rope(e->x + t * e->n_heads * e->width, e->y + t * e->width, e->n_heads, e->width,
                   e->out + t * e->n_heads * e->width);
}

int rope(const float *x, const float *freqs, long n_tokens, long n_heads, long head_dim, float *out,
         int threads) {
    elementwise job = {active_kernels(), x, freqs, 0, out, n_heads, head_dim};
    double work = (double)(n_tokens * n_heads * head_dim);
    run_parallel(worthwhile(threads, work), n_tokens, 4, rope_tokens, &job);
    return 0;
}

/* ---- loading ---- */

int unpack_rows(const weight *w, const int64_t *rows, long n, float *out) {
    if (!w->data && reserve_scratch(1, strips_bytes(w, 1))) return -1;
    for (long i = 0; i < n; i++, out += w->n_in) {
        if (w->data) {
            unpack_row(w, rows[i], out);
            continue;
        }
        weight row = rows_of(w, rows[i], rows[i] + 1, thread_buffers[0].data);
        unpack_row(&row, 0, out);
    }
    return 0;
}

typedef struct {
    const file_blocks *from;
    const weight *to;
    long row, col;
} packing;

/* By strips of the weight, which no two threads may share. */
static void pack_some(void *job, long first, long last, int worker) {
    (void)worker;
    packing *p = job;
    long start = first * STRIP - p->row % STRIP, end = last * STRIP - p->row % STRIP;
    pack_rows(p->from, p->to, p->row, p->col, start < 0 ? 0 : start, end < p->from->n_rows ? end : p->from->n_rows);
}

int pack(const file_blocks *from, const weight *to, long row, long col, int threads) {
    packing job = {from, to, row, col};
    long strips = (row % STRIP + from->n_rows + STRIP - 1) / STRIP;
    run_parallel(worthwhile(threads, (double)weight_bytes(to)), strips, 2, pack_some, &job);
    return 0;
}

void pack_pieces(const weight *w, uint8_t *memory, int threads) {
    weight to = *w;
    to.data = memory;
    for (const piece *p = w->pieces; p < w->pieces + w->n_pieces; p++) pack(&p->blocks, &to, p->row, p->col, threads);
}

/* ---- the pure-read probe ---- */

/* A thread takes so many bytes at a time and reads them in several streams: a core's own prefetchers then keep more
 * lines under way than for one stream, and more than with instructions that ask for lines ahead. On a Zen 3 one
 * thread reads 17 GB/s in one stream 8 KB ahead, 21 without asking, 27 in three; more streams or wider loads add nothing. */
enum { READ_PIECE = 256 * 1024, STREAMS = 3 };

typedef uint64_t words __attribute__((vector_size(16), aligned(1), may_alias));
enum { LINE_WORDS = CACHE_LINE / sizeof(words) };

typedef struct {
    long n;
    const stretch *stretches;
    words sums[MAX_THREADS][LINE_WORDS];
} reading;

INLINE void add_line(words sums[LINE_WORDS], const uint8_t *p) {
    UNROLL
    for (int j = 0; j < LINE_WORDS; j++) sums[j] += ((const words *)p)[j];
}

static void read_piece(const uint8_t *p, size_t n_bytes, words to[LINE_WORDS]) {
    size_t part = n_bytes / STREAMS / CACHE_LINE * CACHE_LINE;
    words sums[LINE_WORDS] = {{0}};
    for (size_t i = 0; i < part; i += CACHE_LINE) {
        UNROLL
        for (int s = 0; s < STREAMS; s++) add_line(sums, p + (size_t)s * part + i);
    }
    for (size_t i = STREAMS * part; i + CACHE_LINE <= n_bytes; i += CACHE_LINE) add_line(sums, p + i);
    for (int j = 0; j < LINE_WORDS; j++) to[j] += sums[j];
}

static long pieces_of(stretch s) { return (long)((s.n_bytes + READ_PIECE - 1) / READ_PIECE); }

/* All stretches' pieces follow each other as one range. */
static void read_some(void *job, long first, long last, int worker) {
    reading *r = job;
    for (const stretch *s = r->stretches; s < r->stretches + r->n && last > 0; s++) {
        long n = pieces_of(*s);
        for (long i = first > 0 ? first : 0; i < last && i < n; i++) {
            size_t start = (size_t)i * READ_PIECE, left = s->n_bytes - start;
            read_piece(s->start + start, left < READ_PIECE ? left : READ_PIECE, r->sums[worker]);
        }
        first -= n, last -= n;
    }
}

/* Reads whole cache lines of memory and does next to nothing with them: the speed that decoding can't
 * exceed. Returns the sum of the words, which the compiler therefore can't leave out. */
uint64_t read_all(long n, const stretch *stretches, int threads) {
    static reading job;
    long pieces = 0;
    memset(&job, 0, sizeof job);
    job.n = n, job.stretches = stretches;
    for (long i = 0; i < n; i++) pieces += pieces_of(stretches[i]);
    run_parallel(threads, pieces, 1, read_some, &job);
    uint64_t total = 0;
    for (int i = 0; i < MAX_THREADS; i++)
        for (int j = 0; j < LINE_WORDS; j++) total += job.sums[i][j][0] + job.sums[i][j][1];
    return total;
}

typedef struct {
    const kernels *k;
    double products[MAX_THREADS];
    float sink[MAX_THREADS];
} multiplying;

static void multiply_some(void *job, long first, long last, int worker) {
    multiplying *m = job;
    m->products[worker] += m->k->multiply_registers(last - first, &m->sink[worker]);
}

double multiply_all(long rounds, int threads) {
    static multiplying job;
    memset(&job, 0, sizeof job);
    job.k = active_kernels();
    run_parallel(threads, rounds, 10000, multiply_some, &job);
    double total = 0;
    for (int i = 0; i < MAX_THREADS; i++) total += job.products[i];
    return total;
}
