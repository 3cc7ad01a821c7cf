// What stands between the products of a decoder layer, of one instruction-set level; see linear_jobs.h.
//
// Each function is told one row, so that a row's arithmetic is the same in any batch.

// x * weight / sqrt(mean of x^2 + eps).
static void norm_row(const float* x, const float* weight, int n, float eps, float* out) {
    F squares{};
    float rest = 0.0f;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const F v = load<F>(x + i);
        squares = fma(v, v, squares);
    }
    for (; i < n; i++) rest += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf((sum(squares) + rest) / float(n) + eps);
    for (i = 0; i + LANES <= n; i += LANES) store_to(out + i, load<F>(x + i) * splat(factor) * load<F>(weight + i));
    for (; i < n; i++) out[i] = x[i] * factor * weight[i];
}

// gate * sigmoid(gate), from a power of e that cannot overflow. NaN stays NaN.
TQ_INLINE F silu(F gate) {
    const F power = exp2_negative((gate < 0.0f ? gate : -gate) * 1.44269504f);
    return gate * ((gate < 0.0f ? power : splat(1.0f)) / (1.0f + power));
}

// gate becomes silu(gate) * up.
static void gate_row(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_to(gate + i, silu(load<F>(gate + i)) * load<F>(up + i));
    for (; i < n; i++) gate[i] = silu(splat(gate[i]))[0] * up[i];
}

// Pairs (stride j, stride j + gap) of x turned by cosines and sines, which lie in `turn` at the pair's two places.
static void turn_row(const float* x, const float* turn, int dim, int num_pairs, int stride, int gap, float* out) {
    int j = 0;
    if (stride == 1)
        for (; j + LANES <= num_pairs; j += LANES) {
            const F c = load<F>(turn + j), s = load<F>(turn + j + gap), a = load<F>(x + j), b = load<F>(x + j + gap);
            store_to(out + j, a * c - b * s);
            store_to(out + j + gap, a * s + b * c);
        }
    for (; j < num_pairs; j++) {
        const int first = stride * j, second = first + gap;
        const float c = turn[first], s = turn[second], a = x[first], b = x[second];
        out[first] = a * c - b * s;
        out[second] = a * s + b * c;
    }
    for (int d = 2 * num_pairs; d < dim; d++) out[d] = x[d] * turn[d];
}

static void add_row(const float* x, const float* more, int n, float* out) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_to(out + i, load<F>(x + i) + load<F>(more + i));
    for (; i < n; i++) out[i] = x[i] + more[i];
}

static const BlockTable kBlocks = {norm_row, gate_row, turn_row, add_row};
