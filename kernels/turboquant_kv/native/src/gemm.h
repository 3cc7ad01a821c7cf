// A small register-blocked float32 product: C (M, N) (+)= A (M, K) x B, with B packed in panels.
//
// Panel p holds columns [p * kPanel, (p + 1) * kPanel) as (K, kPanel), so that one panel streams through the
// first-level cache. Last panels are padded.

constexpr int kPanel = kGemmVectors * LANES;

TQ_INLINE std::size_t panel_floats(int columns, int depth) { return std::size_t((columns + kPanel - 1) / kPanel) * kPanel * depth; }

// Where element (k, n) of B lies.
TQ_INLINE std::size_t panel_at(int depth, int k, int n) { return std::size_t(n / kPanel) * kPanel * depth + std::size_t(k) * kPanel + n % kPanel; }

template <int M, int V>
static void gemm_block(const float* a, std::size_t lda, int depth, const float* b, float* c, std::size_t ldc, bool add) {
    F acc[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = add ? load<F>(c + m * ldc + v * LANES) : F{};
    for (int k = 0; k < depth; k++, b += kPanel) {
        F row[V];
        for (int v = 0; v < V; v++) row[v] = load<F>(b + v * LANES);
        for (int m = 0; m < M; m++) {
            const F x = splat(a[m * lda + k]);
            for (int v = 0; v < V; v++) acc[m][v] = fma(x, row[v], acc[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store_to(c + m * ldc + v * LANES, acc[m][v]);
}

using GemmFn = void (*)(const float*, std::size_t, int, const float*, float*, std::size_t, bool);
template <int V> struct GemmRow {
    static constexpr GemmFn fn[8] = {gemm_block<1, V>, gemm_block<2, V>, gemm_block<3, V>, gemm_block<4, V>,
                                     gemm_block<5, V>, gemm_block<6, V>, gemm_block<7, V>, gemm_block<8, V>};
};

// N is a multiple of LANES.
static void gemm(const float* a, std::size_t lda, int M, int depth, const float* b, int N, float* c, std::size_t ldc, bool add) {
    static_assert(kGemmVectors == 2, "the column remainder below is one vector");
    for (int n = 0; n < N; n += kPanel) {
        const float* panel = b + std::size_t(n) * depth;
        const bool full = N - n >= kPanel;
        for (int m = 0; m < M; m += kGemmRows) {
            const int rows = min1(kGemmRows, M - m);
            (full ? GemmRow<2>::fn : GemmRow<1>::fn)[rows - 1](a + m * lda, lda, depth, panel, c + m * ldc + n, ldc, add);
        }
    }
}
