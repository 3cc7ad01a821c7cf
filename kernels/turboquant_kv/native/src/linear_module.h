// The part of the Python module that multiplies by a linear layer's weights.
#pragma once
#include <nanobind/nanobind.h>

namespace tq {
void bind_linear(nanobind::module_& m);
}
