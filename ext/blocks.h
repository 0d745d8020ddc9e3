/* Products of blocks: the loops around a level's add_block, which are the same for all. The level's file says before
 * how many TOKENS a tile has at most, whether they are always EVEN (but for one alone), how many vectors of rows a column is
 * WIDE, and defines
 *
 *     at_once    how many columns are multiplied at once by n tokens
 *     add_block  adds a block of the rows of a column times a tile_block of n tokens to totals [WIDE][n]
 *
 * CHUNK blocks of all columns are multiplied before the next: they and their inputs stay in the first-level cache. The
 * weights come from memory once, from front to back, whatever the number of tokens; each column asks for its share of
 * what is needed soon. One tile asks for what it is about to reach; of several each asks for its share of the next
 * strip, so that memory has all the time that they take, and not only the first one's. The order in which a row's
 * blocks are summed up depends on none of this. */
enum {
    COLUMNS_OF_STRIP = STRIP / LANES / WIDE,
    CHUNK = 8,
    AHEAD = 8192, /* how far ahead of its use a strip is asked for, in bytes */
};

#if !defined(FINISH_SUMS) /* what is to be done with the n sums of a vector of rows before they are a token's each */
#define FINISH_SUMS(n, sums) (void)0
#endif

INLINE void ask_for(const uint8_t *block, const long block_bytes, const int share, const int shares) {
    UNROLL
    for (long i = 0; i * shares * 64 < block_bytes; i++) __builtin_prefetch(block + (i * shares + share) * 64);
}

/* Columns from `column` on; every so many blocks ask for one `ahead` bytes behind them. */
INLINE void multiply_chunk(const weight_type type, const int n, const uint8_t *strip, const uint8_t *x, long n_blocks,
                           int column, const token_tile *tile, long ahead, vec *sums) {
    const int columns = at_once(n);
    const layout at = layout_of(type);
    vec totals[COLUMNS_OF_STRIP][WIDE * TOKENS];
    UNROLL
    for (int c = 0; c < columns; c++)
        UNROLL
        for (int i = 0; i < WIDE * n; i++) totals[c][i] = sums[c * WIDE * n + i];
    for (long i = 0; i < n_blocks; i++, x += tile_block_bytes(n)) {
        const int32_t number = read_i32(number_at(x, n));
        const uint8_t *block = strip + block_place(at, number), *head = strip + head_place(at, number);
        if (tile->turns == 1 || number % tile->turns == tile->turn)
            ask_for(block + ahead, at.block_bytes, column / columns, COLUMNS_OF_STRIP / columns);
        UNROLL
        for (int c = 0; c < columns; c++) {
            add_block(type, n, block, head, column + c, x, totals[c]);
            if (columns > 1) IN_ORDER;
        }
    }
    UNROLL
    for (int c = 0; c < columns; c++)
        UNROLL
        for (int i = 0; i < WIDE * n; i++) sums[c * WIDE * n + i] = totals[c][i];
}

INLINE void multiply_tile(const weight_type type, const int n, const weight *w, const token_tile *tile, long strip,
                          float *out, long stride) {
    const uint8_t *data = w->data + strip * w->strip_bytes, *x = tile->blocks;
    const long ahead = tile->turns == 1 ? AHEAD : w->strip_bytes;
    vec sums[STRIP / LANES * TOKENS];
    for (int i = 0; i < STRIP / LANES * n; i++) sums[i] = v_set1(0);
    for (long i = 0; i < tile->n_blocks; i += CHUNK, x += CHUNK * tile_block_bytes(n))
        for (int c = 0; c < COLUMNS_OF_STRIP; c += at_once(n))
            multiply_chunk(type, n, data, x, smaller(tile->n_blocks - i, CHUNK), c, tile, ahead, sums + c * WIDE * n);
    for (int v = 0; v < STRIP / LANES; v++) {
        const long row = strip * STRIP + v * LANES;
        FINISH_SUMS(n, sums + v * n);
        for (long t = 0; t < tile->n_tokens && row < w->n_out; t++)
            v_store_part(out + (tile->first + t) * stride + row, v_mul(sums[v * n + t], v_set1(w->factor)),
                         w->n_out - row);
    }
}

/* Type and number of tokens are known to the compiler. */
INLINE void multiply_type(const weight_type type, const weight *w, const token_tile *tile, long strip, float *out,
                          long stride) {
#define TILE_CASE(n)                                                                                          \
    case n:                                                                                                   \
        if (n <= TOKENS && !(EVEN && n % 2)) multiply_tile(type, n, w, tile, strip, out, stride);             \
        break;
    switch (tile->n) {
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7) TILE_CASE(8)
    }
}

#define TYPE_CASE(id, ...) case id: multiply_type(id, w, x, strip, out, stride); break;
#define MULTIPLY_TILE(name)                                                                                   \
    void name(const weight *w, const token_tile *x, long strip, float *out, long stride) {                    \
        switch (w->type) {                                                                                    \
            BLOCK_TYPES(TYPE_CASE)                                                                            \
        default: break;                                                                                       \
        }                                                                                                     \
    }
#define MULTIPLY_BLOCKS(name, multiply_tile)                                                                  \
    void name(const weight *w, const activations *acts, long strip, float *out, long stride) {                \
        for (long i = 0; i < acts->n_tiles; i++) multiply_tile(w, acts->tiles + i, strip, out, stride);       \
    }
