// Linear layers for Python: see linear_weights.h.
#include "linear_module.h"

#include <nanobind/stl/string.h>

#include "linear_weights.h"

namespace nb = nanobind;

namespace tq {

namespace {
std::atomic<BlasProduct> g_blas{nullptr};
} // namespace

void set_blas(std::uintptr_t address) { g_blas = reinterpret_cast<BlasProduct>(address); }
BlasProduct blas() { return g_blas.load(std::memory_order_relaxed); }

void multiply_rows(const float* x, int x_stride, int rows, const float* w, int outputs, int inputs, float* c, std::size_t c_stride, bool add) {
    constexpr int kRowMajor = 101, kAsIs = 111, kTransposed = 112;
    // One row or one output goes to a gemv in some versions, which multiplies c by zero: NaN stays NaN.
    if (!add && (rows == 1 || outputs == 1))
        for (int m = 0; m < rows; m++) std::fill_n(c + m * c_stride, outputs, 0.0f);
    blas()(kRowMajor, kAsIs, kTransposed, rows, outputs, inputs, 1.0f, x, x_stride, w, inputs, add ? 1.0f : 0.0f, c, int(c_stride));
}

void bind_linear(nb::module_& m) {
    m.def("set_blas", &set_blas, nb::arg("address"));
    nb::class_<LinearWeights>(m, "LinearWeights")
        .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int, int, const std::string&>(), nb::arg("codes").none(),
             nb::arg("scales").none(), nb::arg("biases").none(), nb::arg("floats").none(), nb::arg("offset").none(), nb::arg("bits"),
             nb::arg("group"), nb::arg("isa"))
        .def_prop_ro("num_out", &LinearWeights::num_out)
        .def_prop_ro("num_in", &LinearWeights::num_in)
        .def("look_up", &LinearWeights::look_up, nb::arg("ids"), nb::arg("out"))
        .def("multiply", &LinearWeights::multiply, nb::arg("x"), nb::arg("y"), nb::arg("len") = 1)
        .def("trial", &LinearWeights::trial, nb::arg("x"), nb::arg("y"), nb::arg("by_blas"))
        .def("set_dense", &LinearWeights::set_dense, nb::arg("is_dense"));
}

} // namespace tq
