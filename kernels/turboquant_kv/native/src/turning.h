// What a mean of keys that turns with their position adds to scores: q . R(p) m, for blocks of 16 tokens each.
//
// With u = q_a m_a + q_b m_b and w = q_b m_a - q_a m_b of a pair (a, b) of dims, that is a sum of u cos(f p) + w sin(f p)
// over pairs. (u, w) is turned to the middle of a span of 16 blocks; seen from there its blocks lie in pairs at +d and -d, so one
// sum of cosines and one of sines serve two blocks.

// One query row's (u, w) as (2, padded).
static void pair_products(const Side& side, int head, const float* x, float* pairs) {
    const Turning& t = side.turning;
    const float *first = &t.first[std::size_t(head) * t.padded], *second = &t.second[std::size_t(head) * t.padded];
    float *u = pairs, *w = pairs + t.padded;
    auto fill = [&](int stride) {
        for (int j = 0; j < t.num_pairs; j++) {
            const float a = x[stride * j], b = x[stride * j + t.gap];
            u[j] = a * first[j] + b * second[j];
            w[j] = b * first[j] - a * second[j];
        }
    };
    if (t.stride == 1) fill(1); // known strides become vector code
    else if (t.stride == 2) fill(2);
    else fill(t.stride);
    for (int j = t.num_pairs; j < t.padded; j++) u[j] = w[j] = 0;
}

// Two neighbouring floats in every two lanes.
TQ_INLINE F splat_two(const float* p) {
    typedef std::int64_t L __attribute__((vector_size(4 * LANES)));
    std::int64_t both;
    std::memcpy(&both, p, 8);
    return (F)(L{} + both);
}

// out[r * out_stride + b]: constant[r] and what turns, for the 16 blocks from `first_block` on and G query rows, whose
// products are at pairs + r * stride. Ways: sums in flight, which hide the multiplier's latency and are then added up.
template <int G, int Ways>
static void span_shifts(const Turning& t, std::int64_t first_block, const float* pairs, int stride, const float* constant, float* out,
                        int out_stride) {
    const int n = t.padded;
    const float *span = &t.spans[first_block / kSpanBlocks * 2 * n], *start = &t.starts[first_block % kSpanBlocks * 2 * n];
    float cos[kMaxPairs], sin[kMaxPairs], turned[G][2 * kMaxPairs], sums[G][16];
    for (int j = 0; j < n; j += LANES) {
        const F a = load<F>(span + j), b = load<F>(span + n + j), c = load<F>(start + j), s = load<F>(start + n + j);
        store_to(cos + j, a * c - b * s);
        store_to(sin + j, b * c + a * s);
    }
    for (int r = 0; r < G; r++) {
        const float *u = pairs + r * stride, *w = u + n;
        for (int at = 0; at < n; at += 16)
            for (int j = at; j < at + 16; j++) { // a known count becomes vector code
                turned[r][2 * j] = u[j] * cos[j] + w[j] * sin[j];
                turned[r][2 * j + 1] = w[j] * cos[j] - u[j] * sin[j];
            }
    }
    for (int sub = 0; sub < SUBS; sub++) {
        F acc[Ways][G] = {};
        for (int j = 0; j < n; j += Ways)
            for (int y = 0; y < Ways; y++) {
                const F block = load<F>(&t.blocks[16 * (j + y) + sub * LANES]);
                for (int r = 0; r < G; r++) acc[y][r] = fma(block, splat_two(turned[r] + 2 * (j + y)), acc[y][r]);
            }
        for (int r = 0; r < G; r++) {
            for (int y = 1; y < Ways; y++) acc[0][r] += acc[y][r];
            store_to(sums[r] + sub * LANES, acc[0][r]);
        }
    }
    for (int r = 0; r < G; r++)
        for (int k = 0; k < kSpanBlocks / 2; k++) {
            const float even = sums[r][2 * k] + constant[r], odd = sums[r][2 * k + 1];
            out[r * out_stride + kSpanBlocks / 2 + k] = even + odd;
            out[r * out_stride + kSpanBlocks / 2 - 1 - k] = even - odd;
        }
}

using SpanFn = void (*)(const Turning&, std::int64_t, const float*, int, const float*, float*, int);
// For the heads of a group, whose number is a model's own.
static constexpr SpanFn kSpanShifts[kMaxGroup] = {span_shifts<1, 4>, span_shifts<2, 4>, span_shifts<3, 2>, span_shifts<4, 2>,
                                                  span_shifts<5, 1>, span_shifts<6, 1>, span_shifts<7, 1>, span_shifts<8, 1>};
// For rows of a prompt, of which any number may be left over: each gets the same bits among one as among eight.
static constexpr SpanFn kSpanShiftsOfRows[kMaxGroup] = {span_shifts<1, 1>, span_shifts<2, 1>, span_shifts<3, 1>, span_shifts<4, 1>,
                                                        span_shifts<5, 1>, span_shifts<6, 1>, span_shifts<7, 1>, span_shifts<8, 1>};
