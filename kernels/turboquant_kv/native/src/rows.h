// Exact rows in the model's dtype as floats, and the randomised Hadamard rotation of one row.

TQ_INLINE float element(const void* data, Dtype dtype, std::int64_t i) {
    if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
    const std::uint16_t h = static_cast<const std::uint16_t*>(data)[i];
    return dtype == Dtype::f16 ? half_to_float(h) : bf16_to_float(h);
}

// LANES consecutive elements beginning at `i`.
template <Dtype D> TQ_INLINE F load_row(const void* data, std::int64_t i) {
    if constexpr (D == Dtype::f32) return load<F>(static_cast<const float*>(data) + i);
    else if constexpr (D == Dtype::f16) return load_half(static_cast<const std::uint16_t*>(data) + i);
    else return (F)(__builtin_convertvector(load<H>(static_cast<const std::uint16_t*>(data) + i), U) << 16);
}

#if !defined(TQ_OWN_SUMS)
// sums[4 j + i] = sum(x[i][j]).
template <int M> TQ_INLINE void sums_of(const F (&x)[4][M], float* sums) {
    for (int j = 0; j < M; j++)
        for (int i = 0; i < 4; i++) sums[4 * j + i] = sum(x[i][j]);
}
#endif

static void row_to_floats(const void* data, Dtype dtype, std::int64_t at, int dim, float* x) {
    for (int d = 0; d < dim; d += LANES) {
        F v = dtype == Dtype::f32 ? load_row<Dtype::f32>(data, at + d)
            : dtype == Dtype::f16 ? load_row<Dtype::f16>(data, at + d) : load_row<Dtype::bf16>(data, at + d);
        store_to(x + d, v);
    }
}

static void row_from_floats(const float* x, int dim, void* data, Dtype dtype, std::int64_t at) {
    if (dtype == Dtype::f32) {
        std::memcpy(static_cast<float*>(data) + at, x, sizeof(float) * dim);
        return;
    }
    std::uint16_t* half = static_cast<std::uint16_t*>(data) + at;
    for (int d = 0; d < dim; d++) half[d] = dtype == Dtype::f16 ? float_to_half(x[d]) : float_to_bf16(x[d]);
}

// Sylvester's matrix of order `power` applied to each of `count` consecutive runs; unscaled.
static void butterflies(float* x, int count, int power) {
    const int total = count * power;
    const int inner = min1(power, 4);
    for (int at = 0; at < total; at += inner) { // the first two rounds inside four elements
        float* p = x + at;
        float a = p[0] + p[1], b = p[0] - p[1], c = p[2] + p[3], d = p[2] - p[3];
        p[0] = a + c, p[1] = b + d, p[2] = a - c, p[3] = b - d;
    }
    for (int width = inner; width < power; width *= 2)
        for (int at = 0; at < total; at += 2 * width)
            for (int i = 0; i < width; i++) {
                float low = x[at + i], high = x[at + width + i];
                x[at + i] = low + high;
                x[at + width + i] = low - high;
            }
}

// base (m, m), or its transpose, over the m runs of `power` elements.
static void apply_base(const Side& side, float* x, bool transpose) {
    const int m = side.base_order, power = side.dim / m;
    if (m == 1) return;
    float y[kMaxDim];
    for (int r = 0; r < m; r++) {
        for (int i = 0; i < power; i++) y[r * power + i] = 0;
        for (int c = 0; c < m; c++) {
            const float s = transpose ? side.base[c * m + r] : side.base[r * m + c];
            for (int i = 0; i < power; i++) y[r * power + i] += s * x[c * power + i];
        }
    }
    std::memcpy(x, y, sizeof(float) * side.dim);
}

static void rotate(const Side& side, float* x) {
    const float scale = 1.0f / __builtin_sqrtf(float(side.dim));
    for (int d = 0; d < side.dim; d++) x[d] *= side.signs[d] * scale;
    butterflies(x, side.base_order, side.dim / side.base_order);
    apply_base(side, x, false);
}

static void unrotate(const Side& side, float* y) {
    const float scale = 1.0f / __builtin_sqrtf(float(side.dim));
    butterflies(y, side.base_order, side.dim / side.base_order);
    apply_base(side, y, true);
    for (int d = 0; d < side.dim; d++) y[d] *= side.signs[d] * scale;
}

static void unrotate_rows(const Side& side, Centre centre, float* rows, int num_rows) {
    for (int r = 0; r < num_rows; r++) {
        float* x = rows + std::size_t(r) * side.dim;
        unrotate(side, x);
        const float* mean = centre.data + r / kGroupTokens * centre.stride;
        if (centre.data)
            for (int d = 0; d < side.dim; d++) x[d] += mean[d];
    }
}
