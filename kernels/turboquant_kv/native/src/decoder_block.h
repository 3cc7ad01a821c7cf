// One decoder layer: all that stands around its attention, in two calls.
//
// Projections, norms, rotation of queries and keys, the gated MLP and what is added back: between its products a layer is a
// few thousand numbers, which as operations of their own cost more than the products (docs/cpu.md).
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "linear_weights.h"

namespace tq {

constexpr int kMostHeadDim = 1024;

// Weights (n,) of an RMS norm; none where a model has none there.
class Norm {
  public:
    Norm() = default;
    Norm(nanobind::handle weight, const char* name, int n, float eps) : eps_(eps) {
        if (weight.is_none()) return;
        if (!(eps >= 0) || std::isinf(eps)) throw std::invalid_argument("the eps of a norm is no number from 0 on");
        const View view(weight, name, 1);
        view.expect_type("f", 4);
        view.expect_shape({n});
        view.expect_dense();
        const auto* p = static_cast<const float*>(view.data());
        weight_.assign(p, p + n);
    }
    bool is_there() const { return !weight_.empty(); }
    void apply(const BlockTable& kernels, const float* x, float* out) const { kernels.norm_row(x, weight_.data(), int(weight_.size()), eps_, out); }

  private:
    std::vector<float> weight_;
    float eps_ = 0.0f;
};

class DecoderBlock {
  public:
    DecoderBlock(const DecoderBlock&) = delete;
    // linears: queries, keys, values, output, gate, up and down. norms: of attention's and of the MLP's input, of queries and of
    // keys, the last two (D,) or None; eps of each. Of a head's dims the first 2 * num_pairs turn, in pairs stride * j and
    // stride * j + gap.
    DecoderBlock(std::vector<nanobind::object> linears, std::vector<nanobind::object> norms, std::vector<float> eps, int num_heads, int num_kv_heads, int num_pairs,
                 bool is_interleaved)
        : linears_(std::move(linears)), num_heads_(num_heads), num_kv_heads_(num_kv_heads), num_pairs_(num_pairs), stride_(is_interleaved ? 2 : 1),
          gap_(is_interleaved ? 1 : num_pairs) {
        if (linears_.size() != 7 || norms.size() != 4 || eps.size() != 4) throw std::invalid_argument("a decoder layer has 7 linear layers and up to 4 norms");
        for (int i = 0; i < 7; i++) w_[i] = nanobind::cast<const LinearWeights*>(linears_[i]);
        const int width = w_[kQ]->num_in();
        if (num_heads < 1 || num_kv_heads < 1 || w_[kQ]->num_out() % num_heads || w_[kV]->num_out() % num_kv_heads)
            throw std::invalid_argument("projections are no multiple of their heads");
        dim_ = w_[kQ]->num_out() / num_heads, v_dim_ = w_[kV]->num_out() / num_kv_heads;
        if (dim_ > kMostHeadDim || v_dim_ > kMostHeadDim || num_pairs < 0 || 2 * num_pairs > dim_) throw std::invalid_argument("head dimensions are out of range");
        const int wanted[7][2] = {{num_heads * dim_, width}, {num_kv_heads * dim_, width}, {num_kv_heads * v_dim_, width}, {width, num_heads * v_dim_},
                                  {w_[kGate]->num_out(), width}, {w_[kGate]->num_out(), width}, {width, w_[kGate]->num_out()}};
        for (int i = 0; i < 7; i++) {
            if (w_[i]->num_out() != wanted[i][0] || w_[i]->num_in() != wanted[i][1]) throw std::invalid_argument("linear layers of a decoder layer do not fit each other");
            if (&w_[i]->level() != &w_[0]->level()) throw std::invalid_argument("linear layers of a decoder layer have different instruction sets");
        }
        attention_norm_ = Norm(norms[0], "attention_norm", width, eps[0]);
        mlp_norm_ = Norm(norms[1], "mlp_norm", width, eps[1]);
        if (!attention_norm_.is_there() || !mlp_norm_.is_there()) throw std::invalid_argument("a decoder layer has norms of its inputs");
        q_norm_ = Norm(norms[2], "q_norm", dim_, eps[2]);
        k_norm_ = Norm(norms[3], "k_norm", dim_, eps[3]);
    }

    // x (B, T, W) to queries (B, Hq, T, D), keys (B, H, T, D) and values (B, H, T, Dv), all float32 and dense; turn (1 or B, T, D):
    // cosines and sines of each position at the two dims of a pair, factors at dims that do not turn.
    void attention_inputs(nanobind::handle x, nanobind::handle turn, nanobind::handle q, nanobind::handle k, nanobind::handle v) const {
        const View in = dense(x, "x", {-1, -1, w_[kQ]->num_in()}, false);
        const std::int64_t batch = in.shape(0), len = in.shape(1);
        const View turns = dense(turn, "turn", {-1, len, dim_}, false);
        if (turns.shape(0) != 1 && turns.shape(0) != batch) turns.fail("is of another number of sequences");
        const View outs[3] = {dense(q, "queries", {batch, num_heads_, len, dim_}, true), dense(k, "keys", {batch, num_kv_heads_, len, dim_}, true),
                              dense(v, "values", {batch, num_kv_heads_, len, v_dim_}, true)};
        const int num_rows = rows_of(in);
        if (num_rows == 0) return;
        const auto* rows = static_cast<const float*>(in.data());
        const auto* cosines = static_cast<const float*>(turns.data());
        const std::int64_t turn_stride = turns.shape(0) == 1 ? 0 : len * dim_;
        float* to[3];
        for (int i = 0; i < 3; i++) to[i] = static_cast<float*>(outs[i].data());
        nanobind::gil_scoped_release release;
        project(rows, num_rows, int(len), cosines, turn_stride, to);
    }

    // The same for pointers that are proven: rows b * len + t, of which sequence b's first position has its turn at
    // turn + b * turn_stride. Without the GIL.
    void project(const float* rows, int num_rows, int len, const float* turn, std::int64_t turn_stride, float* const* to) const {
        const FedRows& fed = normed(attention_norm_, rows, num_rows, len, {kQ, kK, kV});
        const BlockTable& kernels = level().blocks;
        const Norm* norms[3] = {&q_norm_, &k_norm_, nullptr};
        int each[3], first_task[4] = {0}; // heads of a task: as few as can be, unless the BLAS multiplies
        for (int side = 0; side < 3; side++) {
            const int heads = heads_of(side);
            each[side] = w_[kQ + side]->has_dense(fed) ? std::clamp(w_[kQ + side]->outputs_each(fed) / dim_of(side), 1, heads) : 1;
            first_task[side + 1] = first_task[side] + (heads + each[side] - 1) / each[side];
        }
        run_tasks(first_task[3], [&](int task, int) {
            const int side = task < first_task[1] ? 0 : task < first_task[2] ? 1 : 2;
            const int dim = dim_of(side), heads = heads_of(side);
            const int first = (task - first_task[side]) * each[side], count = std::min(each[side], heads - first);
            float* projected = scratch_floats<1>(std::size_t(num_rows) * count * dim);
            w_[kQ + side]->product(fed, first * dim, (first + count) * dim, {projected, std::size_t(count) * dim, first * dim});
            for (int m = 0; m < num_rows; m++)
                for (int head = first; head < first + count; head++) {
                    const std::int64_t b = m / len, t = m % len;
                    float *row = projected + (std::size_t(m) * count + head - first) * dim, *out = to[side] + ((b * heads + head) * len + t) * dim;
                    if (side == 2) {
                        std::memcpy(out, row, sizeof(float) * dim);
                        continue;
                    }
                    if (norms[side]->is_there()) norms[side]->apply(kernels, row, row);
                    kernels.turn_row(row, turn + b * turn_stride + t * dim, dim, num_pairs_, stride_, gap_, out);
                }
        });
    }

    // The layer's result y (B, T, W) from its input x (B, T, W) and what attention gave, (B, Hq, T, Dv), dense along its last axis.
    void outputs(nanobind::handle x, nanobind::handle attended, nanobind::handle y) const {
        const View in = dense(x, "x", {-1, -1, w_[kQ]->num_in()}, false);
        const std::int64_t batch = in.shape(0), len = in.shape(1);
        const View heads(attended, "attended", 4);
        heads.expect_type("f", 4);
        heads.expect_shape({batch, num_heads_, len, v_dim_});
        heads.expect_dense_last_axis();
        const View out = dense(y, "y", {batch, len, w_[kQ]->num_in()}, true);
        const int num_rows = rows_of(in);
        if (num_rows == 0) return;
        const std::int64_t strides[3] = {heads.stride(0), heads.stride(1), heads.stride(2)};
        const auto* from = static_cast<const float*>(heads.data());
        const auto* rows = static_cast<const float*>(in.data());
        auto* to = static_cast<float*>(out.data());
        nanobind::gil_scoped_release release;
        finish(rows, num_rows, int(len), from, strides, to);
    }

    // The same for pointers that are proven: head h of row t of sequence b begins at attended + b * strides[0] + h * strides[1] +
    // t * strides[2]. `to` may be `rows`. Without the GIL.
    void finish(const float* rows, int num_rows, int len, const float* attended, const std::int64_t* strides, float* to) const {
        thread_local FedRows gathered;
        const int joined = num_heads_ * v_dim_;
        float* together = scratch_floats<2>(std::size_t(num_rows) * joined);
        gathered.set(together, num_rows, joined, len);
        w_[kO]->expect_of(gathered);
        gathered.each_row(level().linear, [&](int m) {
            for (int head = 0; head < num_heads_; head++)
                std::memcpy(together + std::size_t(m) * joined + std::size_t(head) * v_dim_,
                            attended + m / len * strides[0] + head * strides[1] + m % len * strides[2], sizeof(float) * v_dim_);
        });
        add_product(kO, gathered, rows, to);
        add_product(kDown, gated(to, num_rows, len), to, to);
    }

    int width() const { return w_[kQ]->num_in(); }
    int num_heads() const { return num_heads_; }
    int num_kv_heads() const { return num_kv_heads_; }
    int dim() const { return dim_; }
    int v_dim() const { return v_dim_; }
    const KernelTable& level() const { return w_[0]->level(); }

  private:
    enum { kQ, kK, kV, kO, kGate, kUp, kDown };

    static View dense(nanobind::handle object, const char* name, std::initializer_list<std::int64_t> shape, bool writable) {
        View view(object, name, int(shape.size()), writable);
        view.expect_type("f", 4);
        view.expect_shape(shape);
        view.expect_dense();
        return view;
    }

    int dim_of(int side) const { return side == 2 ? v_dim_ : dim_; } // 0: queries, 1: keys, 2: values
    int heads_of(int side) const { return side == 0 ? num_heads_ : num_kv_heads_; }

    static int rows_of(const View& view) {
        if (view.shape(0) > kMostWidth || view.shape(1) > kMostWidth || view.shape(0) * view.shape(1) > kMostWidth) view.fail("has too many rows");
        return int(view.shape(0) * view.shape(1));
    }

    // Rows (num_rows, W) after a norm, as these linear layers take them.
    const FedRows& normed(const Norm& norm, const float* rows, int num_rows, int len, std::initializer_list<int> linears) const {
        thread_local FedRows fed;
        float* after = scratch_floats<3>(std::size_t(num_rows) * width());
        fed.set(after, num_rows, width(), len);
        for (int i : linears) w_[i]->expect_of(fed);
        fed.each_row(level().linear, [&](int m) { norm.apply(level().blocks, rows + std::size_t(m) * width(), after + std::size_t(m) * width()); });
        return fed;
    }

    // What the MLP's last product multiplies, from rows (num_rows, W).
    const FedRows& gated(const float* rows, int num_rows, int len) const {
        const FedRows& fed = normed(mlp_norm_, rows, num_rows, len, {kGate, kUp});
        const int hidden = w_[kGate]->num_out(), each = w_[kGate]->outputs_each(fed, 2);
        thread_local FedRows gates;
        float* inner = scratch_floats<4>(std::size_t(num_rows) * hidden);
        run_tasks((hidden + each - 1) / each, [&](int task, int) {
            const int first = task * each, count = std::min(hidden, first + each) - first;
            float* ups = scratch_floats<1>(std::size_t(num_rows) * count);
            w_[kGate]->product(fed, first, first + count, {inner + first, std::size_t(hidden), first});
            w_[kUp]->product(fed, first, first + count, {ups, std::size_t(count), first});
            for (int m = 0; m < num_rows; m++) level().blocks.gate_row(inner + std::size_t(m) * hidden + first, ups + std::size_t(m) * count, count);
        });
        gates.set(inner, num_rows, hidden, len);
        w_[kDown]->expect_of(gates);
        if (w_[kDown]->matrix().bits) gates.each_row(level().linear, [](int) {});
        return gates;
    }

    // to = rows + product of x; both (num_rows, W), and may be the same.
    void add_product(int linear, const FedRows& x, const float* rows, float* to) const {
        const int each = w_[linear]->outputs_each(x);
        run_tasks((width() + each - 1) / each, [&](int task, int) {
            const int first = task * each, count = std::min(width(), first + each) - first;
            float* product = scratch_floats<1>(std::size_t(x.num_rows()) * count);
            w_[linear]->product(x, first, first + count, {product, std::size_t(count), first});
            for (int m = 0; m < x.num_rows(); m++) {
                const std::size_t at = std::size_t(m) * width() + first;
                level().blocks.add_row(rows + at, product + std::size_t(m) * count, count, to + at);
            }
        });
    }

    std::vector<nanobind::object> linears_; // keeps what w_ points to
    const LinearWeights* w_[7];
    int num_heads_, num_kv_heads_, dim_ = 0, v_dim_ = 0;
    int num_pairs_, stride_, gap_;
    Norm attention_norm_, mlp_norm_, q_norm_, k_norm_;
};

} // namespace tq
