// turboquant_kv.native._kernels: checks what Python hands over, then runs the kernels without the GIL.
//
// Everything a kernel will touch is proven here: page ids against the pages held, rows against the layer's geometry,
// windows against the queries. Failures raise ValueError before any work.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "buffers.h"
#include "dispatch.h"
#include "block_module.h"
#include "linear_module.h"
#include "pool.h"

namespace nb = nanobind;

namespace tq {
namespace {

constexpr int kSegmentTokens = 2048; // one decode task; positions alone decide where it begins

template <class T> std::vector<T> numbers(nb::handle object, const char* name, std::int64_t count) { // count -1: any
    View view(object, name, 1);
    view.expect_type(sizeof(T) == 4 ? "f" : "d", sizeof(T));
    view.expect_shape({count});
    view.expect_dense();
    const T* p = static_cast<const T*>(view.data());
    return std::vector<T>(p, p + view.shape(0));
}
std::vector<float> floats(nb::handle object, const char* name, std::int64_t count) { return numbers<float>(object, name, count); }

Side make_side(bool is_key, int heads, int dim, int bits, nb::handle signs, nb::handle base, nb::handle mean, nb::handle book, nb::handle thresholds) {
    if (dim < 16 || dim > kMaxDim || dim % 16) throw std::invalid_argument("head dimensions are multiples of 16 up to 512");
    const bool is_trellis = thresholds.is_none();
    if (is_trellis && (bits < 2 || bits > 4)) throw std::invalid_argument("bits of a trellis are 2, 3 or 4");
    if (is_trellis && dim < kMinTrellisDim) throw std::invalid_argument("head dimensions of a trellis are 64 at least");
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) throw std::invalid_argument("bits are 2, 3, 4 or 8");
    Side side;
    side.is_key = is_key;
    side.is_trellis = is_trellis;
    side.dim = dim;
    side.bits = bits;
    side.signs = floats(signs, "signs", dim);
    const std::int64_t base_floats = View(base, "base", 1).shape(0);
    while (std::int64_t(side.base_order) * side.base_order < base_floats) side.base_order++;
    const int power = dim / side.base_order;
    if (dim % side.base_order || power < 4 || (power & (power - 1))) throw std::invalid_argument("base does not divide the head dimension");
    side.base = floats(base, "base", std::int64_t(side.base_order) * side.base_order);
    if (!mean.is_none()) side.mean = floats(mean, "mean", std::int64_t(heads) * dim);
    side.book = floats(book, "book", 1 << side.index_bits());
    if (!is_trellis) side.thresholds = floats(thresholds, "thresholds", (1 << bits) - 1);
    return side;
}

ScaleKind scale_kind(const std::string& name) {
    if (name == "unbiased") return ScaleKind::unbiased;
    if (name == "norm") return ScaleKind::norm;
    if (name == "least_squares") return ScaleKind::least_squares;
    if (name == "plain") return ScaleKind::plain;
    throw std::invalid_argument("scale '" + name + "' is unknown");
}

// Scratch of each worker that turns up, made at its first task.
class Scratch {
  public:
    explicit Scratch(std::size_t floats_each) : floats_each_(floats_each) {}
    float* of(int worker) {
        if (!data_[worker]) data_[worker].reset(new float[floats_each_]);
        return data_[worker].get();
    }

  private:
    std::size_t floats_each_;
    std::array<std::unique_ptr<float[]>, kMaxThreads> data_;
};

// What keys and values of a conversation's pages are centred by.
class Centres {
  public:
    // numbers (num_pages,): which page of its conversation each is.
    Centres(const Store& store, const std::int64_t* numbers, int num_pages)
        : store_(store), num_blocks_(std::int64_t(num_pages) * store.groups_per_page()) {
        const Side& side = store.k;
        if (side.turning.num_pairs == 0) return;
        turned_.resize(std::size_t(store.heads) * num_blocks_ * side.dim);
        run_tasks(num_pages, [&](int page, int) {
            for (int g = 0; g < store.groups_per_page(); g++) {
                const std::int64_t block = std::int64_t(page) * store.groups_per_page() + g;
                const double start = double(store.sink_tokens) + double(numbers[page]) * store.page_tokens + double(g) * kGroupTokens;
                block_means(side.turning, store.heads, side.dim, start + (kGroupTokens - 1) / 2.0, &turned_[block * side.dim], num_blocks_ * side.dim);
            }
        });
    }
    Centre of(const Side& side, int page, int head) const {
        if (side.turning.num_pairs) return {&turned_[(head * num_blocks_ + std::int64_t(page) * store_.groups_per_page()) * side.dim], side.dim};
        return {side.mean.empty() ? nullptr : &side.mean[std::size_t(head) * side.dim], 0};
    }

  private:
    const Store& store_;
    std::int64_t num_blocks_;
    std::vector<float> turned_; // keys': (heads, blocks, dim)
};

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

    // book: 2^bits centroids with the thresholds between them, or a trellis's 2^(bits + 1) levels and None.
    void set_side(bool is_key, int dim, int bits, nb::handle signs, nb::handle base, nb::handle mean, nb::handle book, nb::handle thresholds) {
        if (store_.num_pages) throw std::invalid_argument("the geometry cannot change once there are pages");
        Side side = make_side(is_key, store_.heads, dim, bits, signs, base, mean, book, thresholds);
        side.table = make_table(side, *level_);
        (is_key ? store_.k : store_.v) = std::move(side);
    }

    // Keys' mean (heads * dim,) float64 before the turn, averaged over blocks of 16 tokens; frequencies (pairs,) float64.
    void set_rotary(nb::handle mean, nb::handle frequencies, int stride, int gap) {
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
    void encode(nb::handle page_ids, nb::handle numbers, nb::handle starts, nb::handle k, nb::handle v) {
        const View ids = pages_of(page_ids, true), k_view(k, "k", 3), v_view(v, "v", 3);
        const View number_view = places_of(numbers, "numbers", ids.shape(0)), start_view = places_of(starts, "starts", ids.shape(0));
        const Rows sides[2] = {rows_of(k_view, store_.k), rows_of(v_view, store_.v)};
        const auto *id = static_cast<const std::int64_t*>(ids.data()), *number = static_cast<const std::int64_t*>(number_view.data());
        const auto* start = static_cast<const std::int64_t*>(start_view.data());
        for (std::int64_t i = 0; i < ids.shape(0); i++) {
            expect_position(number[i]);
            for (const Rows& rows : sides)
                if (start[i] < 0 || start[i] > rows.num_tokens - store_.page_tokens) throw std::invalid_argument("k and v must hold page_tokens rows from each start on");
        }
        nb::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        const Centres centres(store_, number, int(ids.shape(0)));
        run_tasks(int(ids.shape(0)) * store_.heads, [&](int task, int) {
            const int page = task / store_.heads, head = task % store_.heads;
            for (const Side* side : {&store_.k, &store_.v})
                level_->encode_page(store_, *side, sides[side == &store_.v], head, int(start[page]), centres.of(*side, page, head),
                                    store_.codes(*side, id[page], head), store_.scales(*side, id[page], head));
        });
    }

    // codes (P, H, page, bytes) and scales (P, H, page) of one side; `write` is from them, else into them.
    void transfer(bool is_key, bool write, nb::handle page_ids, nb::handle codes, nb::handle scales) {
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
        nb::gil_scoped_release release;
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
    void decode(bool is_key, bool restore, nb::handle page_ids, std::int64_t first_page, nb::handle rows, nb::handle scales) {
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
        nb::gil_scoped_release release;
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
    void attend(nb::handle q, nb::handle out, nb::handle figures, nb::handle page_ids, nb::handle exact, float scale, nb::handle sinks,
                std::int64_t window, float cap) {
        expect_ready();
        const View q_view(q, "queries", 4), out_view(out, "out", 4, true);
        q_view.expect_shape({-1, -1, -1, store_.k.dim});
        q_view.expect_dense_last_axis();
        out_view.expect_shape({q_view.shape(0), q_view.shape(1), q_view.shape(2), store_.v.dim});
        out_view.expect_dense();
        if (q_view.shape(1) % store_.heads || q_view.shape(1) == 0) throw std::invalid_argument("query heads are no multiple of the KV heads");
        if (window < 0) throw std::invalid_argument("window is negative");
        if (!(cap >= 0) || std::isinf(cap)) throw std::invalid_argument("cap is no finite number from 0 on");
        Attention a;
        a.store = &store_;
        a.q = q_view.data();
        a.q_dtype = q_view.dtype();
        for (int i = 0; i < 3; i++) a.q_strides[i] = q_view.stride(i);
        a.out = out_view.data();
        a.out_dtype = out_view.dtype();
        a.num_q_heads = int(q_view.shape(1));
        a.num_rows = int(q_view.shape(2));
        a.group = a.num_q_heads / store_.heads;
        a.scale = scale;
        a.window = window;
        a.cap = cap;
        a.segment_pages = std::max(1, kSegmentTokens / store_.page_tokens);
        std::optional<View> sinks_view;
        if (!sinks.is_none()) {
            sinks_view.emplace(sinks, "sinks", 1);
            sinks_view->expect_type("f", 4);
            sinks_view->expect_shape({a.num_q_heads});
            sinks_view->expect_dense();
            a.sinks = static_cast<const float*>(sinks_view->data());
        }
        const View figures_view(figures, "figures", 2), ids = pages_of(page_ids, false);
        figures_view.expect_type("lq", 8);
        figures_view.expect_dense();
        figures_view.expect_shape({q_view.shape(0), 9});
        if (nb::len(exact) != 4) throw std::invalid_argument("exact rows are four arrays");
        const View sink_k(exact[0], "sink_k", 3), sink_v(exact[1], "sink_v", 3), window_k(exact[2], "window_k", 3), window_v(exact[3], "window_v", 3);
        const ExactRows given{rows_of(sink_k, store_.k), rows_of(sink_v, store_.v), rows_of(window_k, store_.k), rows_of(window_v, store_.v)};
        if (given.sink_k.dtype != given.sink_v.dtype || given.window_k.dtype != given.window_v.dtype) throw std::invalid_argument("exact keys and values differ in type");
        Attention many = a;
        for (int b = 0; b < int(q_view.shape(0)); b++)
            add_items(b, static_cast<const std::int64_t*>(figures_view.data()) + 9 * b, ids, given, a, many);
        nb::gil_scoped_release release;
        std::lock_guard lock(store_.mutex);
        for (const Attention* each : {&a, &many})
            for (const Item& item : each->items) grow_spans(store_.k.turning, store_.sink_tokens, item.num_pages * store_.groups_per_page());
        run_decode(a);
        run_prefill(many);
    }

  private:
    void expect_ready() const {
        if (store_.k.dim == 0 || store_.v.dim == 0) throw std::invalid_argument("the store's sides are not set");
    }

    static void expect_position(std::int64_t first_page) {
        if (first_page < 0 || first_page > std::int64_t(1) << 40) throw std::invalid_argument("first_page is out of range");
    }

    View pages_of(nb::handle object, bool distinct) const {
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

    struct ExactRows { Rows sink_k, sink_v, window_k, window_v; };

    // (P,) int64 beside page ids.
    static View places_of(nb::handle object, const char* name, std::int64_t count) {
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

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const auto* level : available_levels()) names.push_back(level->name);
    return names;
}

// The bits of an MLX array of bfloat16, which NumPy lacks, as a read-only NumPy array; shares and holds its memory.
nb::ndarray<nb::numpy, const std::uint16_t> bfloat16_bits(nb::handle array) {
    auto view = std::make_unique<View>(View::of_any_rank(array, "array"));
    if (view->dtype() != Dtype::bf16) view->fail("is not bfloat16");
    std::vector<std::size_t> shape;
    std::vector<std::int64_t> strides;
    for (int i = 0; i < view->ndim(); i++) {
        shape.push_back(std::size_t(view->shape(i)));
        strides.push_back(view->stride(i));
    }
    const void* data = view->data();
    nb::capsule owner(view.release(), [](void* p) noexcept { delete static_cast<View*>(p); });
    return {static_cast<const std::uint16_t*>(data), shape.size(), shape.data(), owner, strides.data()};
}

// The way back: a dense array of such bits as bfloat16, which mx.array copies as it is.
nb::ndarray<> as_bfloat16(nb::ndarray<std::uint16_t, nb::c_contig, nb::device::cpu> bits) {
    std::vector<std::size_t> shape;
    for (std::size_t i = 0; i < bits.ndim(); i++) shape.push_back(bits.shape(i));
    return {bits.data(), shape.size(), shape.data(), nb::cast(bits), nullptr, nb::dlpack::dtype{std::uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1}};
}

} // namespace
} // namespace tq

NB_MODULE(_kernels, m) {
    using tq::NativeStore;
    m.def("isa_levels", &tq::level_names, "Instruction-set levels of this build and CPU, fastest first.");
    m.def("bfloat16_bits", &tq::bfloat16_bits, nb::arg("array"));
    m.def("as_bfloat16", &tq::as_bfloat16, nb::arg("bits"));
    m.def("set_num_threads", &tq::set_num_threads, nb::arg("num_threads"));
    m.def("num_threads", &tq::num_threads);
    tq::bind_linear(m);
    tq::bind_blocks(m);
    nb::class_<NativeStore>(m, "Store")
        .def(nb::init<int, int, int, const std::string&, const std::string&>(), nb::arg("heads"), nb::arg("page_tokens"), nb::arg("sink_tokens"),
             nb::arg("scale"), nb::arg("isa"))
        .def("set_side", &NativeStore::set_side, nb::arg("is_key"), nb::arg("dim"), nb::arg("bits"), nb::arg("signs"), nb::arg("base"),
             nb::arg("mean").none(), nb::arg("book"), nb::arg("thresholds").none())
        .def("set_rotary", &NativeStore::set_rotary, nb::arg("mean"), nb::arg("frequencies"), nb::arg("stride"), nb::arg("gap"))
        .def_prop_ro("isa", &NativeStore::isa)
        .def_prop_ro("num_pages", &NativeStore::num_pages)
        .def_prop_ro("page_bytes", &NativeStore::page_bytes)
        .def("grow", &NativeStore::grow, nb::arg("num_pages"))
        .def("encode", &NativeStore::encode, nb::arg("page_ids"), nb::arg("numbers"), nb::arg("starts"), nb::arg("k"), nb::arg("v"))
        .def("transfer", &NativeStore::transfer, nb::arg("is_key"), nb::arg("write"), nb::arg("page_ids"), nb::arg("codes"), nb::arg("scales"))
        .def("decode", &NativeStore::decode, nb::arg("is_key"), nb::arg("restore"), nb::arg("page_ids"), nb::arg("first_page"), nb::arg("rows"),
             nb::arg("scales"))
        .def("attend", &NativeStore::attend, nb::arg("queries"), nb::arg("out"), nb::arg("figures"), nb::arg("page_ids"), nb::arg("exact"),
             nb::arg("scale"), nb::arg("sinks").none(), nb::arg("window"), nb::arg("cap") = 0.0f);
}
