// Integer dot products: scores of one page's keys, and weighted sums of its values, for G query heads at once.

// Query heads of one chunk, quantised. words[(dim / 4) * G + h]: four int8 dims of head h; where the level splits bytes
// (kSplit), two 16-bit dims each: 4n, 4n + 2 in words and 4n + 1, 4n + 3 in low_words.
struct Query {
    alignas(64) std::int32_t words[kMaxDim / 4 * kMaxGroup];
    alignas(64) std::int32_t low_words[kMaxDim / 4 * kMaxGroup]; // at 8 bits: query = 256 * word + low
    float factor[kMaxGroup];  // of the integer sum, times the key's own scale
    float bias[kMaxGroup];    // subtracted from the integer sum: table offset times sum of the query
    std::int32_t high_bias[kMaxGroup], low_bias[kMaxGroup];
    float shift[kMaxGroup];   // query . mean_k, added to every score
};

// x (dim,) rotated and already scaled; fills column h of G.
static void quantise_query(const Side& side, const float* x, int h, int G, Query& q) {
    const int dim = side.dim;
    float largest = 0;
    for (int d = 0; d < dim; d++) largest = fmax1(largest, x[d] < 0 ? -x[d] : x[d]);
    const int limit = side.bits == 8 ? 127 * 256 : kQueryLimit;
    const float step = largest > 0 && largest < 3e38f ? largest / limit : largest, inverse = largest > 0 ? 1.0f / step : 0.0f;
    alignas(64) std::int32_t whole[kMaxDim];
    for (int d = 0; d < dim; d += LANES) store_to(whole + d, round_to_int(load<F>(x + d) * inverse));
    int total = 0, low_total = 0;
    for (int n = 0; n < dim / 4; n++) {
        if (kSplit && side.bits != 8) {
            const std::int32_t* v = whole + 4 * n;
            const std::int16_t even[2] = {std::int16_t(v[0]), std::int16_t(v[2])}, odd[2] = {std::int16_t(v[1]), std::int16_t(v[3])};
            std::memcpy(&q.words[n * G + h], even, 4);
            std::memcpy(&q.low_words[n * G + h], odd, 4);
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
        std::memcpy(&q.words[n * G + h], high, 4);
        std::memcpy(&q.low_words[n * G + h], low, 4);
    }
    q.factor[h] = step * side.table.step;
    q.bias[h] = side.table.offset * float(total);
    q.high_bias[h] = 128 * total;
    q.low_bias[h] = 128 * low_total;
}

// Broadcasting four bytes of the query costs a load; two groups of tokens share it where registers allow.
constexpr int kPair = LANES == 16 ? 2 : 1;

// Scores of P groups of 16 tokens: out[h * stride + token].
template <int Bits, int G, int P>
TQ_INLINE void score_some(const Side& side, const Tables<Bits>& tables, const std::uint8_t* group, const std::uint8_t* scales,
                          const Query& q, float* out, int stride, const std::uint8_t* next) {
    const int num_quartets = side.dim / 16;
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int sub = 0; sub < SUBS; sub++) {
        I acc[P][G], low[P][G];
        for (int p = 0; p < P; p++)
            for (int h = 0; h < G; h++) acc[p][h] = low[p][h] = I{};
        for (int i = 0; i < num_quartets; i++) {
            if constexpr (Bits == 8) {
                const std::int32_t* words = q.words + i * 4 * G;
                const std::int32_t* low_words = q.low_words + i * 4 * G;
                for (int p = 0; p < P; p++)
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + p * group_bytes + i * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 w = (B4)splat(words[j * G + h]);
                            acc[p][h] = dot_us(acc[p][h], c, w);
                            low[p][h] = dot_us(dot_us(low[p][h], f, w), c, (B4)splat(low_words[j * G + h]));
                        }
                    }
            } else {
                B4 c[P][4];
                for (int p = 0; p < P; p++) unpack_quartet<Bits>(group + p * group_bytes, top_plane, i, sub, tables, c[p]);
                for (int j = 0; j < 4; j++) {
                    Spread s[P];
                    for (int p = 0; p < P; p++) s[p] = spread(c[p][j]);
                    for (int h = 0; h < G; h++) {
                        const int at = (i * 4 + j) * G + h;
                        for (int p = 0; p < P; p++) acc[p][h] = dot_key(acc[p][h], s[p], q.words + at, q.low_words + at);
                    }
                }
            }
            // One page ahead: pages are scattered, so the hardware cannot guess.
            if (sub == 0)
                for (int p = 0; p < P; p++) prefetch_quartet<Bits>(next + p * group_bytes, top_plane, i);
        }
        for (int p = 0; p < P; p++) {
            const F key_scale = load_half(scales + 2 * (p * 16 + sub * LANES));
            for (int h = 0; h < G; h++) {
                F x;
                // 8 bits: the dropped product of both low bytes has mean 128 * low query.
                if constexpr (Bits == 8)
                    x = to_float(acc[p][h] - q.high_bias[h]) * 65536.0f + to_float(low[p][h] - q.low_bias[h]) * 256.0f + float(q.low_bias[h]);
                else x = to_float(acc[p][h]) - q.bias[h];
                store_to(out + h * stride + p * 16 + sub * LANES, x * q.factor[h] * key_scale + q.shift[h]);
            }
        }
    }
}

template <int Bits, int G>
static void score_groups(const Side& side, const std::uint8_t* group, const std::uint8_t* scales, int num_groups, const Query& q,
                         float* out, int stride, const std::uint8_t* next) {
    const Tables<Bits> tables = make_tables<Bits>(side.table);
    const std::size_t group_bytes = side.group_bytes();
    int g = 0;
    for (; g + kPair <= num_groups; g += kPair)
        score_some<Bits, G, kPair>(side, tables, group + g * group_bytes, scales + 32 * g, q, out + 16 * g, stride, next + g * group_bytes);
    for (; g < num_groups; g++)
        score_some<Bits, G, 1>(side, tables, group + g * group_bytes, scales + 32 * g, q, out + 16 * g, stride, next + g * group_bytes);
}

// Weights of one block of up to 32 tokens: words[(token / 4) * G + h], four bytes of head h, or split as in Query.
struct Weights {
    alignas(64) std::uint32_t words[8 * kMaxGroup];
    alignas(64) std::uint32_t low_words[8 * kMaxGroup];
    float factor[kMaxGroup];
    float bias[kMaxGroup]; // table offset times sum of the bytes
};

constexpr int kBlockGroups = 2;

// p (num_groups * 16) probabilities of head h, times the values' own scales.
template <int Bits>
TQ_INLINE void quantise_weights(const Side& side, const float* p, const std::uint8_t* scales, int num_groups, int h, int G, Weights& out) {
    alignas(64) float w[16 * kBlockGroups];
    F largest{};
    for (int i = 0; i < num_groups * 16; i += LANES) {
        const F x = load<F>(p + i) * load_half(scales + 2 * i);
        store_to(w + i, x);
        largest = vmax(largest, x);
    }
    const float peak = maximum(largest);
    const float limit = Bits == 8 ? 65535.0f : float(kWeightLimit);
    const float inverse = peak > 1e-30f ? limit / peak : 0.0f;
    out.factor[h] = peak / limit * side.table.step;
    alignas(64) std::uint8_t bytes[16 * kBlockGroups], low_bytes[16 * kBlockGroups];
    alignas(64) std::int32_t whole[16 * kBlockGroups];
    I sums{};
    for (int i = 0; i < num_groups * 16; i += LANES) {
        const I x = round_to_int(load<F>(w + i) * inverse);
        sums += x;
        if constexpr (Bits == 8) {
            store_to(bytes + i, __builtin_convertvector(x >> 8, B1));
            store_to(low_bytes + i, __builtin_convertvector(x & 255, B1));
        } else if constexpr (kSplit) store_to(whole + i, x);
        else store_to(bytes + i, __builtin_convertvector(x, B1));
    }
    out.bias[h] = side.table.offset * sum(to_float(sums));
    for (int i = 0; i < num_groups * 4; i++) {
        if (kSplit && Bits != 8) {
            const std::int32_t* x = whole + 4 * i;
            out.words[i * G + h] = std::uint32_t(x[0] | x[2] << 16);
            out.low_words[i * G + h] = std::uint32_t(x[1] | x[3] << 16);
            continue;
        }
        std::memcpy(&out.words[i * G + h], bytes + 4 * i, 4);
        if (Bits == 8) std::memcpy(&out.low_words[i * G + h], low_bytes + 4 * i, 4);
    }
}

// total[h * stride + dim] += sum over the block's tokens of weight * centroid, for P times 16 dims from quartet `i`.
template <int Bits, int G, int P>
TQ_INLINE void add_some(const Side& side, const Tables<Bits>& tables, const std::uint8_t* group, int num_groups, int i, const Weights& w,
                        float* total, int stride) {
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int sub = 0; sub < SUBS; sub++) {
        I acc[P][G], low[P][G];
        for (int p = 0; p < P; p++)
            for (int h = 0; h < G; h++) acc[p][h] = low[p][h] = I{};
        for (int g = 0; g < num_groups; g++) {
            if constexpr (Bits == 8) {
                const std::uint32_t* words = w.words + g * 4 * G;
                const std::uint32_t* low_words = w.low_words + g * 4 * G;
                for (int p = 0; p < P; p++)
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + g * group_bytes + (i + p) * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 high = (B4)splat(std::int32_t(words[j * G + h]));
                            acc[p][h] = dot_us(acc[p][h], high, c);
                            low[p][h] = dot_us(dot_us(low[p][h], high, f), (B4)splat(std::int32_t(low_words[j * G + h])), c);
                        }
                    }
            } else {
                B4 c[P][4];
                for (int p = 0; p < P; p++) unpack_quartet<Bits>(group + g * group_bytes, top_plane, i + p, sub, tables, c[p]);
                for (int j = 0; j < 4; j++) {
                    Spread s[P];
                    for (int p = 0; p < P; p++) s[p] = spread(c[p][j]);
                    for (int h = 0; h < G; h++) {
                        const int at = (g * 4 + j) * G + h;
                        for (int p = 0; p < P; p++) acc[p][h] = dot_value(acc[p][h], s[p], w.words + at, w.low_words + at);
                    }
                }
            }
        }
        for (int h = 0; h < G; h++)
            for (int p = 0; p < P; p++) {
                float* t = total + h * stride + (i + p) * 16 + sub * LANES;
                F x = to_float(acc[p][h]);
                if constexpr (Bits == 8) x = x * 65536.0f + to_float(low[p][h]) * 256.0f;
                else if constexpr (kValueLow == 0) x = x - w.bias[h];
                store_to(t, fma(x, splat(w.factor[h]), load<F>(t)));
            }
    }
}

template <int Bits, int G>
static void add_values(const Side& side, const std::uint8_t* group, int num_groups, const Weights& w, float* total, int stride,
                       const std::uint8_t* next) {
    const Tables<Bits> tables = make_tables<Bits>(side.table);
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    const int num_quartets = side.dim / 16;
    int i = 0;
    for (; i + kPair <= num_quartets; i += kPair) {
        for (int p = 0; p < kPair; p++)
            for (int g = 0; g < num_groups; g++) prefetch_quartet<Bits>(next + g * group_bytes, top_plane, i + p);
        add_some<Bits, G, kPair>(side, tables, group, num_groups, i, w, total, stride);
    }
    for (; i < num_quartets; i++) add_some<Bits, G, 1>(side, tables, group, num_groups, i, w, total, stride);
}

using ScoreFn = void (*)(const Side&, const std::uint8_t*, const std::uint8_t*, int, const Query&, float*, int, const std::uint8_t*);
using ValueFn = void (*)(const Side&, const std::uint8_t*, int, const Weights&, float*, int, const std::uint8_t*);
using WeightFn = void (*)(const Side&, const float*, const std::uint8_t*, int, int, int, Weights&);

struct PageKernels {
    ScoreFn score[kMaxGroup];
    ValueFn add[kMaxGroup];
    WeightFn weigh;
};
template <int Bits>
static void weigh(const Side& side, const float* p, const std::uint8_t* scales, int num_groups, int G, int stride, Weights& out) {
    for (int h = 0; h < G; h++) quantise_weights<Bits>(side, p + h * stride, scales, num_groups, h, G, out);
}
#define TQ_ALL_GROUPS(f, Bits) {f<Bits, 1>, f<Bits, 2>, f<Bits, 3>, f<Bits, 4>, f<Bits, 5>, f<Bits, 6>, f<Bits, 7>, f<Bits, 8>}
#define TQ_PAGE_KERNELS(Bits) {TQ_ALL_GROUPS(score_groups, Bits), TQ_ALL_GROUPS(add_values, Bits), weigh<Bits>}
static const PageKernels kPageKernels[4] = {TQ_PAGE_KERNELS(2), TQ_PAGE_KERNELS(3), TQ_PAGE_KERNELS(4), TQ_PAGE_KERNELS(8)};

TQ_INLINE const PageKernels& page_kernels(int bits) { return kPageKernels[bits == 8 ? 3 : bits - 2]; }
