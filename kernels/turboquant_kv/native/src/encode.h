// One page of exact rows to codes: centre, rotate, divide by the root mean square, nearest centroid, fitted scale.
// The formulas are codec/scalar_reference.py's, in float32.

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

static void encode_page(const Store& store, const Side& side, const Rows& rows, int head, int first, Centre centre, std::uint8_t* group,
                        std::uint8_t* scales) {
    const int dim = side.dim;
    alignas(64) float x[kMaxDim];
    alignas(64) std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes()) {
        const float* mean = centre.data + g * centre.stride;
        for (int t = 0; t < 16; t++) {
            const std::int64_t token = first + g * 16 + t;
            row_to_floats(rows.data, rows.dtype, head * rows.head_stride + token * rows.token_stride, dim, x);
            if (centre.data)
                for (int d = 0; d < dim; d++) x[d] -= mean[d];
            rotate(side, x);
            F squares{};
            for (int d = 0; d < dim; d += LANES) squares = fma(load<F>(x + d), load<F>(x + d), squares);
            const float energy = sum(squares), rms = __builtin_sqrtf(energy / dim);
            const bool usable = rms > 0 && rms < __builtin_inff();
            nearest_codes(side, x, usable ? 1.0f / rms : 0.0f, codes + t * dim);
            float scale = usable ? fitted_scale(side, store.scale_kind, x, codes + t * dim, energy, rms) : 0.0f;
            if (scale > 65504.0f) scale = 65504.0f;
            if (!usable && rms != 0) scale = __builtin_nanf("");
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
        for (int i = 0; i < 16 * side.dim; i++) *rows++ = side.book[codes[i]];
    }
    for (int t = 0; t < store.page_tokens; t += LANES) store_to(row_scales + t, load_half(scales + 2 * t));
}
