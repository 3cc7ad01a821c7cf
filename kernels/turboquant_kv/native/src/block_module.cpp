// Decoder layers and whole decode steps for Python: see decoder_block.h and decoder_model.h.
#include "block_module.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "decoder_model.h"

namespace nb = nanobind;

namespace tq {

void bind_blocks(nb::module_& m) {
    nb::class_<DecoderBlock>(m, "DecoderBlock")
        .def(nb::init<std::vector<nb::object>, std::vector<nb::object>, std::vector<float>, int, int, int, bool>(), nb::arg("linears"), nb::arg("norms"),
             nb::arg("eps"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("num_pairs"), nb::arg("is_interleaved"))
        .def("attention_inputs", &DecoderBlock::attention_inputs, nb::arg("x"), nb::arg("turn"), nb::arg("queries"), nb::arg("keys"), nb::arg("values"))
        .def("outputs", &DecoderBlock::outputs, nb::arg("x"), nb::arg("attended"), nb::arg("y"));
    nb::class_<DecoderModel>(m, "DecoderModel")
        .def(nb::init<nb::object, std::vector<nb::object>, nb::handle, float, nb::object>(), nb::arg("embedding"), nb::arg("blocks"), nb::arg("norm"),
             nb::arg("eps"), nb::arg("head"))
        .def("logits", &DecoderModel::logits, nb::arg("x"), nb::arg("logits"))
        .def("step", &DecoderModel::step, nb::arg("tokens"), nb::arg("figures"), nb::arg("page_ids"), nb::arg("writes"), nb::arg("copies").none(),
             nb::arg("closed").none(), nb::arg("layers"), nb::arg("logits"));
}

} // namespace tq
