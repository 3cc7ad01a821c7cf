// The part of the Python module that computes decoder layers around their attention.
#pragma once
#include <nanobind/nanobind.h>

namespace tq {
void bind_blocks(nanobind::module_& m);
}
