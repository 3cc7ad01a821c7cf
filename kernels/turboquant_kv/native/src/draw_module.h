// The part of the Python module that draws tokens.
#pragma once
#include <nanobind/nanobind.h>

namespace tq {
void bind_draw(nanobind::module_& m);
}
