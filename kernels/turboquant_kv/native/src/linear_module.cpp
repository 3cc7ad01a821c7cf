// Linear layers for Python: checks what it hands over, then multiplies without the GIL.
//
// Weights are held by their buffers, in the memory and the layout in which MLX has them; nothing is copied.
#include "linear_module.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>

#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

namespace tq {
namespace {

constexpr std::int64_t kMostWidth = std::int64_t(1) << 24;
constexpr int kTaskOutputs = 64;        // outputs of a task, at most
constexpr std::int64_t kTaskCost = 1 << 16; // multiplications below which a second thread does not pay

class LinearWeights {
  public:
    LinearWeights(const LinearWeights&) = delete;
    // codes (N, K * bits / 32) uint32, scales and biases (N, K / group) of one float type; or codes None and floats (N, K).
    LinearWeights(nb::handle codes, nb::handle scales, nb::handle biases, nb::handle floats, nb::handle offset, int bits, int group, const std::string& isa)
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

    // x (M, K) float32, y (M, N) float32, both dense.
    void multiply(nb::handle x, nb::handle y) const {
        View in(x, "x", 2), out(y, "y", 2, true);
        in.expect_type("f", 4);
        in.expect_shape({-1, matrix_.num_in});
        in.expect_dense();
        out.expect_type("f", 4);
        out.expect_shape({in.shape(0), matrix_.num_out});
        out.expect_dense();
        if (in.shape(0) > kMostWidth) in.fail("has too many rows");
        if (in.is_empty()) return;
        const auto* from = static_cast<const float*>(in.data());
        auto* to = static_cast<float*>(out.data());
        nb::gil_scoped_release release;
        run(from, int(in.shape(0)), to);
    }

    int num_out() const { return matrix_.num_out; }
    int num_in() const { return matrix_.num_in; }

  private:
    const View& hold(nb::handle object, const char* name, int ndim) {
        return held_.emplace_back(object, name, ndim);
    }

    void set_shape(std::int64_t num_out, std::int64_t num_in) {
        if (num_out < 1 || num_in < kUnit || num_in % kUnit || num_out > kMostWidth || num_in > kMostWidth)
            throw std::invalid_argument("inputs of a linear layer are a multiple of 64, outputs one at least");
        matrix_.num_out = int(num_out), matrix_.num_in = int(num_in);
    }

    void set_codes(nb::handle codes, nb::handle scales, nb::handle biases, int bits, int group) {
        if (bits < 2 || bits > 8 || bits == 7) throw std::invalid_argument("bits of weights are 2, 3, 4, 5, 6 or 8");
        if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("groups of weights are 32, 64 or 128 inputs");
        const View &c = hold(codes, "codes", 2), &s = hold(scales, "scales", 2), &b = hold(biases, "biases", 2);
        c.expect_type("IL", 4);
        c.expect_dense();
        if (c.shape(1) * 32 % bits) c.fail("hold no whole number of inputs");
        set_shape(c.shape(0), c.shape(1) * 32 / bits);
        if (matrix_.num_in % group) throw std::invalid_argument("inputs are no multiple of the group");
        matrix_.bits = bits, matrix_.group = group, matrix_.dtype = s.dtype();
        for (const View* view : {&s, &b}) {
            view->expect_shape({matrix_.num_out, matrix_.num_groups()});
            view->expect_dense();
            if (view->dtype() != matrix_.dtype) view->fail("have another type than the scales");
        }
        matrix_.codes = static_cast<const std::uint8_t*>(c.data());
        matrix_.scales = s.data(), matrix_.biases = b.data();
    }

    // A task is a range of outputs for all rows: each weight is read once, by one thread.
    void run(const float* x, int num_rows, float* y) const {
        const std::int64_t row_cost = std::int64_t(num_rows) * matrix_.num_in;
        const std::int64_t shared = (matrix_.num_out + 4 * num_threads() - 1) / (4 * num_threads()); // a few tasks for each thread
        const std::int64_t wanted = std::max(std::min<std::int64_t>(shared, kTaskOutputs), kTaskCost / row_cost + 1);
        const std::int64_t each = std::min<std::int64_t>((wanted + 3) / 4 * 4, matrix_.num_out);
        const int num_tasks = int((matrix_.num_out + each - 1) / each);
        const LinearTable& kernels = level_->linear;
        if (matrix_.bits == 0) {
            run_tasks(num_tasks, [&](int task, int) {
                kernels.float_product(matrix_, x, num_rows, int(task * each), int(std::min<std::int64_t>(matrix_.num_out, (task + 1) * each)), y);
            });
            return;
        }
        Inputs inputs;
        inputs.num_rows = num_rows, inputs.num_in = matrix_.num_in, inputs.padded_blocks = matrix_.padded_blocks();
        std::unique_ptr<std::int16_t[]> codes(new std::int16_t[std::size_t(num_rows) * matrix_.num_in]);
        std::unique_ptr<float[]> floats(new float[std::size_t(2) * num_rows * inputs.padded_blocks]);
        inputs.codes = codes.get(), inputs.scales = floats.get(), inputs.sums = floats.get() + std::size_t(num_rows) * inputs.padded_blocks;
        const int rows_each = int(kTaskCost / matrix_.num_in) + 1;
        run_tasks((num_rows + rows_each - 1) / rows_each, [&](int task, int) {
            for (int m = task * rows_each; m < std::min(num_rows, (task + 1) * rows_each); m++)
                kernels.round_row(x + std::size_t(m) * matrix_.num_in, matrix_.block(), inputs, m);
        });
        run_tasks(num_tasks, [&](int task, int) {
            const int first = int(task * each), last = int(std::min<std::int64_t>(matrix_.num_out, first + each));
            std::unique_ptr<float[]> scratch(new float[kernels.product_scratch(matrix_)]);
            kernels.product(matrix_, inputs, first, last, y, scratch.get());
        });
    }

    const KernelTable* level_;
    Matrix matrix_;
    std::deque<View> held_; // whose elements stay where they are
};

} // namespace

void bind_linear(nb::module_& m) {
    nb::class_<LinearWeights>(m, "LinearWeights")
        .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int, int, const std::string&>(), nb::arg("codes").none(),
             nb::arg("scales").none(), nb::arg("biases").none(), nb::arg("floats").none(), nb::arg("offset").none(), nb::arg("bits"),
             nb::arg("group"), nb::arg("isa"))
        .def_prop_ro("num_out", &LinearWeights::num_out)
        .def_prop_ro("num_in", &LinearWeights::num_in)
        .def("multiply", &LinearWeights::multiply, nb::arg("x"), nb::arg("y"));
}

} // namespace tq
