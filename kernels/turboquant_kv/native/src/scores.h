// Integer dot products: scores of one page's keys, and weighted sums of its values, for G query heads at once.

// Query heads of one chunk, quantised. words[h * kQueryWords + dim / 4]: four int8 dims of head h; where the level splits
// bytes (kSplit), two 16-bit dims each: 4n, 4n + 2 in words and 4n + 1, 4n + 3 in low_words.
constexpr int kQueryWords = kMaxDim / 4;
struct Query {
    alignas(64) std::int32_t words[kQueryWords * kMaxGroup];
    alignas(64) std::int32_t low_words[kQueryWords * kMaxGroup]; // at 8 bits: query = 256 * word + low
    float factor[kMaxGroup];  // of the integer sum, times the key's own scale
    float bias[kMaxGroup];    // subtracted from that product: table offset times sum of the query, times factor
    std::int32_t high_bias[kMaxGroup], low_bias[kMaxGroup];
    float shift[kMaxGroup * kSpanBlocks]; // query . mean_k of each block of a span, added to its scores
};

// x (dim,) rotated and already scaled, of head h; in the keys' own order of dims (codes.h).
static void quantise_query(const Side& side, const float* x, int h, Query& q) {
    const int dim = side.dim;
    float largest = 0, spoilt = 0; // spoilt: NaN where x holds NaN or infinity, which no integer shows
    for (int d = 0; d < dim; d++) {
        largest = fmax1(largest, x[d] < 0 ? -x[d] : x[d]);
        spoilt += x[d] * 0.0f;
    }
    const int limit = side.bits == 8 ? 127 * 256 : kQueryLimit;
    const float step = largest > 0 && largest < 3e38f ? largest / limit : largest, inverse = largest > 0 ? 1.0f / step : 0.0f;
    alignas(64) std::int32_t whole[kMaxDim];
    for (int d = 0; d < dim; d += LANES) store_to(whole + d, spoilt == 0 ? round_to_int(load<F>(x + d) * inverse) : I{});
    int total = 0, low_total = 0;
    for (int n = 0; n < dim / 4; n++) {
        if (kSplit && side.bits != 8) {
            const std::int32_t* v = whole + 4 * n;
            const std::int16_t even[2] = {std::int16_t(v[0]), std::int16_t(v[2])}, odd[2] = {std::int16_t(v[1]), std::int16_t(v[3])};
            std::memcpy(&q.words[h * kQueryWords + n], even, 4);
            std::memcpy(&q.low_words[h * kQueryWords + n], odd, 4);
            total += v[0] + v[1] + v[2] + v[3];
            continue;
        }
        std::int8_t high[4], low[4];
        for (int k = 0; k < 4; k++) {
            const int v = whole[4 * n + k];
            high[k] = std::int8_t(side.bits == 8 ? (v + 128) >> 8 : v);
            low[k] = std::int8_t(v - 256 * high[k]);
            total += high[k];
            low_total += low[k];
        }
        std::memcpy(&q.words[h * kQueryWords + n], high, 4);
        std::memcpy(&q.low_words[h * kQueryWords + n], low, 4);
    }
    q.factor[h] = step * side.table.step + spoilt;
    q.bias[h] = side.table.offset * float(total) * q.factor[h];
    q.high_bias[h] = 128 * total;
    q.low_bias[h] = 128 * low_total;
}

// Groups of tokens, or quartets of dims, that share one broadcast of the query or of the weights. With few query heads
// more of them keep enough sums in flight.
constexpr int pair_of(int G) { return LANES < 16 ? 1 : G <= 2 ? 4 : 2; }
// Quartets of a trellis's values share those before them as well.
constexpr int value_pair_of(int kind, int G) { return LANES < 16 && is_trellis(kind) && G <= 4 ? 2 : pair_of(G); }

// Scores of P groups of 16 tokens: out[h * stride + token]; `shift` are the query's, from the first group's on.
template <int Kind, int G, int P>
TQ_INLINE void score_some(const Side& side, const Tables<Kind>& tables, const std::uint8_t* group, const std::uint8_t* scales,
                          const Query& q, const float* shift, float* out, int stride, const std::uint8_t* next) {
    const int num_quartets = side.dim / 16;
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int sub = 0; sub < SUBS; sub++) {
        I acc[P][G], low[P][G];
        for (int p = 0; p < P; p++)
            for (int h = 0; h < G; h++) acc[p][h] = low[p][h] = I{};
        [[maybe_unused]] Before before[P];
        if constexpr (is_trellis(Kind))
            for (int p = 0; p < P; p++) before[p] = before_keys(group + p * group_bytes, num_quartets, sub);
        for (int i = 0; i < num_quartets; i++) {
            if constexpr (Kind == 8) {
                const std::int32_t* words = q.words + i * 4;
                const std::int32_t* low_words = q.low_words + i * 4;
                for (int p = 0; p < P; p++)
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + p * group_bytes + i * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 w = (B4)splat(words[h * kQueryWords + j]);
                            acc[p][h] = dot_us(acc[p][h], c, w);
                            low[p][h] = dot_us(dot_us(low[p][h], f, w), c, (B4)splat(low_words[h * kQueryWords + j]));
                        }
                    }
            } else {
                B4 c[P][4];
                for (int p = 0; p < P; p++) {
                    if constexpr (is_trellis(Kind)) unpack_trellis<Kind>(group + p * group_bytes, top_plane, i, sub, tables, before[p], c[p]);
                    else unpack_quartet<Kind>(group + p * group_bytes, top_plane, i, sub, tables, c[p]);
                }
                for (int j = 0; j < 4; j++) {
                    Spread s[P];
                    for (int p = 0; p < P; p++) s[p] = spread(c[p][j]);
                    for (int h = 0; h < G; h++) {
                        const int at = h * kQueryWords + i * 4 + j;
                        for (int p = 0; p < P; p++) acc[p][h] = dot_key(acc[p][h], s[p], q.words + at, q.low_words + at);
                    }
                }
            }
            // One page ahead: pages are scattered, so the hardware cannot guess.
            if (sub == 0)
                for (int p = 0; p < P; p++) prefetch_quartet<Kind>(next + p * group_bytes, top_plane, i);
        }
        for (int p = 0; p < P; p++) {
            const F key_scale = load_half(scales + 2 * (p * 16 + sub * LANES));
            for (int h = 0; h < G; h++) {
                F x;
                // 8 bits: the dropped product of both low bytes has mean 128 * low query.
                if constexpr (Kind == 8)
                    x = (to_float(acc[p][h] - q.high_bias[h]) * 65536.0f + to_float(low[p][h] - q.low_bias[h]) * 256.0f + float(q.low_bias[h])) * q.factor[h];
                else x = fma(to_float(acc[p][h]), splat(q.factor[h]), splat(-q.bias[h]));
                store_to(out + h * stride + p * 16 + sub * LANES, fma(x, key_scale, splat(shift[h * kSpanBlocks + p])));
            }
        }
    }
}

template <int Kind, int G>
static void score_groups(const Side& side, const std::uint8_t* group, const std::uint8_t* scales, int num_groups, const Query& q,
                         const float* shift, float* out, int stride, const std::uint8_t* next) {
    const Tables<Kind> tables = make_tables<Kind>(side.table);
    const std::size_t group_bytes = side.group_bytes();
    constexpr int pair = pair_of(G);
    int g = 0;
    for (; g + pair <= num_groups; g += pair)
        score_some<Kind, G, pair>(side, tables, group + g * group_bytes, scales + 32 * g, q, shift + g, out + 16 * g, stride, next + g * group_bytes);
    for (; g < num_groups; g++)
        score_some<Kind, G, 1>(side, tables, group + g * group_bytes, scales + 32 * g, q, shift + g, out + 16 * g, stride, next + g * group_bytes);
}

// Weights of one block of up to 64 tokens: words[h * kWeightWords + token / 4], four bytes of head h, or split as in Query.
// Blocks have a factor of their own, because rounding to 8 bits loses what is far below a block's largest weight.
constexpr int kBlockGroups = 4, kWeightWords = 4 * kBlockGroups;
struct Weights {
    alignas(64) std::uint32_t words[kWeightWords * kMaxGroup];
    alignas(64) std::uint32_t low_words[kWeightWords * kMaxGroup];
    float factor[kMaxGroup];
    float bias[kMaxGroup]; // table offset times sum of the bytes, where values are unsigned
};

// exp2(score - peak) of one head's block, added to `mass`, times the values' own scales, as bytes.
template <int Kind>
TQ_INLINE void weigh_head(const Side& side, const float* scores, const F* value_scales, int num_groups, int h, float peak, F& mass, Weights& out) {
    F w[SUBS * kBlockGroups], largest{};
    const int n = num_groups * SUBS;
    for (int i = 0; i < n; i++) {
        const F e = exp2_negative(load<F>(scores + i * LANES) - peak);
        mass += e;
        w[i] = e * value_scales[i];
        largest = vmax(largest, w[i]);
    }
    const float top = maximum(largest), limit = Kind == 8 ? 65535.0f : float(kWeightLimit);
    const float inverse = top > 1e-30f ? limit / top : 0.0f;
    out.factor[h] = top * (side.table.step / limit);
    if constexpr (Kind != 8 && !kSplit && kValueLow < 0) {
        for (int i = 0; i < n; i++) store_to(reinterpret_cast<std::uint8_t*>(out.words + h * kWeightWords) + i * LANES, to_bytes(w[i] * inverse));
        return;
    }
    alignas(64) std::int32_t whole[16 * kBlockGroups];
    I sums{};
    for (int i = 0; i < n; i++) {
        const I x = round_to_int(w[i] * inverse);
        sums += x;
        store_to(whole + i * LANES, x);
    }
    out.bias[h] = side.table.offset * sum(to_float(sums));
    for (int i = 0; i < num_groups * 4; i++) {
        const std::int32_t* x = whole + 4 * i;
        std::uint32_t &word = out.words[h * kWeightWords + i], &low = out.low_words[h * kWeightWords + i];
        if (kSplit && Kind != 8) {
            word = std::uint32_t(x[0] | x[2] << 16);
            low = std::uint32_t(x[1] | x[3] << 16);
        } else {
            constexpr int shift = Kind == 8 ? 8 : 0;
            word = low = 0;
            for (int k = 0; k < 4; k++) {
                word |= std::uint32_t(x[k] >> shift) << (8 * k);
                low |= std::uint32_t(x[k] & 255) << (8 * k);
            }
        }
    }
}

// total[h * stride + dim] += sum over the block's tokens of weight * centroid, for P times 16 dims from quartet `i`.
template <int Kind, int G, int P>
TQ_INLINE void add_some(const Side& side, const Tables<Kind>& tables, const std::uint8_t* group, int num_groups, int i, const Weights& w,
                        float* total, int stride) {
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int sub = 0; sub < SUBS; sub++) {
        I acc[P][G], low[P][G];
        for (int p = 0; p < P; p++)
            for (int h = 0; h < G; h++) acc[p][h] = low[p][h] = I{};
        [[maybe_unused]] const ValuesBefore values_before(side.dim / 16, i, sub);
        for (int g = 0; g < num_groups; g++) {
            if constexpr (Kind == 8) {
                const std::uint32_t* words = w.words + g * 4;
                const std::uint32_t* low_words = w.low_words + g * 4;
                for (int p = 0; p < P; p++)
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + g * group_bytes + (i + p) * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 high = (B4)splat(std::int32_t(words[h * kWeightWords + j]));
                            acc[p][h] = dot_us(acc[p][h], high, c);
                            low[p][h] = dot_us(dot_us(low[p][h], high, f), (B4)splat(std::int32_t(low_words[h * kWeightWords + j])), c);
                        }
                    }
            } else {
                B4 c[P][4];
                if constexpr (is_trellis(Kind)) {
                    Before before = values_before.of(group + g * group_bytes);
                    for (int p = 0; p < P; p++) unpack_trellis<Kind>(group + g * group_bytes, top_plane, i + p, sub, tables, before, c[p]);
                } else {
                    for (int p = 0; p < P; p++) unpack_quartet<Kind>(group + g * group_bytes, top_plane, i + p, sub, tables, c[p]);
                }
                for (int j = 0; j < 4; j++) {
                    Spread s[P];
                    for (int p = 0; p < P; p++) s[p] = spread(c[p][j]);
                    for (int h = 0; h < G; h++) {
                        const int at = h * kWeightWords + g * 4 + j;
                        for (int p = 0; p < P; p++) acc[p][h] = dot_value(acc[p][h], s[p], w.words + at, w.low_words + at);
                    }
                }
            }
        }
        for (int h = 0; h < G; h++)
            for (int p = 0; p < P; p++) {
                float* t = total + h * stride + (i + p) * 16 + sub * LANES;
                F x = to_float(acc[p][h]);
                if constexpr (Kind == 8) x = x * 65536.0f + to_float(low[p][h]) * 256.0f;
                else if constexpr (kValueLow == 0) x = x - w.bias[h];
                store_to(t, fma(x, splat(w.factor[h]), load<F>(t)));
            }
    }
}

template <int Kind, int G>
static void add_values(const Side& side, const std::uint8_t* group, int num_groups, const Weights& w, float* total, int stride,
                       const std::uint8_t* next) {
    const Tables<Kind> tables = make_tables<Kind>(side.table);
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    const int num_quartets = side.dim / 16;
    constexpr int pair = value_pair_of(Kind, G);
    int i = 0;
    for (; i + pair <= num_quartets; i += pair) {
        for (int p = 0; p < pair; p++)
            for (int g = 0; g < num_groups; g++) prefetch_quartet<Kind>(next + g * group_bytes, top_plane, i + p);
        add_some<Kind, G, pair>(side, tables, group, num_groups, i, w, total, stride);
    }
    for (; i < num_quartets; i++) add_some<Kind, G, 1>(side, tables, group, num_groups, i, w, total, stride);
}

using ScoreFn = void (*)(const Side&, const std::uint8_t*, const std::uint8_t*, int, const Query&, const float*, float*, int, const std::uint8_t*);
using ValueFn = void (*)(const Side&, const std::uint8_t*, int, const Weights&, float*, int, const std::uint8_t*);
using WeightFn = void (*)(const Side&, const float*, const std::uint8_t*, int, int, int, const float*, F*, Weights&);

struct PageKernels {
    ScoreFn score[kMaxGroup];
    ValueFn add[kMaxGroup];
    WeightFn weigh;
};
// Scores p (head h at p + h * stride) and value scales of num_groups groups; peaks (G,), mass (G,) lanes.
template <int Kind>
static void weigh(const Side& side, const float* p, const std::uint8_t* scales, int num_groups, int G, int stride, const float* peaks, F* mass,
                  Weights& out) {
    F value_scales[SUBS * kBlockGroups];
    F check{};
    for (int i = 0; i < num_groups * SUBS; i++) {
        value_scales[i] = load_half(scales + 2 * i * LANES);
        check += value_scales[i] * 0.0f;
    }
    const float spoilt = sum(check); // NaN where a value holds NaN or infinity, for heads that see it
    for (int i = 0; spoilt != spoilt && i < num_groups * SUBS; i++)
        for (int h = 0; h < G; h++) mass[h] += load<F>(p + h * stride + i * LANES) > -3e38f ? value_scales[i] * 0.0f : F{};
    for (int h = 0; h < G; h++) weigh_head<Kind>(side, p + h * stride, value_scales, num_groups, h, peaks[h], mass[h], out);
}
#define TQ_ALL_GROUPS(f, Kind) {f<Kind, 1>, f<Kind, 2>, f<Kind, 3>, f<Kind, 4>, f<Kind, 5>, f<Kind, 6>, f<Kind, 7>, f<Kind, 8>}
#define TQ_PAGE_KERNELS(Kind) {TQ_ALL_GROUPS(score_groups, Kind), TQ_ALL_GROUPS(add_values, Kind), weigh<Kind>}
static const PageKernels kPageKernels[7] = {TQ_PAGE_KERNELS(2), TQ_PAGE_KERNELS(3), TQ_PAGE_KERNELS(4), TQ_PAGE_KERNELS(8),
                                            TQ_PAGE_KERNELS(kTrellis + 2), TQ_PAGE_KERNELS(kTrellis + 3), TQ_PAGE_KERNELS(kTrellis + 4)};

TQ_INLINE const PageKernels& page_kernels(const Side& side) {
    return kPageKernels[side.is_trellis ? side.bits + 2 : side.bits == 8 ? 3 : side.bits - 2];
}
