// Integer dot products: scores of one page's keys, and weighted sums of its values, for G query heads at once.

// Query heads of one chunk, quantised. words[(dim / 4) * G + h]: four int8 dims of head h.
struct Query {
    alignas(64) std::int32_t words[kMaxDim / 4 * kMaxGroup];
    alignas(64) std::int32_t low_words[kMaxDim / 4 * kMaxGroup]; // 8 bits only: query = 256 * word + low
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
    const int limit = side.bits == 8 ? 127 * 256 : 127;
    const float step = largest > 0 && largest < 3e38f ? largest / limit : largest, inverse = largest > 0 ? 1.0f / step : 0.0f;
    alignas(64) std::int32_t whole[kMaxDim];
    for (int d = 0; d < dim; d += LANES) store_to(whole + d, round_to_int(load<F>(x + d) * inverse));
    int total = 0, low_total = 0;
    for (int n = 0; n < dim / 4; n++) {
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

// Scores of `num_groups` groups of 16 tokens: out[h * stride + token].
template <int Bits, int G>
static void score_groups(const Side& side, const std::uint8_t* group, const std::uint8_t* scales, int num_groups, const Query& q,
                         float* out, int stride, const std::uint8_t* next) {
    const Tables<Bits> tables = make_tables<Bits>(side.table);
    const int num_quartets = side.dim / 16;
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int g = 0; g < num_groups; g++, group += group_bytes, next += group_bytes) {
        for (int sub = 0; sub < SUBS; sub++) {
            I acc[G], low[G];
            for (int h = 0; h < G; h++) acc[h] = low[h] = I{};
            for (int i = 0; i < num_quartets; i++) {
                const std::int32_t* words = q.words + i * 4 * G;
                if constexpr (Bits == 8) {
                    const std::int32_t* low_words = q.low_words + i * 4 * G;
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + i * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 w = (B4)splat(words[j * G + h]);
                            acc[h] = dot_us(acc[h], c, w);
                            low[h] = dot_us(dot_us(low[h], f, w), c, (B4)splat(low_words[j * G + h]));
                        }
                    }
                } else {
                    B4 c[4];
                    unpack_quartet<Bits>(group, top_plane, i, sub, tables, c);
                    for (int j = 0; j < 4; j++)
                        for (int h = 0; h < G; h++) acc[h] = dot_key(acc[h], c[j], (B4)splat(words[j * G + h]));
                }
                // One page ahead: pages are scattered, so the hardware cannot guess.
                if (sub == 0) {
                    const std::uint8_t* p = next + i * quartet_bytes(Bits);
                    for (std::size_t line = 0; line < quartet_bytes(Bits); line += 64) __builtin_prefetch(p + line);
                    if (Bits == 3 && i % 2 == 0) __builtin_prefetch(next + top_plane + i * 32);
                }
            }
            const F key_scale = load_half(scales + 2 * (g * 16 + sub * LANES));
            for (int h = 0; h < G; h++) {
                F x;
                // 8 bits: the dropped product of both low bytes has mean 128 * low query.
                if constexpr (Bits == 8)
                    x = to_float(acc[h] - q.high_bias[h]) * 65536.0f + to_float(low[h] - q.low_bias[h]) * 256.0f + float(q.low_bias[h]);
                else x = to_float(acc[h]) - q.bias[h];
                store_to(out + h * stride + g * 16 + sub * LANES, x * q.factor[h] * key_scale + q.shift[h]);
            }
        }
    }
}

// Weights of one block of up to 32 tokens as bytes: words[(token / 4) * G + h], value = byte * factor.
struct Weights {
    alignas(64) std::uint32_t words[8 * kMaxGroup];
    alignas(64) std::uint32_t low_words[8 * kMaxGroup];
    float factor[kMaxGroup];
    float bias[kMaxGroup]; // table offset times sum of the bytes
};

constexpr int kBlockGroups = 2;

// w (num_groups * 16) weights >= 0 of head h.
template <int Bits> TQ_INLINE void quantise_weights(const Side& side, const float* w, int num_groups, int h, int G, Weights& out) {
    F largest{};
    for (int i = 0; i < num_groups * 16; i += LANES) largest = vmax(largest, load<F>(w + i));
    const float peak = maximum(largest);
    const float limit = Bits == 8 ? 65535.0f : 255.0f;
    const float inverse = peak > 1e-30f ? limit / peak : 0.0f;
    out.factor[h] = peak / limit * side.table.step;
    std::int32_t total = 0;
    alignas(64) std::uint8_t bytes[16 * kBlockGroups], low_bytes[16 * kBlockGroups];
    for (int i = 0; i < num_groups * 16; i += LANES) {
        const I x = round_to_int(load<F>(w + i) * inverse);
        if constexpr (Bits == 8) {
            store_to(bytes + i, __builtin_convertvector(x >> 8, B1));
            store_to(low_bytes + i, __builtin_convertvector(x & 255, B1));
        } else store_to(bytes + i, __builtin_convertvector(x, B1));
    }
    if (kValueLow == 0 && Bits != 8)
        for (int i = 0; i < num_groups * 16; i++) total += bytes[i];
    out.bias[h] = side.table.offset * float(total);
    for (int i = 0; i < num_groups * 4; i++) {
        std::memcpy(&out.words[i * G + h], bytes + 4 * i, 4);
        if (Bits == 8) std::memcpy(&out.low_words[i * G + h], low_bytes + 4 * i, 4);
    }
}

// total[h * stride + dim] += sum over the block's tokens of weight * centroid.
template <int Bits, int G>
static void add_values(const Side& side, const std::uint8_t* group, int num_groups, const Weights& w, float* total, int stride,
                       const std::uint8_t* next) {
    const Tables<Bits> tables = make_tables<Bits>(side.table);
    const std::size_t group_bytes = side.group_bytes(), top_plane = top_plane_at(side.dim);
    for (int i = 0; i < side.dim / 16; i++) {
        for (int g = 0; g < num_groups; g++) {
            const std::uint8_t* p = next + g * group_bytes + i * quartet_bytes(Bits);
            for (std::size_t line = 0; line < quartet_bytes(Bits); line += 64) __builtin_prefetch(p + line);
            if (Bits == 3 && i % 2 == 0) __builtin_prefetch(next + g * group_bytes + top_plane + i * 32);
        }
        for (int sub = 0; sub < SUBS; sub++) {
            I acc[G], low[G];
            for (int h = 0; h < G; h++) acc[h] = low[h] = I{};
            for (int g = 0; g < num_groups; g++) {
                const std::uint32_t* words = w.words + g * 4 * G;
                if constexpr (Bits == 8) {
                    const std::uint32_t* low_words = w.low_words + g * 4 * G;
                    for (int j = 0; j < 4; j++) {
                        const B4 index = load<B4>(group + g * group_bytes + i * 256 + j * 64 + sub * 4 * LANES);
                        const B4 c = look_up_256(tables.entry, index), f = look_up_256(tables.low, index);
                        for (int h = 0; h < G; h++) {
                            const B4 high = (B4)splat(std::int32_t(words[j * G + h]));
                            acc[h] = dot_us(acc[h], high, c);
                            low[h] = dot_us(dot_us(low[h], high, f), (B4)splat(std::int32_t(low_words[j * G + h])), c);
                        }
                    }
                } else {
                    B4 c[4];
                    unpack_quartet<Bits>(group + g * group_bytes, top_plane, i, sub, tables, c);
                    for (int j = 0; j < 4; j++)
                        for (int h = 0; h < G; h++) acc[h] = dot_value(acc[h], (B4)splat(std::int32_t(words[j * G + h])), c[j]);
                }
            }
            for (int h = 0; h < G; h++) {
                float* t = total + h * stride + i * 16 + sub * LANES;
                F x = to_float(acc[h]);
                if constexpr (Bits == 8) x = x * 65536.0f + to_float(low[h]) * 256.0f;
                else if constexpr (kValueLow == 0) x = x - w.bias[h];
                store_to(t, fma(x, splat(w.factor[h]), load<F>(t)));
            }
        }
    }
}

using ScoreFn = void (*)(const Side&, const std::uint8_t*, const std::uint8_t*, int, const Query&, float*, int, const std::uint8_t*);
using ValueFn = void (*)(const Side&, const std::uint8_t*, int, const Weights&, float*, int, const std::uint8_t*);
using WeightFn = void (*)(const Side&, const float*, int, int, int, Weights&);

struct PageKernels {
    ScoreFn score[kMaxGroup];
    ValueFn add[kMaxGroup];
    WeightFn weigh;
};
template <int Bits> static void weigh(const Side& side, const float* w, int num_groups, int h, int G, Weights& out) {
    quantise_weights<Bits>(side, w, num_groups, h, G, out);
}
#define TQ_ALL_GROUPS(f, Bits) {f<Bits, 1>, f<Bits, 2>, f<Bits, 3>, f<Bits, 4>, f<Bits, 5>, f<Bits, 6>, f<Bits, 7>, f<Bits, 8>}
#define TQ_PAGE_KERNELS(Bits) {TQ_ALL_GROUPS(score_groups, Bits), TQ_ALL_GROUPS(add_values, Bits), weigh<Bits>}
static const PageKernels kPageKernels[4] = {TQ_PAGE_KERNELS(2), TQ_PAGE_KERNELS(3), TQ_PAGE_KERNELS(4), TQ_PAGE_KERNELS(8)};

TQ_INLINE const PageKernels& page_kernels(int bits) { return kPageKernels[bits == 8 ? 3 : bits - 2]; }
