// One layer's pages for Python: what it hands over is checked, then the kernels run without the GIL.
//
// Everything a kernel will touch is proven here: page ids against the pages held, rows against the layer's geometry,
// windows against the queries. Failures raise ValueError before any work.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

#include "store_parts.h"

namespace tq {

constexpr int kSegmentTokens = 2048; // one decode task; positions alone decide where it begins

class NativeStore {
  public:
    NativeStore(int heads, int page_tokens, int sink_tokens, const std::string& scale, const std::string& isa) : level_(find_level(isa)) {
        if (heads < 1 || page_tokens < kGroupTokens || page_tokens % kGroupTokens || page_tokens > 1 << 20 || sink_tokens < 0)
            throw std::invalid_argument("heads, page_tokens (a multiple of 16) or sink_tokens are out of range");
        store_.heads = heads;
        store_.page_tokens = page_tokens;
        store_.sink_tokens = sink_tokens;
        store_.scale_kind = scale_kind(scale);
    }

    // Pages to encode: ids (P,), which page of its conversation each is (P,), and the row where each begins (P,).
    struct PagesOfRows {
        View ids, numbers, starts;
        const std::int64_t* id() const { return static_cast<const std::int64_t*>(ids.data()); }
        const std::int64_t* number() const { return static_cast<const std::int64_t*>(numbers.data()); }
        const std::int64_t* start() const { return static_cast<const std::int64_t*>(starts.data()); }
    };

    // book: 2^bits centroids with the thresholds between them, or a trellis's 2^(bits + 1) levels and None.
    void set_side(bool is_key, int dim, int bits, nanobind::handle signs, nanobind::handle base, nanobind::handle mean, nanobind::handle book, nanobind::handle thresholds) {
        if (store_.num_pages) throw std::invalid_argument("the geometry cannot change once there are pages");
        Side side = make_side(is_key, store_.heads, dim, bits, signs, base, mean, book, thresholds);
        side.table = make_table(side, *level_);
        (is_key ? store_.k : store_.v) = std::move(side);
    }

    // Keys' mean (heads * dim,) float64 before the turn, averaged over blocks of 16 tokens; frequencies (pairs,) float64.
    void set_rotary(nanobind::handle mean, nanobind::handle frequencies, int stride, int gap) {
        Side& side = store_.k;
        if (store_.num_pages) throw std::invalid_argument("the geometry cannot change once there are pages");
        if (side.dim == 0) throw std::invalid_argument("the store's keys are not set");
        auto means = numbers<double>(mean, "mean", std::int64_t(store_.heads) * side.dim);
        auto turns = numbers<double>(frequencies, "frequencies", -1);
        for (const auto* values : {&means, &turns})
            for (double x : *values)
                if (!std::isfinite(x)) throw std::invalid_argument("the rotation of keys has numbers that are none");
        if (turns.empty() || turns.size() > std::size_t(kMaxPairs) || stride < 1 || stride > kMaxDim || gap < 1 || gap > kMaxDim)
            throw std::invalid_argument("the rotation's pairs are out of range");
        std::vector<char> is_taken(side.dim, 0);
        for (int j = 0; j < int(turns.size()); j++)
            for (int d : {stride * j, stride * j + gap})
                if (d >= side.dim || is_taken[d]++) throw std::invalid_argument("the rotation's pairs overlap or do not fit the head dimension");
        side.mean.resize(means.size());
        for (std::size_t i = 0; i < means.size(); i++) side.mean[i] = is_taken[i % side.dim] ? 0.0f : float(means[i]);
        side.turning = make_turning(store_.heads, side.dim, std::move(means), std::move(turns), stride, gap);
    }

    std::string isa() const { return level_->name; }
    std::size_t num_pages() const { return store_.num_pages; }
    std::size_t page_bytes() const { return store_.page_bytes(); }

    void grow(std::int64_t pages) {
        expect_ready();
        if (pages < 0 || std::size_t(pages) > std::size_t(1) << 40) throw std::invalid_argument("num_pages is out of range");
        std::lock_guard lock(store_.mutex);
        store_.grow(std::size_t(pages));
    }

    // k (H, rows, D) and v (H, rows, Dv); numbers (P,): which page of its conversation each is; starts (P,): its first row.
    void encode(nanobind::handle page_ids, nanobind::handle numbers, nanobind::handle starts, nanobind::handle k, nanobind::handle v) {
        const View k_view(k, "k", 3), v_view(v, "v", 3);
        const Rows sides[2] = {rows_of(k_view, store_.k), rows_of(v_view, store_.v)};
        const PagesOfRows pages = pages_of_rows(page_ids, numbers, starts, sides);
        nanobind::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        encode_rows(pages, sides);
    }

    // codes (P, H, page, bytes) and scales (P, H, page) of one side; `write` is from them, else into them.
    void transfer(bool is_key, bool write, nanobind::handle page_ids, nanobind::handle codes, nanobind::handle scales) {
        const Side& side = is_key ? store_.k : store_.v;
        const View ids = pages_of(page_ids, write), codes_view(codes, "codes", 4, !write), scales_view(scales, "scales", 3, !write);
        const std::int64_t n = ids.shape(0), row_bytes = std::int64_t(side.dim) * side.bits / 8;
        codes_view.expect_type("B", 1);
        codes_view.expect_shape({n, store_.heads, store_.page_tokens, row_bytes});
        codes_view.expect_dense();
        scales_view.expect_type("e", 2);
        scales_view.expect_shape({n, store_.heads, store_.page_tokens});
        scales_view.expect_dense();
        const auto* id = static_cast<const std::int64_t*>(ids.data());
        auto *packed = static_cast<std::uint8_t*>(codes_view.data()), *halves = static_cast<std::uint8_t*>(scales_view.data());
        const std::size_t page_row = row_bytes * store_.page_tokens, scale_bytes = store_.scale_bytes();
        nanobind::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        run_tasks(int(n) * store_.heads, [&](int task, int) {
            const std::int64_t page = id[task / store_.heads];
            std::uint8_t *codes = store_.codes(side, page, task % store_.heads), *scales = store_.scales(side, page, task % store_.heads);
            if (write) {
                level_->from_canonical(store_, side, packed + task * page_row, codes);
                std::memcpy(scales, halves + task * scale_bytes, scale_bytes);
            } else {
                level_->to_canonical(store_, side, codes, packed + task * page_row);
                std::memcpy(halves + task * scale_bytes, scales, scale_bytes);
            }
        });
    }

    // Centroids (H, P*page, D) and scales (H, P*page), float32; `restore` gives decoded values in the model's basis, of
    // pages first_page, first_page + 1, ... of a conversation.
    void decode(bool is_key, bool restore, nanobind::handle page_ids, std::int64_t first_page, nanobind::handle rows, nanobind::handle scales) {
        const Side& side = is_key ? store_.k : store_.v;
        const View ids = pages_of(page_ids, false), rows_view(rows, "rows", 3, true), scales_view(scales, "scales", 2, true);
        const std::int64_t n = ids.shape(0), tokens = n * store_.page_tokens;
        rows_view.expect_type("f", 4);
        rows_view.expect_shape({store_.heads, tokens, side.dim});
        rows_view.expect_dense();
        scales_view.expect_type("f", 4);
        scales_view.expect_shape({store_.heads, tokens});
        scales_view.expect_dense();
        const auto* id = static_cast<const std::int64_t*>(ids.data());
        auto *out = static_cast<float*>(rows_view.data()), *out_scales = static_cast<float*>(scales_view.data());
        expect_position(first_page);
        std::vector<std::int64_t> numbers(n);
        for (std::int64_t i = 0; i < n; i++) numbers[i] = first_page + i;
        nanobind::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        const Centres centres(store_, numbers.data(), restore && is_key ? int(n) : 0);
        run_tasks(int(n) * store_.heads, [&](int task, int) {
            const int page = task / store_.heads, head = task % store_.heads;
            const std::size_t row = std::size_t(head) * tokens + std::size_t(page) * store_.page_tokens;
            float *mine = out + row * side.dim, *mine_scales = out_scales + row;
            level_->decode_page(store_, side, store_.codes(side, id[page], head), store_.scales(side, id[page], head), mine, mine_scales);
            if (!restore) return;
            for (int t = 0; t < store_.page_tokens; t++)
                for (int d = 0; d < side.dim; d++) mine[t * side.dim + d] *= mine_scales[t];
            level_->unrotate_rows(side, centres.of(side, page, head), mine, store_.page_tokens);
        });
    }

    // figures (B, 9) int64, one row per sequence: q_start, num_queries, where its pages begin in page_ids and how many there
    // are, first row and number of rows of its sink, position, first row and number of rows of its window. exact: sink keys,
    // sink values, window keys, window values, each (H, rows, D) of all sequences.
    void attend(nanobind::handle q, nanobind::handle out, nanobind::handle figures, nanobind::handle page_ids, nanobind::handle exact, float scale, nanobind::handle sinks,
                std::int64_t window, float cap) {
        expect_ready();
        const View q_view(q, "queries", 4), out_view(out, "out", 4, true);
        q_view.expect_shape({-1, -1, -1, store_.k.dim});
        q_view.expect_dense_last_axis();
        out_view.expect_shape({q_view.shape(0), q_view.shape(1), q_view.shape(2), store_.v.dim});
        out_view.expect_dense();
        if (q_view.shape(1) % store_.heads || q_view.shape(1) == 0) throw std::invalid_argument("query heads are no multiple of the KV heads");
        if (!(cap >= 0) || std::isinf(cap)) throw std::invalid_argument("cap is no finite number from 0 on");
        std::optional<View> sinks_view;
        if (!sinks.is_none()) {
            sinks_view.emplace(sinks, "sinks", 1);
            sinks_view->expect_type("f", 4);
            sinks_view->expect_shape({q_view.shape(1)});
            sinks_view->expect_dense();
        }
        const View figures_view(figures, "figures", 2), ids = pages_of(page_ids, false);
        if (nanobind::len(exact) != 4) throw std::invalid_argument("exact rows are four arrays");
        const View sink_k(exact[0], "sink_k", 3), sink_v(exact[1], "sink_v", 3), window_k(exact[2], "window_k", 3), window_v(exact[3], "window_v", 3);
        const ExactRows given{rows_of(sink_k, store_.k), rows_of(sink_v, store_.v), rows_of(window_k, store_.k), rows_of(window_v, store_.v)};
        if (given.sink_k.dtype != given.sink_v.dtype || given.window_k.dtype != given.window_v.dtype) throw std::invalid_argument("exact keys and values differ in type");
        Attention a = over_store(int(q_view.shape(1)), int(q_view.shape(2)), scale, window);
        a.q = q_view.data();
        a.q_dtype = q_view.dtype();
        for (int i = 0; i < 3; i++) a.q_strides[i] = q_view.stride(i);
        a.out = out_view.data();
        a.out_dtype = out_view.dtype();
        a.cap = cap;
        a.sinks = sinks_view ? static_cast<const float*>(sinks_view->data()) : nullptr;
        Attention many = a;
        add_sequences(q_view.shape(0), figures_view, ids, given, a, many);
        nanobind::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        compute(a, many);
    }

    // Rows that a step of one new token a sequence moves: copies (2, n), from and to rows of a layer; writes (2, n), from new rows
    // and to those. Pages to encode before the writes, from the layer's rows.
    struct Moves {
        const std::int64_t *copies, *writes;
        std::int64_t num_copies, num_writes;
        nanobind::handle page_ids, numbers, starts; // of pages to encode; None without any
    };

    // This layer's part of such a step, checked against its rows k (H, rows, D) and v (H, rows, Dv), float32.
    struct TokenStep {
        View k, v, ids;
        std::optional<PagesOfRows> closed;
        Rows sides[2];
        Attention attention;
    };

    std::unique_ptr<TokenStep> plan_token(nanobind::handle k, nanobind::handle v, nanobind::handle figures, nanobind::handle page_ids, const Moves& moves,
                                          std::int64_t batch, int num_q_heads, float scale, std::int64_t window) const {
        expect_ready();
        std::unique_ptr<TokenStep> step(new TokenStep{View(k, "k", 3, true), View(v, "v", 3, true), pages_of(page_ids, false), {}, {}, {}});
        step->k.expect_type("f", 4);
        step->v.expect_type("f", 4);
        step->sides[0] = rows_of(step->k, store_.k), step->sides[1] = rows_of(step->v, store_.v);
        const std::int64_t num_rows = std::min(step->sides[0].num_tokens, step->sides[1].num_tokens);
        const auto expect_rows = [](const std::int64_t* rows, std::int64_t count, std::int64_t limit) {
            for (std::int64_t i = 0; i < count; i++)
                if (rows[i] < 0 || rows[i] >= limit) throw std::invalid_argument("rows to move are out of range");
        };
        expect_rows(moves.copies, 2 * moves.num_copies, num_rows);
        expect_rows(moves.writes, moves.num_writes, batch);
        expect_rows(moves.writes + moves.num_writes, moves.num_writes, num_rows);
        if (!moves.page_ids.is_none()) step->closed.emplace(pages_of_rows(moves.page_ids, moves.numbers, moves.starts, step->sides));
        if (num_q_heads % store_.heads || num_q_heads == 0) throw std::invalid_argument("query heads are no multiple of the KV heads");
        Attention& a = step->attention = over_store(num_q_heads, 1, scale, window);
        a.q_strides[0] = std::int64_t(num_q_heads) * store_.k.dim, a.q_strides[1] = a.q_strides[2] = store_.k.dim;
        Attention none = a;
        const View figures_view(figures, "figures", 2);
        const Rows &all_k = step->sides[0], &all_v = step->sides[1];
        add_sequences(batch, figures_view, step->ids, {all_k, all_v, all_k, all_v}, a, none);
        return step;
    }

    // Moves rows, encodes pages, writes keys (B, H, 1, D) and values (B, H, 1, Dv), then attends for q (B, Hq, 1, D): out
    // (B, Hq, 1, Dv), all dense float32. Without the GIL.
    void append_and_attend(TokenStep& step, const Moves& moves, const float* q, const float* keys, const float* values, float* out) {
        std::lock_guard lock(store_.mutex);
        const float* from[2] = {keys, values};
        for (int i = 0; i < 2; i++) copy_rows(step.sides[i], i ? store_.v.dim : store_.k.dim, moves);
        if (step.closed) encode_rows(*step.closed, step.sides);
        for (int i = 0; i < 2; i++) {
            const int dim = i ? store_.v.dim : store_.k.dim;
            for (std::int64_t n = 0; n < moves.num_writes; n++)
                for (int head = 0; head < store_.heads; head++)
                    std::memcpy(row_of(step.sides[i], head, moves.writes[moves.num_writes + n]), from[i] + (moves.writes[n] * store_.heads + head) * dim, sizeof(float) * dim);
        }
        step.attention.q = q, step.attention.out = out;
        Attention none;
        compute(step.attention, none);
    }

    int heads() const { return store_.heads; }
    int k_dim() const { return store_.k.dim; }
    int v_dim() const { return store_.v.dim; }

  private:
    void expect_ready() const {
        if (store_.k.dim == 0 || store_.v.dim == 0) throw std::invalid_argument("the store's sides are not set");
    }

    struct ExactRows { Rows sink_k, sink_v, window_k, window_v; };

    PagesOfRows pages_of_rows(nanobind::handle page_ids, nanobind::handle numbers, nanobind::handle starts, const Rows* sides) const {
        View ids = pages_of(page_ids, true);
        const std::int64_t count = ids.shape(0);
        PagesOfRows pages{std::move(ids), places_of(numbers, "numbers", count), places_of(starts, "starts", count)};
        for (std::int64_t i = 0; i < count; i++) {
            expect_position(pages.number()[i]);
            for (int side = 0; side < 2; side++)
                if (pages.start()[i] < 0 || pages.start()[i] > sides[side].num_tokens - store_.page_tokens)
                    throw std::invalid_argument("k and v must hold page_tokens rows from each start on");
        }
        return pages;
    }

    // Whoever calls this holds the mutex.
    void encode_rows(const PagesOfRows& pages, const Rows* sides) {
        const int num_pages = int(pages.ids.shape(0));
        const Centres centres(store_, pages.number(), num_pages);
        run_tasks(num_pages * store_.heads, [&](int task, int) {
            const int page = task / store_.heads, head = task % store_.heads;
            for (const Side* side : {&store_.k, &store_.v})
                level_->encode_page(store_, *side, sides[side == &store_.v], head, int(pages.start()[page]), centres.of(*side, page, head),
                                    store_.codes(*side, pages.id()[page], head), store_.scales(*side, pages.id()[page], head));
        });
    }

    static float* row_of(const Rows& rows, int head, std::int64_t row) {
        return const_cast<float*>(static_cast<const float*>(rows.data)) + head * rows.head_stride + row * rows.token_stride;
    }

    // All are read before any is written.
    void copy_rows(const Rows& rows, int dim, const Moves& moves) const {
        std::vector<float> kept(std::size_t(moves.num_copies) * dim);
        for (int head = 0; head < (moves.num_copies ? store_.heads : 0); head++) {
            for (std::int64_t n = 0; n < moves.num_copies; n++) std::memcpy(&kept[n * dim], row_of(rows, head, moves.copies[n]), sizeof(float) * dim);
            for (std::int64_t n = 0; n < moves.num_copies; n++)
                std::memcpy(row_of(rows, head, moves.copies[moves.num_copies + n]), &kept[n * dim], sizeof(float) * dim);
        }
    }

    Attention over_store(int num_q_heads, int num_rows, float scale, std::int64_t window) const {
        if (window < 0) throw std::invalid_argument("window is negative");
        Attention a;
        a.store = &store_;
        a.num_q_heads = num_q_heads;
        a.num_rows = num_rows;
        a.group = num_q_heads / store_.heads;
        a.scale = scale;
        a.window = window;
        a.segment_pages = std::max(1, kSegmentTokens / store_.page_tokens);
        return a;
    }

    void add_sequences(std::int64_t batch, const View& figures, const View& ids, const ExactRows& given, Attention& few, Attention& many) const {
        figures.expect_type("lq", 8);
        figures.expect_dense();
        figures.expect_shape({batch, 9});
        for (int b = 0; b < int(batch); b++) add_items(b, static_cast<const std::int64_t*>(figures.data()) + 9 * b, ids, given, few, many);
    }

    // Whoever calls this holds the mutex.
    void compute(Attention& few, Attention& many) {
        for (const Attention* each : {&few, &many})
            for (const Item& item : each->items) grow_spans(store_.k.turning, store_.sink_tokens, item.num_pages * store_.groups_per_page());
        run_decode(few);
        run_prefill(many);
    }

    static void expect_position(std::int64_t first_page) {
        if (first_page < 0 || first_page > std::int64_t(1) << 40) throw std::invalid_argument("first_page is out of range");
    }

    View pages_of(nanobind::handle object, bool distinct) const {
        expect_ready();
        View view(object, "page_ids", 1);
        view.expect_type("lq", 8);
        view.expect_dense();
        const auto* id = static_cast<const std::int64_t*>(view.data());
        for (std::int64_t i = 0; i < view.shape(0); i++)
            if (id[i] < 0 || std::size_t(id[i]) >= store_.num_pages)
                throw std::invalid_argument("page id " + std::to_string(id[i]) + " is not among the " + std::to_string(store_.num_pages) + " pages held");
        if (view.shape(0) > 1 << 24) throw std::invalid_argument("too many pages in one call");
        if (distinct) {
            std::vector<std::int64_t> sorted(id, id + view.shape(0));
            std::sort(sorted.begin(), sorted.end());
            if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) throw std::invalid_argument("page_ids names a page twice");
        }
        return view;
    }

    Rows rows_of(const View& view, const Side& side) const {
        view.expect_shape({store_.heads, -1, side.dim});
        view.expect_dense_last_axis();
        if (view.shape(1) > 1 << 30) view.fail("has too many rows");
        return {view.data(), view.stride(0), view.stride(1), view.dtype(), int(view.shape(1))};
    }

    // (P,) int64 beside page ids.
    static View places_of(nanobind::handle object, const char* name, std::int64_t count) {
        View view(object, name, 1);
        view.expect_type("lq", 8);
        view.expect_dense();
        view.expect_shape({count});
        return view;
    }

    // Rows [first, first + count) of a side's exact rows.
    static Rows part_of(const Rows& rows, std::int64_t first, std::int64_t count) {
        if (first < 0 || count < 0 || first > rows.num_tokens - count) throw std::invalid_argument("a view's exact rows are out of range");
        Rows part = rows;
        const std::int64_t bytes = rows.dtype == Dtype::f32 ? 4 : 2;
        part.data = static_cast<const std::uint8_t*>(rows.data) + first * rows.token_stride * bytes;
        part.num_tokens = int(count);
        return part;
    }

    // row: nine figures, as `attend` says.
    void add_items(int batch, const std::int64_t* row, const View& ids, const ExactRows& given, Attention& few, Attention& many) const {
        const std::int64_t q_start = row[0], num_queries = row[1], pages_at = row[2], pages_given = row[3];
        constexpr std::int64_t far = std::int64_t(1) << 40;
        if (q_start < 0 || q_start > far || num_queries < 0 || num_queries > few.num_rows) throw std::invalid_argument("a view's queries are out of range");
        if (num_queries == 0) return;
        if (pages_at < 0 || pages_given < 0 || pages_at > ids.shape(0) - pages_given) throw std::invalid_argument("a view's pages are out of range");
        Item item;
        item.batch = batch;
        item.pages = static_cast<const std::int64_t*>(ids.data()) + pages_at;
        if (row[5]) {
            item.sink_k = part_of(given.sink_k, row[4], row[5]);
            item.sink_v = part_of(given.sink_v, row[4], row[5]);
        }
        if (row[8]) {
            item.window_k = part_of(given.window_k, row[7], row[8]);
            item.window_v = part_of(given.window_v, row[7], row[8]);
        }
        item.window_start = row[8] ? row[6] : 0;
        check_exact(item, q_start, q_start + num_queries, few.oldest(q_start));
        for (std::int64_t t = 0; t < num_queries;) {
            const std::int64_t p = q_start + t, sink = store_.sink_tokens;
            const std::int64_t page = p < sink ? -1 : (p - sink) / store_.page_tokens;
            const std::int64_t page_end = page < 0 ? std::min<std::int64_t>(sink, p + store_.page_tokens) : sink + (page + 1) * store_.page_tokens;
            item.first_row = int(t);
            item.num_rows = int(std::min(page_end - p, num_queries - t));
            item.position = p;
            item.num_pages = std::max<std::int64_t>(page, 0);
            if (item.num_pages > pages_given) throw std::invalid_argument("a view has fewer pages than its queries see");
            item.first_page = std::min(item.num_pages, std::max<std::int64_t>(0, few.oldest(p) - sink) / store_.page_tokens);
            item.num_segments = int(std::max<std::int64_t>(1, (item.num_pages - item.first_page + few.segment_pages - 1) / few.segment_pages));
            (num_queries <= kDecodeRows ? few : many).items.push_back(item);
            t += item.num_rows;
        }
    }

    // Sink and window must hold every exact key that the queries [first, end) see; a sink that no sliding window reaches
    // any more may be gone. oldest: the first key that they see.
    void check_exact(const Item& item, std::int64_t first, std::int64_t end, std::int64_t oldest) const {
        const std::int64_t sink = store_.sink_tokens;
        const bool is_gone = item.sink_k.num_tokens == 0 && oldest >= sink;
        if (!is_gone && item.sink_k.num_tokens != std::min(end, sink)) throw std::invalid_argument("the sink rows do not match the queries' positions");
        if (end <= sink) return;
        const std::int64_t p = std::max(first, sink), page_start = p - (p - sink) % store_.page_tokens;
        if (item.window_start < sink || item.window_start > page_start || item.window_start + item.window_k.num_tokens != end)
            throw std::invalid_argument("the window rows do not cover the queries' own pages");
    }

    void run_decode(Attention& a) const {
        struct Task { int item, head, segment; };
        std::vector<Task> tasks;
        std::vector<std::size_t> starts; // of each item's partials
        std::size_t total = 0;
        for (int i = 0; i < int(a.items.size()); i++) {
            starts.push_back(total);
            total += level_->partial_floats(a, a.items[i]) * store_.heads;
            for (int head = 0; head < store_.heads; head++)
                for (int s = 0; s < a.items[i].num_segments; s++) tasks.push_back({i, head, s});
        }
        if (tasks.empty()) return;
        std::vector<std::atomic<int>> left(a.items.size() * store_.heads);
        for (std::size_t i = 0; i < left.size(); i++) left[i] = a.items[i / store_.heads].num_segments;
        std::vector<float> partials(total);
        Scratch scratch(level_->decode_scratch(a));
        run_tasks(int(tasks.size()), [&](int task, int worker) {
            const auto [i, head, segment] = tasks[task];
            const Item& item = a.items[i];
            float* mine = partials.data() + starts[i] + level_->partial_floats(a, item) * head;
            level_->decode_segment(a, item, head, segment, mine, scratch.of(worker));
            if (left[std::size_t(i) * store_.heads + head].fetch_sub(1) == 1) level_->merge_segments(a, item, head, mine, scratch.of(worker));
        });
    }

    void run_prefill(Attention& a) const {
        if (a.items.empty()) return;
        Scratch scratch(level_->prefill_scratch(a));
        const int num_tasks = int(a.items.size()) * store_.heads;
        run_tasks(num_tasks, [&](int task, int worker) { // last rows first: they see most
            const int reversed = num_tasks - 1 - task;
            level_->prefill(a, a.items[reversed / store_.heads], reversed % store_.heads, scratch.of(worker));
        });
    }

    const KernelTable* level_;
    Store store_;
};

} // namespace tq
