// Linear layers for Python: see linear_weights.h.
#include "linear_module.h"

#include <nanobind/stl/string.h>

#include "linear_weights.h"

namespace nb = nanobind;

namespace tq {

void bind_linear(nb::module_& m) {
    nb::class_<LinearWeights>(m, "LinearWeights")
        .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int, int, const std::string&>(), nb::arg("codes").none(),
             nb::arg("scales").none(), nb::arg("biases").none(), nb::arg("floats").none(), nb::arg("offset").none(), nb::arg("bits"),
             nb::arg("group"), nb::arg("isa"))
        .def_prop_ro("num_out", &LinearWeights::num_out)
        .def_prop_ro("num_in", &LinearWeights::num_in)
        .def("look_up", &LinearWeights::look_up, nb::arg("ids"), nb::arg("out"))
        .def("multiply", &LinearWeights::multiply, nb::arg("x"), nb::arg("y"));
}

} // namespace tq
