// A linear layer's weights as Python hands them over, checked, and products with them on the pool's threads.
//
// Weights are held by their buffers, in the memory and the layout in which MLX has them; nothing is copied.
#pragma once
#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "blas.h"
#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace tq {

constexpr std::int64_t kMostWidth = std::int64_t(1) << 24;
constexpr int kTaskOutputs = 64;        // outputs of a task, at most
constexpr std::int64_t kTaskCost = 1 << 14; // multiplications of a task, at least: about a microsecond
constexpr int kTasksEach = 8;           // of a thread, about: the last ones of two threads end at nearly the same time
constexpr int kCachedBytes = 128 << 10, kLeastRows = 32; // rows that are multiplied by all outputs of a task before the next ones: they stay in the second-level cache
constexpr int kDenseTasksEach = 2;      // the same of products by the BLAS
constexpr int kStripOutputs = 256, kStripInputs = 1024; // of a matrix as floats: 1 MiB a thread, half a second-level cache or one

// Rows of a sequence that the BLAS multiplies in one call, from its first row on. In blocks of always the same size a row's result
// depends on its place in its sequence alone: in longer calls it depends on their length, and on where the row lies in them.
constexpr int kDenseRows = 64;

enum class Way { as_set, own, blas }; // how rows are multiplied: as LinearWeights::set_dense says, or in any case

// Rows that matrices are to multiply, in the forms that these take: as they are, or rounded in blocks. Memory is kept for
// the next rows.
class FedRows {
  public:
    // rows (num_rows, num_in), which stay where they are, of sequences of `len` rows each.
    void set(const float* rows, int num_rows, int num_in, int len, Way way = Way::as_set) {
        rows_ = rows, num_rows_ = num_rows, num_in_ = num_in, len_ = len, way_ = way, has_marks_ = false;
        for (Form& form : forms_) form.is_wanted = false;
    }

    // Before `round`.
    void expect(const Matrix& w) {
        if (w.bits == 0) return;
        Form& form = forms_[form_of(w)];
        if (form.is_wanted) return;
        form.is_wanted = true;
        form.inputs.num_rows = num_rows_, form.inputs.num_in = num_in_, form.inputs.padded_blocks = w.padded_blocks();
        form.inputs.nibbles = w.nibbles;
        const std::size_t codes = std::size_t(num_rows_) * form.inputs.row_codes(), blocks = std::size_t(num_rows_) * w.padded_blocks();
        if (form.codes.size() < codes) form.codes.resize(codes);
        if (form.floats.size() < 2 * blocks) form.floats.resize(2 * blocks);
        form.block = w.block();
        form.inputs.codes = form.codes.data(), form.inputs.scales = form.floats.data(), form.inputs.sums = form.floats.data() + blocks;
    }

    // Before `round`: marks are wanted.
    void expect_marks() {
        if (marks_.size() < std::size_t(num_rows_)) marks_.resize(num_rows_);
        has_marks_ = true;
    }

    void round(const LinearTable& kernels, int row) {
        if (has_marks_) marks_[row] = kernels.mark_of(rows_ + std::size_t(row) * num_in_, num_in_);
        for (const Form& form : forms_)
            if (form.is_wanted) kernels.round_row(rows_ + std::size_t(row) * num_in_, form.block, form.inputs, row);
    }

    // Rows that one task prepares.
    int rows_each() const { return int(kTaskCost / 8 / num_in_) + 1; } // a number is rounded in the time of eight multiplications
    int num_tasks() const { return (num_rows_ + rows_each() - 1) / rows_each(); }
    int num_rows() const { return num_rows_; }
    int num_in() const { return num_in_; }
    int len() const { return len_; }
    int whole_blocks() const { return len_ / kDenseRows * kDenseRows; } // rows of a sequence that the BLAS may multiply
    Way way() const { return way_; }
    const float* rows() const { return rows_; }
    const float* marks() const { return has_marks_ ? marks_.data() : nullptr; } // 0 a row, NaN if a value of it is none or infinite
    const Inputs& inputs(const Matrix& w) const { return forms_[form_of(w)].inputs; }

    // prepare(m), which may write the row, then its rounding, for each row m; on several threads if there are many.
    template <class Prepare> void each_row(const LinearTable& kernels, const Prepare& prepare) {
        run_tasks(num_tasks(), [&](int task, int) {
            for (int m = task * rows_each(); m < std::min(num_rows_, (task + 1) * rows_each()); m++) {
                prepare(m);
                round(kernels, m);
            }
        });
    }

  private:
    static int form_of(const Matrix& w) { return (w.block() == kUnit) + 2 * w.nibbles; }

    struct Form {
        bool is_wanted = false;
        int block = 0;
        std::vector<std::int16_t> codes;
        std::vector<float> floats;
        Inputs inputs;
    };
    const float* rows_ = nullptr;
    int num_rows_ = 0, num_in_ = 0, len_ = 1;
    Form forms_[4]; // blocks of 32 and of 64, inputs in order and as nibbles lie
    Way way_ = Way::as_set;
    bool has_marks_ = false;
    std::vector<float> marks_;
};

// At least so many floats of this thread's own, the same ones in each call with the same Place.
template <int Place> float* scratch_floats(std::size_t count) {
    thread_local std::vector<float> floats;
    if (floats.size() < count) floats.resize(count);
    return floats.data();
}

// Outputs [first, last) of rows by the BLAS, on this thread: a strip of the matrix at a time as floats, kStripOutputs by kStripInputs at
// most, however large the matrix. Of each sequence the whole blocks of rows, or, where `and_rest`, all rows.
inline void dense_product(const LinearTable& kernels, const Matrix& w, const FedRows& x, bool and_rest, int first, int last, Outputs to) {
    float* strip = scratch_floats<9>(std::size_t(std::min(last - first, kStripOutputs)) * std::min(w.num_in, kStripInputs));
    const auto each_block = [&](auto with) {
        for (int start = 0; start < x.num_rows(); start += x.len())
            for (int m = 0; m < (and_rest ? x.len() : x.whole_blocks()); m += kDenseRows) with(start + m, std::min(kDenseRows, x.len() - m));
    };
    for (int n = first; n < last; n += kStripOutputs) {
        const int outputs = std::min(kStripOutputs, last - n);
        for (int k = 0; k < w.num_in; k += kStripInputs) {
            const int inputs = std::min(kStripInputs, w.num_in - k);
            kernels.dense(w, n, n + outputs, k, k + inputs, strip);
            each_block([&](int m, int count) {
                multiply_rows(x.rows() + std::size_t(m) * w.num_in + k, w.num_in, count, strip, outputs, inputs, &to.at(m, n), to.stride, k > 0);
            });
        }
    }
    if (x.marks() == nullptr && w.offset == nullptr) return;
    each_block([&](int block, int count) {
        for (int m = block; m < block + count; m++) {
            const float mark = x.marks() == nullptr ? 0.0f : x.marks()[m];
            float* row = &to.at(m, first);
            for (int n = first; n < last; n++) row[n - first] += mark + (w.offset == nullptr ? 0.0f : w.offset[n]);
        }
    });
}

class LinearWeights {
  public:
    LinearWeights(const LinearWeights&) = delete;
    // codes (N, K * bits / 32) uint32, scales and biases (N, K / group) of one float type, or biases None and scales uint8, for
    // mxfp4; or codes None and floats (N, K).
    LinearWeights(nanobind::handle codes, nanobind::handle scales, nanobind::handle biases, nanobind::handle floats, nanobind::handle offset, int bits, int group, const std::string& isa)
        : level_(find_level(isa)) {
        if (floats.is_none()) {
            set_codes(codes, scales, biases, bits, group);
        } else {
            const View& view = hold(floats, "floats", 2);
            matrix_.dtype = view.dtype();
            if (matrix_.dtype == Dtype::f32) view.fail("are float32, which the BLAS multiplies");
            view.expect_dense();
            set_shape(view.shape(0), view.shape(1));
            matrix_.floats = view.data();
        }
        if (!offset.is_none()) {
            const View& view = hold(offset, "offset", 1);
            view.expect_type("f", 4);
            view.expect_shape({matrix_.num_out});
            view.expect_dense();
            matrix_.offset = static_cast<const float*>(view.data());
        }
    }

    // x (M, K) float32, rows of sequences of `len` each (0: of one), y (M, N) float32, both dense.
    void multiply(nanobind::handle x, nanobind::handle y, int len) const { multiply_part(x, y, len, Way::as_set, matrix_.num_out); }

    // The first n outputs, y (M, n), of one sequence by the BLAS or by the own kernel, whatever `set_dense` said, on this thread alone:
    // what is timed and compared. Raises for the BLAS where there is none.
    void trial(nanobind::handle x, nanobind::handle y, bool by_blas) const {
        if (by_blas && blas() == nullptr) throw std::invalid_argument("there is no BLAS to multiply by");
        const View out(y, "y", 2);
        if (out.shape(1) < 1 || out.shape(1) > matrix_.num_out) out.fail("has more outputs than there are");
        multiply_part(x, y, 0, by_blas ? Way::blas : Way::own, int(out.shape(1)));
    }

    // Whether a sequence's whole blocks of kDenseRows rows are multiplied as floats by the BLAS, if there is one.
    void set_dense(bool is_dense) { is_dense_ = is_dense; }
    bool has_dense(const FedRows& x) const {
        return x.way() == Way::blas || (x.way() == Way::as_set && x.whole_blocks() && is_dense_.load(std::memory_order_relaxed) && blas() != nullptr);
    }

    // Before the rows are rounded: what `product` will ask of them.
    void expect_of(FedRows& rows) const {
        if (!has_dense(rows) || rows.len() > rows.whole_blocks()) rows.expect(matrix_);
        if (has_dense(rows) && matrix_.bits) rows.expect_marks(); // products of floats follow IEEE's rules either way
    }

    // All outputs of all rows, to (M, N), on the pool's threads.
    void products(const FedRows& rows, float* to) const {
        const int each = outputs_each(rows);
        run_tasks((matrix_.num_out + each - 1) / each, [&](int task, int) {
            const int first = task * each, last = std::min(matrix_.num_out, first + each);
            product(rows, first, last, {to + first, std::size_t(matrix_.num_out), first});
        });
    }

    // Rows of the matrix, where it is a table: ids (M,) int64 to out (M, K) float32.
    void look_up(nanobind::handle ids, nanobind::handle out) const {
        const View wanted(ids, "ids", 1), to(out, "out", 2, true);
        const std::int64_t *id = expect_rows(wanted), count = wanted.shape(0);
        to.expect_type("f", 4);
        to.expect_shape({count, matrix_.num_in});
        to.expect_dense();
        auto* rows = static_cast<float*>(to.data());
        nanobind::gil_scoped_release release;
        const std::int64_t each = kTaskCost / matrix_.num_in + 1;
        run_tasks(int((count + each - 1) / each), [&](int task, int) {
            for (std::int64_t m = task * each; m < std::min(count, (task + 1) * each); m++) row(int(id[m]), rows + std::size_t(m) * matrix_.num_in);
        });
    }

    // Ids (M,) int64 that are all of rows of the matrix.
    const std::int64_t* expect_rows(const View& ids) const {
        ids.expect_type("lq", 8);
        ids.expect_dense();
        if (ids.shape(0) > kMostWidth) ids.fail("are too many");
        const auto* id = static_cast<const std::int64_t*>(ids.data());
        for (std::int64_t m = 0; m < ids.shape(0); m++)
            if (id[m] < 0 || id[m] >= matrix_.num_out) throw std::invalid_argument("row " + std::to_string(id[m]) + " is not among the table's " + std::to_string(matrix_.num_out));
        return id;
    }

    // One row of the matrix, (K,) float32.
    void row(int n, float* out) const { level_->linear.dense(matrix_, n, n + 1, 0, matrix_.num_in, out); }

    // Outputs [first, last) of all rows, on this thread.
    void product(const FedRows& x, int first, int last, Outputs to) const {
        if (!has_dense(x)) return own_product(x, 0, x.num_rows(), first, last, to);
        const bool and_rest = x.way() == Way::blas;
        dense_product(level_->linear, matrix_, x, and_rest, first, last, to);
        if (!and_rest)
            for (int start = 0; start < x.num_rows(); start += x.len()) own_product(x, start + x.whole_blocks(), start + x.len(), first, last, to);
    }

    // Outputs of a task that multiplies by so many matrices like this: each weight is read once, by one thread.
    int outputs_each(const FedRows& x, int matrices = 1) const {
        if (has_dense(x)) { // the BLAS rearranges all rows for every task
            const std::int64_t shared = (matrix_.num_out + kDenseTasksEach * num_threads() - 1) / (kDenseTasksEach * num_threads());
            return int(std::min<std::int64_t>(std::min<std::int64_t>((shared + 15) / 16 * 16, kStripOutputs), matrix_.num_out));
        }
        const std::int64_t row_cost = std::int64_t(x.num_rows()) * matrices * matrix_.num_in;
        const std::int64_t shared = (matrix_.num_out + kTasksEach * num_threads() - 1) / (kTasksEach * num_threads());
        const std::int64_t wanted = std::max(std::min<std::int64_t>(shared, kTaskOutputs), kTaskCost / row_cost + 1);
        return int(std::min<std::int64_t>((wanted + 3) / 4 * 4, matrix_.num_out));
    }

    const Matrix& matrix() const { return matrix_; }
    const KernelTable& level() const { return *level_; }
    int num_out() const { return matrix_.num_out; }
    int num_in() const { return matrix_.num_in; }

  private:
    // Outputs [first, last) of rows [from, end) by the own kernel.
    void own_product(const FedRows& x, int from, int end, int first, int last, Outputs to) const {
        const LinearTable& kernels = level_->linear;
        const int each = std::max(kCachedBytes / (matrix_.num_in * (matrix_.bits ? 2 : 4)) / 4 * 4, kLeastRows);
        float* scratch = scratch_floats<0>(kernels.product_scratch(matrix_));
        to.data += std::size_t(from) * to.stride;
        for (int m = from; m < end; m += each, to.data += std::size_t(each) * to.stride) {
            const int count = std::min(each, end - m);
            if (matrix_.bits == 0) kernels.float_product(matrix_, x.rows() + std::size_t(m) * matrix_.num_in, count, first, last, to, scratch);
            else kernels.product(matrix_, x.inputs(matrix_).part(m, count), first, last, to, scratch);
        }
    }

    void multiply_part(nanobind::handle x, nanobind::handle y, int len, Way way, int num_out) const {
        View in(x, "x", 2), out(y, "y", 2, true);
        in.expect_type("f", 4);
        in.expect_shape({-1, matrix_.num_in});
        in.expect_dense();
        out.expect_type("f", 4);
        out.expect_shape({in.shape(0), num_out});
        out.expect_dense();
        if (in.shape(0) > kMostWidth) in.fail("has too many rows");
        if (in.is_empty()) return;
        if (len < 0 || (len > 0 && in.shape(0) % len)) in.fail("holds no whole sequences");
        const auto* from = static_cast<const float*>(in.data());
        auto* to = static_cast<float*>(out.data());
        const int num_rows = int(in.shape(0));
        nanobind::gil_scoped_release release;
        thread_local FedRows fed;
        fed.set(from, num_rows, matrix_.num_in, len ? len : num_rows, way);
        expect_of(fed);
        if (way == Way::as_set) {
            if (matrix_.bits) fed.each_row(level_->linear, [](int) {});
            return products(fed, to);
        }
        for (int m = 0; m < num_rows; m++) fed.round(level_->linear, m);
        const int each = outputs_each(fed);
        for (int first = 0; first < num_out; first += each)
            product(fed, first, std::min(num_out, first + each), {to + first, std::size_t(num_out), first});
    }

    const View& hold(nanobind::handle object, const char* name, int ndim) {
        return held_.emplace_back(object, name, ndim);
    }

    void set_shape(std::int64_t num_out, std::int64_t num_in) {
        if (num_out < 1 || num_in < kUnit || num_in % kUnit || num_out > kMostWidth || num_in > kMostWidth)
            throw std::invalid_argument("inputs of a linear layer are a multiple of 64, outputs one at least");
        matrix_.num_out = int(num_out), matrix_.num_in = int(num_in);
    }

    void set_codes(nanobind::handle codes, nanobind::handle scales, nanobind::handle biases, int bits, int group) {
        if (bits < 2 || bits > 8 || bits == 7) throw std::invalid_argument("bits of weights are 2, 3, 4, 5, 6 or 8");
        if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("groups of weights are 32, 64 or 128 inputs");
        matrix_.is_mxfp4 = biases.is_none();
        if (matrix_.is_mxfp4 && (bits != 4 || group != 32)) throw std::invalid_argument("weights without biases have 4 bits and groups of 32");
        const View &c = hold(codes, "codes", 2), &s = hold(scales, "scales", 2);
        c.expect_type("IL", 4);
        c.expect_dense();
        if (c.shape(1) * 32 % bits) c.fail("hold no whole number of inputs");
        set_shape(c.shape(0), c.shape(1) * 32 / bits);
        if (matrix_.num_in % group) throw std::invalid_argument("inputs are no multiple of the group");
        matrix_.bits = bits, matrix_.group = group, matrix_.nibbles = bits == 4 && level_->linear.nibbles;
        s.expect_shape({matrix_.num_out, matrix_.num_groups()});
        s.expect_dense();
        matrix_.codes = static_cast<const std::uint8_t*>(c.data());
        matrix_.scales = s.data();
        if (matrix_.is_mxfp4) return s.expect_type("B", 1);
        const View& b = hold(biases, "biases", 2);
        b.expect_shape({matrix_.num_out, matrix_.num_groups()});
        b.expect_dense();
        matrix_.dtype = s.dtype(), matrix_.biases = b.data();
        if (b.dtype() != matrix_.dtype) b.fail("have another type than the scales");
    }

    const KernelTable* level_;
    Matrix matrix_;
    std::atomic<bool> is_dense_{false};
    std::deque<View> held_; // whose elements stay where they are
};

} // namespace tq
