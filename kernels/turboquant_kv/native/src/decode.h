// Attention of a few query rows, straight on the codes: one task is one KV head over up to segment_pages pages.
//
// A partial result per query head is [peak, mass, total (Dv)] with scores in base-2 logarithms. Segments depend on
// positions alone, never on threads or batch, so a row's result is bit-identical in every company.

constexpr float kLog2e = 1.44269504f;
constexpr float kNothing = -__builtin_inff();
constexpr int kAhead = 2; // pages; one is too late where pages are small
constexpr int kChunkTokens = 256; // scores of 8 heads stay in the first-level cache

TQ_INLINE int num_heads(const Attention& a, const Item& item) { return a.group * item.num_rows; }
TQ_INLINE int partial_stride(const Attention& a) { return (a.store->v.dim + 2 + 15) / 16 * 16; } // [total, peak, mass]

static std::size_t partial_floats(const Attention& a, const Item& item) {
    return std::size_t(item.num_segments + 1) * num_heads(a, item) * partial_stride(a);
}

TQ_INLINE int chunk_pages(const Attention& a) { return max1(1, kChunkTokens / a.store->page_tokens); }

static std::size_t decode_scratch(const Attention& a) {
    const std::size_t pages = std::size_t(kMaxGroup) * chunk_pages(a) * a.store->page_tokens + 2 * kMaxDim;
    return pages + 64 * (kMaxDim + kMaxGroup) + std::size_t(a.group) * kDecodeRows * kMaxDim; // pages, and exact rows
}

// Query head hh of an item, hh = g * num_rows + t, times scale * log2(e).
static void load_query(const Attention& a, const Item& item, int kv_head, int hh, float* x) {
    const int g = hh / item.num_rows, t = hh % item.num_rows;
    const std::int64_t at = item.batch * a.q_strides[0] + (kv_head * a.group + g) * a.q_strides[1] + (item.first_row + t) * a.q_strides[2];
    row_to_floats(a.q, a.q_dtype, at, a.store->k.dim, x);
    for (int d = 0; d < a.store->k.dim; d++) x[d] *= a.scale * kLog2e;
}

// Of the part of a mean that does not turn.
TQ_INLINE float dot_mean(const Side& side, int head, const float* x) {
    if (side.mean.empty()) return 0;
    F total{};
    for (int d = 0; d < side.dim; d += LANES) total = fma(load<F>(x + d), load<F>(&side.mean[std::size_t(head) * side.dim + d]), total);
    return sum(total);
}

// Raise a running peak to that of n more scores and fade what was summed before. Returns what to subtract from scores:
// the peak, or 0 as long as every score was hidden. A maximum overlooks NaN, so one makes the mass NaN.
TQ_INLINE float raise_peak(const float* s, int n, float& peak, float& mass, float* total, int dim) {
    F best = splat(kNothing), seen{};
    for (int i = 0; i < n; i += LANES) {
        const F x = load<F>(s + i);
        best = vmax(best, x);
        seen += x;
    }
    const float check = sum(seen);
    if (check != check) mass = check;
    const float new_peak = fmax1(peak, maximum(best));
    if (new_peak == kNothing) return 0;
    if (new_peak != peak) {
        const float fade = peak == kNothing ? 0.0f : exp2_negative(splat(peak - new_peak))[0];
        mass *= fade;
        for (int d = 0; d < dim; d += LANES) store_to(total + d, load<F>(total + d) * fade);
        peak = new_peak;
    }
    return peak;
}

// n scores, whole registers of them, to cap * tanh(score / cap). Scores are base-2 logits, the cap is of natural ones.
TQ_INLINE void cap_scores(float* s, int n, float cap) {
    const F slope = splat(2.0f / cap), top = splat(cap * kLog2e);
    for (int i = 0; i < n; i += LANES) {
        const F x = load<F>(s + i), e = exp2_minus_1((x < 0.0f ? x : -x) * slope); // exp(-2 |score / cap|) - 1
        const F size = top * (e / (e + 2.0f));                                     // -cap * tanh(|score / cap|)
        store_to(s + i, x < 0.0f ? size : -size);
    }
}

// Turn scores into weights in place.
TQ_INLINE void absorb_scores(float* s, int n, float& peak, float& mass, float* total, int dim) {
    const float subtract = raise_peak(s, n, peak, mass, total, dim);
    if (peak == kNothing) {
        for (int i = 0; i < n; i++) s[i] = 0;
        return;
    }
    F added{};
    for (int i = 0; i < n; i += LANES) {
        const F e = exp2_negative(load<F>(s + i) - subtract);
        store_to(s + i, e);
        added += e;
    }
    mass += sum(added);
}

// Keys before a row's sliding window, at the front of a chunk that begins at position `start`.
static void hide_old(const Attention& a, const Item& item, int first_head, int G, std::int64_t start, int n, float* scores) {
    for (int h = 0; h < G; h++) {
        const std::int64_t oldest = a.oldest(item.position + (first_head + h) % item.num_rows);
        for (std::int64_t i = 0; i < n && start + i < oldest; i++) scores[h * n + i] = kNothing;
    }
}

TQ_INLINE void prefetch_bytes(const std::uint8_t* p, int count) {
    for (int i = 0; i < count; i += 64) prefetch_line(p + i);
}

// Pages [first, last) for heads first_head .. first_head + G.
static void attend_pages(const Attention& a, const Item& item, int kv_head, int first_head, int G, std::int64_t first,
                         std::int64_t last, float* partial, float* scratch) {
    const Store& store = *a.store;
    const int page = store.page_tokens, v_dim = store.v.dim, stride = partial_stride(a), groups = store.groups_per_page();
    const Turning& turning = store.k.turning;
    Query q;
    float* x = scratch;
    float pairs[kMaxGroup][2 * kMaxPairs], constant[kMaxGroup];
    for (int h = 0; h < G; h++) {
        load_query(a, item, kv_head, first_head + h, x);
        constant[h] = dot_mean(store.k, kv_head, x);
        for (int b = 0; b < kSpanBlocks; b++) q.shift[h * kSpanBlocks + b] = constant[h];
        if (turning.num_pairs) pair_products(store.k, kv_head, x, pairs[h]);
        rotate(store.k, x);
        if (store.k.is_trellis) to_native_order(store.k, x);
        quantise_query(store.k, x, h, q);
    }
    const PageKernels &keys = page_kernels(store.k), &values = page_kernels(store.v);
    float* scores = scratch + 2 * kMaxDim;
    Weights w;
    const std::int64_t oldest = a.oldest(item.position + item.num_rows - 1);
    const int step = chunk_pages(a);
    for (std::int64_t at = first; at < last; at += step) {
        const int num_pages = int(min1<std::int64_t>(step, last - at)), n = num_pages * page;
        // What is read kAhead pages later: keys of the chunk, then its values, then keys of the next chunk.
        auto ahead = [&](int p, const Side* side) {
            std::int64_t later = at + p + kAhead;
            if (p + kAhead >= num_pages) {
                later -= side->is_key ? num_pages : num_pages - step;
                side = side->is_key ? &store.v : &store.k;
            }
            const std::int64_t id = item.pages[min1(later, last - 1)];
            prefetch_bytes(store.scales(*side, id, kv_head), 2 * page);
            return store.codes(*side, id, kv_head);
        };
        for (int p = 0; p < num_pages; p++) {
            const std::int64_t id = item.pages[at + p];
            const std::uint8_t *next = ahead(p, &store.k), *k = store.codes(store.k, id, kv_head), *k_scales = store.scales(store.k, id, kv_head);
            for (int g = 0; g < groups; g += kSpanBlocks) { // several spans a page, or several pages a span
                const int num_groups = min1(kSpanBlocks, groups - g), in_span = (p * groups + g) % kSpanBlocks;
                if (turning.num_pairs && in_span == 0)
                    kSpanShifts[G - 1](turning, (at + p) * groups + g, pairs[0], 2 * kMaxPairs, constant, q.shift, kSpanBlocks);
                const std::size_t at_group = g * store.k.group_bytes();
                keys.score[G - 1](store.k, k + at_group, k_scales + 32 * g, num_groups, q, q.shift + in_span, scores + p * page + 16 * g, n,
                                  next + at_group);
            }
        }
        const std::int64_t start = store.sink_tokens + at * page;
        if (a.cap > 0) cap_scores(scores, G * n, a.cap);
        if (start < oldest) hide_old(a, item, first_head, G, start, n, scores);
        float peaks[kMaxGroup];
        F mass[kMaxGroup] = {};
        for (int h = 0; h < G; h++) {
            float* mine = partial + h * stride;
            peaks[h] = raise_peak(scores + h * n, n, mine[v_dim], mine[v_dim + 1], mine, v_dim);
        }
        for (int p = 0; p < num_pages; p++) {
            const std::int64_t id = item.pages[at + p];
            const std::uint8_t *v = store.codes(store.v, id, kv_head), *v_scales = store.scales(store.v, id, kv_head), *next = ahead(p, &store.v);
            for (int g = 0; g < groups; g += kBlockGroups) {
                const int num_groups = min1(kBlockGroups, groups - g);
                values.weigh(store.v, scores + p * page + g * 16, v_scales + 32 * g, num_groups, G, n, peaks, mass, w);
                const std::size_t at_group = g * store.v.group_bytes();
                values.add[G - 1](store.v, v + at_group, num_groups, w, partial, stride, next + at_group);
            }
        }
        for (int h = 0; h < G; h++)
            if (partial[h * stride + v_dim] != kNothing) partial[h * stride + v_dim + 1] += sum(mass[h]);
    }
}

constexpr int kExactRows = 64; // 64 rows of 128 dims as floats are 32 KiB

// Rows of one head as floats, `stride` floats apart.
struct FloatRows {
    const float* data;
    std::int64_t stride;
};

// Rows [from, from + n): where they are, if they are floats, else in `room`.
static FloatRows float_rows(const Rows& rows, int kv_head, int from, int n, int dim, float* room) {
    const std::int64_t at = kv_head * rows.head_stride + from * rows.token_stride;
    if (rows.dtype == Dtype::f32) return {static_cast<const float*>(rows.data) + at, rows.token_stride};
    for (int i = 0; i < n; i++) row_to_floats(rows.data, rows.dtype, at + i * rows.token_stride, dim, room + i * dim);
    return {room, dim};
}

// Heads whose rows are read once for all of them: what registers hold. Each head's sums are those it has alone.
constexpr int kSharedHeads = LANES == 16 ? 4 : 2;

// s[h * kExactRows + i] = queries[h] . row i, four rows at a time.
template <int G> static void dot_rows(FloatRows rows, int n, int dim, const float* queries, float* s) {
    for (int i = 0; i < n; i += 4) {
        const float* r[4];
        for (int j = 0; j < 4; j++) r[j] = rows.data + min1(i + j, n - 1) * rows.stride;
        F acc[4][G]{};
        for (int k = 0; k < dim; k += LANES) {
            F x[G];
            for (int g = 0; g < G; g++) x[g] = load<F>(queries + g * dim + k);
            for (int j = 0; j < 4; j++) {
                const F row = load<F>(r[j] + k);
                for (int g = 0; g < G; g++) acc[j][g] = fma(x[g], row, acc[j][g]);
            }
        }
        float sums[4 * G];
        sums_of(acc, sums);
        const int count = min1(4, n - i);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < count; j++) s[g * kExactRows + i + j] = sums[4 * g + j];
    }
}

// total[h] += sum of w[h * kExactRows + i] * row i; totals are `stride` floats apart.
template <int G> static void add_rows(FloatRows rows, int n, int dim, const float* w, float* total, int stride) {
    const auto add = [&](int d, auto width) TQ_INLINED {
        constexpr int kWidth = width.value;
        F t[G][kWidth];
        for (int g = 0; g < G; g++)
            for (int j = 0; j < kWidth; j++) t[g][j] = load<F>(total + g * stride + d + j * LANES);
        for (int i = 0; i < n; i++) {
            const float* row = rows.data + i * rows.stride + d;
            F x[kWidth];
            for (int j = 0; j < kWidth; j++) x[j] = load<F>(row + j * LANES);
            for (int g = 0; g < G; g++)
                for (int j = 0; j < kWidth; j++) t[g][j] = fma(splat(w[g * kExactRows + i]), x[j], t[g][j]);
        }
        for (int g = 0; g < G; g++)
            for (int j = 0; j < kWidth; j++) store_to(total + g * stride + d + j * LANES, t[g][j]);
    };
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) add(d, std::integral_constant<int, 4>{});
    for (; d < dim; d += LANES) add(d, std::integral_constant<int, 1>{});
}

// Calls `with` with a constant of each run of heads that share their rows, and its first one.
template <class Fn> TQ_INLINE void each_shared(int first, int last, Fn with) {
    for (int h = first; h < last; h += kSharedHeads) {
        const int count = min1(kSharedHeads, last - h);
        if constexpr (kSharedHeads == 4) {
            if (count == 4) with(std::integral_constant<int, 4>{}, h);
            if (count == 3) with(std::integral_constant<int, 3>{}, h);
        }
        if (count == 2) with(std::integral_constant<int, 2>{}, h);
        if (count == 1) with(std::integral_constant<int, 1>{}, h);
    }
}

// Exact rows [from, to) of a block that begins at position `start`, for all query heads; head hh of `queries` (H', D)
// sees positions [oldest, own] of its own page, or of the sink.
static void attend_exact_rows(const Attention& a, const Item& item, int kv_head, const Rows& k, const Rows& v, std::int64_t start, int from,
                              int to, const float* queries, float* partials, float* rows, float* s) {
    const int k_dim = a.store->k.dim, v_dim = a.store->v.dim, stride = partial_stride(a), heads = num_heads(a, item);
    for (int at = from; at < to; at += kExactRows) {
        const int n = min1(kExactRows, to - at);
        for (int first = 0; first < heads; first += kMaxGroup) {
            const int last = min1(heads, first + kMaxGroup);
            const FloatRows keys = float_rows(k, kv_head, at, n, k_dim, rows);
            each_shared(first, last, [&](auto heads, int hh) { dot_rows<heads.value>(keys, n, k_dim, queries + hh * k_dim, s + (hh - first) * kExactRows); });
            for (int hh = first; hh < last; hh++) {
                float *mine = partials + hh * stride, *scores = s + (hh - first) * kExactRows;
                if (a.cap > 0) cap_scores(scores, (n + LANES - 1) / LANES * LANES, a.cap);
                const std::int64_t p = item.position + hh % item.num_rows, oldest = a.oldest(p);
                for (int i = n; i < kExactRows; i++) scores[i] = kNothing;
                for (int i = 0; i < n; i++)
                    if (start + at + i > p || start + at + i < oldest) scores[i] = kNothing;
                absorb_scores(scores, kExactRows, mine[v_dim], mine[v_dim + 1], mine, v_dim);
            }
            const FloatRows values = float_rows(v, kv_head, at, n, v_dim, rows);
            each_shared(first, last, [&](auto heads, int hh) { add_rows<heads.value>(values, n, v_dim, s + (hh - first) * kExactRows, partials + hh * stride, stride); });
        }
    }
}

static void attend_exact(const Attention& a, const Item& item, int kv_head, float* partials, float* scratch) {
    const Store& store = *a.store;
    const int heads = num_heads(a, item);
    float *rows = scratch, *s = rows + kExactRows * kMaxDim, *queries = s + kMaxGroup * kExactRows;
    for (int hh = 0; hh < heads; hh++) load_query(a, item, kv_head, hh, queries + hh * store.k.dim);
    const std::int64_t p = item.position, end = p + item.num_rows;
    if (item.sink_k.num_tokens) {
        const int to = int(min1<std::int64_t>(item.sink_k.num_tokens, end));
        attend_exact_rows(a, item, kv_head, item.sink_k, item.sink_v, 0, 0, to, queries, partials, rows, s);
    }
    if (item.window_k.num_tokens && end > store.sink_tokens) { // an item's rows lie in one page
        const std::int64_t page_start = p - (p - store.sink_tokens) % store.page_tokens, at = item.window_start;
        const int to = int(min1<std::int64_t>(item.window_k.num_tokens, end - at));
        attend_exact_rows(a, item, kv_head, item.window_k, item.window_v, at, int(page_start - at), to, queries, partials, rows, s);
    }
}

static void clear_partial(float* partial, int v_dim) {
    for (int d = 0; d < v_dim; d++) partial[d] = 0;
    partial[v_dim] = kNothing;
    partial[v_dim + 1] = 0;
}

// `partials` is the item's and KV head's own: [segment][head]; the exact ends come after the last segment.
static void decode_segment(const Attention& a, const Item& item, int kv_head, int segment, float* partials, float* scratch) {
    const int heads = num_heads(a, item), stride = partial_stride(a), v_dim = a.store->v.dim;
    float* mine = partials + std::size_t(segment) * heads * stride;
    for (int h = 0; h < heads; h++) clear_partial(mine + h * stride, v_dim);
    const std::int64_t first = item.first_page + std::int64_t(segment) * a.segment_pages;
    const std::int64_t last = min1(item.num_pages, first + a.segment_pages);
    for (int h = 0; h < heads; h += kMaxGroup)
        if (first < last) attend_pages(a, item, kv_head, h, min1(kMaxGroup, heads - h), first, last, mine + h * stride, scratch);
    if (segment == 0) {
        float* exact = partials + std::size_t(item.num_segments) * heads * stride;
        for (int h = 0; h < heads; h++) clear_partial(exact + h * stride, v_dim);
        attend_exact(a, item, kv_head, exact, scratch);
    }
}

// By log-sum-exp: compressed segments (rotated), exact ends, and the sink logit, to the output row.
static void finish_row(const Attention& a, const Item& item, int kv_head, int hh, float* total, float peak, float mass, const float* exact) {
    const Store& store = *a.store;
    const int v_dim = store.v.dim, g = hh / item.num_rows, t = hh % item.num_rows, q_head = kv_head * a.group + g;
    const float exact_peak = exact[v_dim], sink = a.sinks ? a.sinks[q_head] * kLog2e : kNothing;
    const float top = fmax1(fmax1(peak, exact_peak), sink);
    auto weight = [&](float p) { return p == kNothing ? 0.0f : exp2_negative(splat(p - top))[0]; };
    const float wc = weight(peak), we = weight(exact_peak);
    const float denominator = mass * wc + exact[v_dim + 1] * we + weight(sink);
    const float inverse = denominator == 0 ? 0.0f : 1.0f / denominator;
    if (store.v.is_trellis) from_native_order(store.v, total);
    if (peak != kNothing) unrotate(store.v, total);
    const float* mean = store.v.mean.empty() ? nullptr : &store.v.mean[std::size_t(kv_head) * v_dim];
    for (int d = 0; d < v_dim; d++) {
        const float compressed = total[d] + (mean ? mass * mean[d] : 0.0f);
        total[d] = (compressed * wc + exact[d] * we) * inverse;
    }
    const std::int64_t row = (std::int64_t(item.batch) * a.num_q_heads + q_head) * a.num_rows + item.first_row + t;
    row_from_floats(total, v_dim, a.out, a.out_dtype, row * v_dim);
}

static void merge_segments(const Attention& a, const Item& item, int kv_head, float* partials, float*) {
    const int heads = num_heads(a, item), stride = partial_stride(a), v_dim = a.store->v.dim;
    for (int h = 0; h < heads; h++) {
        float* total = partials + h * stride;
        float peak = kNothing, mass = 0;
        for (int s = 0; s < item.num_segments; s++) peak = fmax1(peak, partials[(std::size_t(s) * heads + h) * stride + v_dim]);
        for (int s = 0; s < item.num_segments; s++) {
            const float* part = partials + (std::size_t(s) * heads + h) * stride;
            const float w = part[v_dim] == kNothing ? 0.0f : exp2_negative(splat(part[v_dim] - peak))[0];
            mass += w * part[v_dim + 1];
            for (int d = 0; d < v_dim; d++) total[d] = (s ? total[d] : 0.0f) + w * part[d];
        }
        finish_row(a, item, kv_head, h, total, peak, mass, partials + (std::size_t(item.num_segments) * heads + h) * stride);
    }
}
