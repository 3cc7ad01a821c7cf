// One page of exact rows to codes: centre, rotate, divide by the root mean square, nearest centroids or a trellis's path,
// fitted scale. The formulas are codec/scalar_reference.py's and codec/trellis_reference.py's, in float32.

// The nearest centroids' codes of y / rms: the number of thresholds below. Few thresholds are counted, 255 searched.
static void nearest_codes(const Side& side, const float* y, float inverse, std::uint8_t* codes) {
    const int num_thresholds = (1 << side.bits) - 1;
    if (side.bits == 8) {
        for (int d = 0; d < side.dim; d++) {
            const float x = y[d] * inverse;
            int code = 0;
            for (int step = 128; step; step /= 2) code += x > side.thresholds[code + step - 1] ? step : 0;
            codes[d] = std::uint8_t(code);
        }
        return;
    }
    for (int d = 0; d < side.dim; d += LANES) {
        const F x = load<F>(y + d) * inverse;
        I code{};
        for (int i = 0; i < num_thresholds; i++) code -= x > side.thresholds[i];
        store_to(codes + d, __builtin_convertvector(code, B1));
    }
}

static float fitted_scale(const Side& side, ScaleKind kind, const float* y, const std::uint8_t* codes, float energy, float rms) {
    if (kind == ScaleKind::plain) return rms;
    float inner = 0, own = 0;
    for (int d = 0; d < side.dim; d++) {
        const float c = side.book[codes[d]];
        inner += y[d] * c;
        own += c * c;
    }
    if (kind == ScaleKind::norm) return __builtin_sqrtf(energy / own);
    if (kind == ScaleKind::least_squares) return inner / own;
    return energy / (inner > 0 ? inner : 1.0f);
}

// Viterbi's search (codec/trellis_reference.py) for 16 tokens at a time: z (dim, 16) to codes and levels (16, dim).
static void search_trellis(const Side& side, const float* z, std::uint8_t* codes, std::uint8_t* levels) {
    constexpr int num_states = 8; // the last three branch bits, the newest in bit 0
    const int dim = side.dim, per_subset = 1 << (side.bits - 1);
    auto subset = [](int state, int branch) { return 2 * (branch ^ (state >> 1 & 1) ^ (state >> 2 & 1)) + (state & 1); };
    float middle[4][7] = {};
    for (int s = 0; s < 4; s++)
        for (int n = 0; n + 1 < per_subset; n++) middle[s][n] = float((double(side.book[4 * n + s]) + side.book[4 * n + 4 + s]) / 2);
    alignas(64) std::int32_t steps[kMaxDim * LANES]; // each: 8 bits of whether a state came from the upper one, 3 of own bits a subset
    for (int sub = 0; sub < SUBS; sub++) {
        F cost[num_states], next[num_states];
        for (int t = 0; t < num_states; t++) cost[t] = splat(t ? __builtin_inff() : 0.0f);
        for (int d = 0; d < dim; d++) {
            const F x = load<F>(z + d * 16 + sub * LANES);
            F error[4];
            I step{};
            for (int s = 0; s < 4; s++) {
                F value = splat(side.book[s]);
                I own{};
                for (int n = 0; n + 1 < per_subset; n++) {
                    const I above = x > middle[s][n];
                    value = above ? splat(side.book[4 * n + 4 + s]) : value;
                    own -= above;
                }
                error[s] = (x - value) * (x - value);
                step |= own << (8 + 3 * s);
            }
            for (int t = 0; t < num_states; t++) {
                const int low = t >> 1, high = low + num_states / 2;
                const F by_low = cost[low] + error[subset(low, t & 1)], by_high = cost[high] + error[subset(high, t & 1)];
                const I is_high = by_high < by_low;
                next[t] = is_high ? by_high : by_low;
                step |= is_high & (1 << t);
            }
            for (int t = 0; t < num_states; t++) cost[t] = next[t];
            store_to(steps + d * LANES, step);
        }
        I state{};
        F least = cost[0];
        for (int t = 1; t < num_states; t++) {
            const I is_less = cost[t] < least;
            least = is_less ? cost[t] : least;
            state = is_less ? splat(t) : state;
        }
        for (int d = dim - 1; d >= 0; d--) {
            const I step = load<I>(steps + d * LANES), before = state >> 1 | (step >> state & 1) << 2;
            const I which = ((state ^ before >> 1 ^ before >> 2) & 1) << 1 | (before & 1), own = step >> (which * 3 + 8) & 7;
            std::uint8_t code[LANES], level[LANES];
            store_to(code, __builtin_convertvector(own << 1 | (state & 1), B1));
            store_to(level, __builtin_convertvector(own << 2 | which, B1));
            for (int lane = 0; lane < LANES; lane++) {
                codes[(sub * LANES + lane) * dim + d] = code[lane];
                levels[(sub * LANES + lane) * dim + d] = level[lane];
            }
            state = before;
        }
    }
}

static void encode_page(const Store& store, const Side& side, const Rows& rows, int head, int first, Centre centre, std::uint8_t* group,
                        std::uint8_t* scales) {
    const int dim = side.dim;
    alignas(64) float y[16 * kMaxDim], z[16 * kMaxDim], energy[16], rms[16];
    alignas(64) std::uint8_t codes[16 * kMaxDim], levels[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes()) {
        const float* mean = centre.data + g * centre.stride;
        for (int t = 0; t < 16; t++) {
            const std::int64_t token = first + g * 16 + t;
            float* x = y + t * dim;
            row_to_floats(rows.data, rows.dtype, head * rows.head_stride + token * rows.token_stride, dim, x);
            if (centre.data)
                for (int d = 0; d < dim; d++) x[d] -= mean[d];
            rotate(side, x);
            F squares{};
            for (int d = 0; d < dim; d += LANES) squares = fma(load<F>(x + d), load<F>(x + d), squares);
            energy[t] = sum(squares), rms[t] = __builtin_sqrtf(energy[t] / dim);
            const bool usable = rms[t] > 0 && rms[t] < __builtin_inff();
            const float inverse = usable ? 1.0f / rms[t] : 0.0f;
            if (side.is_trellis)
                for (int d = 0; d < dim; d++) z[d * 16 + t] = usable ? x[d] * inverse : 0.0f;
            else nearest_codes(side, x, inverse, codes + t * dim);
        }
        if (side.is_trellis) search_trellis(side, z, codes, levels);
        for (int t = 0; t < 16; t++) {
            const bool usable = rms[t] > 0 && rms[t] < __builtin_inff();
            const std::uint8_t* indices = (side.is_trellis ? levels : codes) + t * dim;
            float scale = usable ? fitted_scale(side, store.scale_kind, y + t * dim, indices, energy[t], rms[t]) : 0.0f;
            if (scale > 65504.0f) scale = 65504.0f;
            if (!usable && rms[t] != 0) scale = __builtin_nanf("");
            const std::uint16_t half = float_to_half(scale);
            std::memcpy(scales + 2 * (g * 16 + t), &half, 2);
        }
        pack_group(side, codes, group);
    }
}

static void decode_page(const Store& store, const Side& side, const std::uint8_t* group, const std::uint8_t* scales, float* rows, float* row_scales) {
    std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes()) {
        unpack_group(side, group, codes);
        if (side.is_trellis) codes_to_levels(side.dim, codes);
        for (int i = 0; i < 16 * side.dim; i++) *rows++ = side.book[codes[i]];
    }
    for (int t = 0; t < store.page_tokens; t += LANES) store_to(row_scales + t, load_half(scales + 2 * t));
}
