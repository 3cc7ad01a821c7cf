// Attention of many query rows: all rows of one query page (they see the same pages) against tiles of decoded keys and
// values, float32, online softmax. Scratch is one tile and one score block whatever the history's length.

constexpr int kTileTokens = 256; // K and V tiles of 128 dims are 256 KiB: second-level cache
constexpr int kRowBlock = 64;    // score rows at a time: 64 KiB

TQ_INLINE int tile_tokens(const Store& s) { return max1(kTileTokens / s.page_tokens, 1) * s.page_tokens; }
TQ_INLINE int tile_blocks(const Store& s) { // of whole spans
    return (tile_tokens(s) / kGroupTokens + kSpanBlocks - 1) / kSpanBlocks * kSpanBlocks;
}
TQ_INLINE int prefill_rows(const Attention& a) { return a.group * a.store->page_tokens; }
TQ_INLINE int key_columns(const Attention& a) { return max1(tile_tokens(*a.store), (max1(a.store->page_tokens, a.store->sink_tokens) + 15) / 16 * 16); }

static std::size_t prefill_scratch(const Attention& a) {
    const Store& s = *a.store;
    const std::size_t rows = prefill_rows(a), columns = key_columns(a) + kPanel;
    return rows * (2 * s.k.dim + 2 * s.v.dim + 5 + tile_blocks(s) + 2 * s.k.turning.padded) + columns * (s.k.dim + s.v.dim + 2 * kPanel) + kRowBlock * columns + 16 * kMaxDim;
}

// One page's keys as panels of (dim, token), scaled; `at` is the page's first column.
static void decode_keys(const Store& store, const Side& side, const std::uint8_t* group, const std::uint8_t* scales, int at, float* panels) {
    const FloatLut lut = FloatLut::make(side.book.data(), side.index_bits());
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes())
        for (int i = 0; i < side.dim / 16; i++) {
            std::uint32_t word[4][16];
            index_words(side, group, i, word);
            for (int sub = 0; sub < SUBS; sub++) {
                const F scale = load_half(scales + 2 * (g * 16 + sub * LANES));
                const int column = at + g * 16 + sub * LANES;
                for (int j = 0; j < 4; j++)
                    for (int k = 0; k < 4; k++) {
                        const I code = (load<I>(word[j] + sub * LANES) >> (8 * k)) & 255;
                        const F c = side.index_bits() > kFloatLutBits ? gather(side.book.data(), code) : look_up_float(lut, code);
                        store_to(panels + panel_at(side.dim, native_dim(side, 16 * i + 4 * j + k), column), c * scale);
                    }
            }
        }
}

// One page's values as panels of (token, dim), scaled, dims in the values' own order (codes.h); the tile is `depth` tokens deep, `at` is the page's first.
static void decode_values(const Store& store, const Side& side, const std::uint8_t* group, const std::uint8_t* scales, int at, int depth, float* panels) {
    const FloatLut lut = FloatLut::make(side.book.data(), side.index_bits());
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes()) {
        alignas(64) float scale[16];
        for (int i = 0; i < 16; i += LANES) store_to(scale + i, load_half(scales + 2 * (g * 16 + i)));
        for (int i = 0; i < side.dim / 16; i++) {
            std::uint32_t word[4][16];
            index_words(side, group, i, word);
            for (int sub = 0; sub < SUBS; sub++)
                for (int j = 0; j < 4; j++)
                    for (int k = 0; k < 4; k++) {
                        const I code = (load<I>(word[j] + sub * LANES) >> (8 * k)) & 255;
                        const F c = side.index_bits() > kFloatLutBits ? gather(side.book.data(), code) : look_up_float(lut, code);
                        store_to(panels + panel_at(depth, at + g * 16 + 4 * j + k, 16 * i + sub * LANES), c * scale[4 * j + k]);
                    }
        }
    }
}

struct PrefillState {
    float *raw, *rotated;      // (rows, D) scaled queries
    float *exact, *compressed; // (rows, Dv) sums
    float *constant, *pairs;   // (rows,) and (rows, 2, padded): query times what stays and what turns of mean_k
    float *shift;              // (rows, tile_blocks) query . mean_k of each block of a tile
    float *exact_peak, *exact_mass, *peak, *mass;
    float *k_tile, *v_tile, *scores;
};

static PrefillState carve(const Attention& a, float* scratch) {
    const Store& s = *a.store;
    const std::size_t rows = prefill_rows(a), columns = key_columns(a) + kPanel;
    PrefillState p;
    auto take = [&](std::size_t n) { float* x = scratch; scratch += n; return x; };
    p.raw = take(rows * s.k.dim), p.rotated = take(rows * s.k.dim);
    p.exact = take(rows * s.v.dim), p.compressed = take(rows * s.v.dim);
    p.constant = take(rows), p.pairs = take(rows * 2 * s.k.turning.padded), p.shift = take(rows * tile_blocks(s));
    p.exact_peak = take(rows), p.exact_mass = take(rows), p.peak = take(rows), p.mass = take(rows);
    p.k_tile = take(columns * (s.k.dim + kPanel)), p.v_tile = take(columns * (s.v.dim + kPanel)), p.scores = take(kRowBlock * columns);
    return p;
}

// Scores of n columns (padded to LANES) of the K tile, hidden where `hide` says so, then absorbed with the V tile.
template <class Hide>
static void absorb_tile(const PrefillState& s, const Attention& a, const float* q, int num_rows, int n, int depth, const float* shift,
                        float* peak, float* mass, float* total, Hide hide) {
    const int padded = (n + LANES - 1) / LANES * LANES, k_dim = a.store->k.dim, v_dim = a.store->v.dim;
    for (int r = 0; r < num_rows; r += kRowBlock) {
        const int rows = min1(kRowBlock, num_rows - r);
        gemm(q + std::size_t(r) * k_dim, k_dim, rows, k_dim, s.k_tile, padded, s.scores, padded, false);
        for (int m = 0; m < rows; m++) {
            float* row = s.scores + std::size_t(m) * padded;
            if (shift)
                for (int i = 0; i < padded; i += LANES)
                    store_to(row + i, load<F>(row + i) + shift[(r + m) * tile_blocks(*a.store) + i / kGroupTokens]);
            if (a.cap > 0) cap_scores(row, padded, a.cap);
            for (int i = n; i < padded; i++) row[i] = kNothing;
            hide(r + m, row);
            absorb_scores(row, padded, peak[r + m], mass[r + m], total + std::size_t(r + m) * v_dim, v_dim);
        }
        gemm(s.scores, padded, rows, depth, s.v_tile, v_dim, total + std::size_t(r) * v_dim, v_dim, true);
    }
}

static void prefill_pages(const Attention& a, const Item& item, int kv_head, const PrefillState& s, int num_rows) {
    const Store& store = *a.store;
    const int page = store.page_tokens, step = tile_tokens(store) / page;
    const std::int64_t oldest = a.oldest(item.position + item.num_rows - 1);
    for (std::int64_t at = item.first_page; at < item.num_pages; at += step) {
        const int num_pages = int(min1<std::int64_t>(step, item.num_pages - at)), n = num_pages * page;
        for (int p = 0; p < num_pages; p++) {
            const std::int64_t id = item.pages[at + p];
            decode_keys(store, store.k, store.codes(store.k, id, kv_head), store.scales(store.k, id, kv_head), p * page, s.k_tile);
            decode_values(store, store.v, store.codes(store.v, id, kv_head), store.scales(store.v, id, kv_head), p * page, n, s.v_tile);
        }
        const Turning& turning = store.k.turning;
        const int blocks = tile_blocks(store), products = 2 * turning.padded;
        for (int b = 0; turning.num_pairs && b < n / kGroupTokens; b += kSpanBlocks)
            for (int r = 0; r < num_rows; r += kMaxGroup)
                kSpanShiftsOfRows[min1(kMaxGroup, num_rows - r) - 1](turning, at * store.groups_per_page() + b, s.pairs + std::size_t(r) * products,
                                                                     products, s.constant + r, s.shift + r * blocks + b, blocks);
        const std::int64_t start = store.sink_tokens + at * page;
        absorb_tile(s, a, s.rotated, num_rows, n, n, s.shift, s.peak, s.mass, s.compressed, [&](int row, float* scores) {
            if (start >= oldest) return;
            const std::int64_t hidden = a.oldest(item.position + row % item.num_rows) - start;
            for (std::int64_t i = 0; i < min1<std::int64_t>(n, hidden); i++) scores[i] = kNothing;
        });
    }
}

// Exact rows [from, to) of a block that begins at position `start`; each query row sees those in [oldest, own].
static void prefill_exact(const Attention& a, const Item& item, int kv_head, const PrefillState& s, int num_rows, const Rows& k,
                          const Rows& v, std::int64_t start, int from, int to) {
    if (from >= to) return;
    const Store& store = *a.store;
    const int n = to - from;
    float row[kMaxDim];
    const int padded = (n + LANES - 1) / LANES * LANES;
    for (int i = 0; i < padded; i++) {
        if (i < n) row_to_floats(k.data, k.dtype, kv_head * k.head_stride + (from + i) * k.token_stride, store.k.dim, row);
        for (int d = 0; d < store.k.dim; d++) s.k_tile[panel_at(store.k.dim, d, i)] = i < n ? row[d] : 0.0f;
    }
    for (int i = 0; i < n; i++) {
        row_to_floats(v.data, v.dtype, kv_head * v.head_stride + (from + i) * v.token_stride, store.v.dim, row);
        for (int d = 0; d < store.v.dim; d += LANES) store_to(s.v_tile + panel_at(n, i, d), load<F>(row + d));
    }
    absorb_tile(s, a, s.raw, num_rows, n, n, nullptr, s.exact_peak, s.exact_mass, s.exact, [&](int r, float* scores) {
        const std::int64_t p = item.position + r % item.num_rows, oldest = a.oldest(p);
        for (int i = 0; i < n; i++) {
            const std::int64_t key = start + from + i;
            if (key > p || key < oldest) scores[i] = kNothing;
        }
    });
}

static void prefill(const Attention& a, const Item& item, int kv_head, float* scratch) {
    const Store& store = *a.store;
    const int k_dim = store.k.dim, v_dim = store.v.dim, num_rows = num_heads(a, item);
    const PrefillState s = carve(a, scratch);
    for (int r = 0; r < num_rows; r++) {
        float *raw = s.raw + std::size_t(r) * k_dim, *rotated = s.rotated + std::size_t(r) * k_dim;
        load_query(a, item, kv_head, r, raw);
        s.constant[r] = dot_mean(store.k, kv_head, raw);
        for (int b = 0; b < tile_blocks(store); b++) s.shift[r * tile_blocks(store) + b] = s.constant[r];
        if (store.k.turning.num_pairs) pair_products(store.k, kv_head, raw, s.pairs + std::size_t(r) * 2 * store.k.turning.padded);
        std::memcpy(rotated, raw, sizeof(float) * k_dim);
        rotate(store.k, rotated);
        s.exact_peak[r] = s.peak[r] = kNothing;
        s.exact_mass[r] = s.mass[r] = 0;
    }
    std::memset(s.exact, 0, sizeof(float) * num_rows * v_dim);
    std::memset(s.compressed, 0, sizeof(float) * num_rows * v_dim);
    prefill_pages(a, item, kv_head, s, num_rows);
    const std::int64_t p = item.position, end = p + item.num_rows;
    prefill_exact(a, item, kv_head, s, num_rows, item.sink_k, item.sink_v, 0, 0, int(min1<std::int64_t>(item.sink_k.num_tokens, end)));
    if (item.window_k.num_tokens && end > store.sink_tokens) {
        const std::int64_t page_start = p - (p - store.sink_tokens) % store.page_tokens;
        prefill_exact(a, item, kv_head, s, num_rows, item.window_k, item.window_v, item.window_start, int(page_start - item.window_start),
                      int(min1<std::int64_t>(end - item.window_start, item.window_k.num_tokens)));
    }
    float* row = s.scores;
    for (int r = 0; r < num_rows; r++) {
        std::memcpy(row, s.exact + std::size_t(r) * v_dim, sizeof(float) * v_dim);
        row[v_dim] = s.exact_peak[r];
        row[v_dim + 1] = s.exact_mass[r];
        finish_row(a, item, kv_head, r, s.compressed + std::size_t(r) * v_dim, s.peak[r], s.mass[r], row);
    }
}
