// turboquant_kv.native._kernels: stores of pages (native_store.h), linear layers, decoder layers, and what Python asks of the build.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "block_module.h"
#include "draw_module.h"
#include "linear_module.h"
#include "native_store.h"

namespace nb = nanobind;

namespace tq {
namespace {

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const auto* level : available_levels()) names.push_back(level->name);
    return names;
}

// The bits of an MLX array of bfloat16, which NumPy lacks, as a read-only NumPy array; shares and holds its memory.
nb::ndarray<nb::numpy, const std::uint16_t> bfloat16_bits(nb::handle array) {
    auto view = std::make_unique<View>(View::of_any_rank(array, "array"));
    if (view->dtype() != Dtype::bf16) view->fail("is not bfloat16");
    std::vector<std::size_t> shape;
    std::vector<std::int64_t> strides;
    for (int i = 0; i < view->ndim(); i++) {
        shape.push_back(std::size_t(view->shape(i)));
        strides.push_back(view->stride(i));
    }
    const void* data = view->data();
    nb::capsule owner(view.release(), [](void* p) noexcept { delete static_cast<View*>(p); });
    return {static_cast<const std::uint16_t*>(data), shape.size(), shape.data(), owner, strides.data()};
}

// The way back: a dense array of such bits as bfloat16, which mx.array copies as it is.
nb::ndarray<> as_bfloat16(nb::ndarray<std::uint16_t, nb::c_contig, nb::device::cpu> bits) {
    std::vector<std::size_t> shape;
    for (std::size_t i = 0; i < bits.ndim(); i++) shape.push_back(bits.shape(i));
    return {bits.data(), shape.size(), shape.data(), nb::cast(bits), nullptr, nb::dlpack::dtype{std::uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1}};
}

} // namespace
} // namespace tq

NB_MODULE(_kernels, m) {
    using tq::NativeStore;
    m.def("isa_levels", &tq::level_names, "Instruction-set levels of this build and CPU, fastest first.");
    m.def("bfloat16_bits", &tq::bfloat16_bits, nb::arg("array"));
    m.def("as_bfloat16", &tq::as_bfloat16, nb::arg("bits"));
    m.def("set_num_threads", &tq::set_num_threads, nb::arg("num_threads"));
    m.def("num_threads", &tq::num_threads);
    tq::bind_linear(m);
    tq::bind_blocks(m);
    tq::bind_draw(m);
    nb::class_<NativeStore>(m, "Store")
        .def(nb::init<int, int, int, const std::string&, const std::string&>(), nb::arg("heads"), nb::arg("page_tokens"), nb::arg("sink_tokens"),
             nb::arg("scale"), nb::arg("isa"))
        .def("set_side", &NativeStore::set_side, nb::arg("is_key"), nb::arg("dim"), nb::arg("bits"), nb::arg("signs"), nb::arg("base"),
             nb::arg("mean").none(), nb::arg("book"), nb::arg("thresholds").none())
        .def("set_rotary", &NativeStore::set_rotary, nb::arg("mean"), nb::arg("frequencies"), nb::arg("stride"), nb::arg("gap"))
        .def_prop_ro("isa", &NativeStore::isa)
        .def_prop_ro("num_pages", &NativeStore::num_pages)
        .def_prop_ro("page_bytes", &NativeStore::page_bytes)
        .def("grow", &NativeStore::grow, nb::arg("num_pages"))
        .def("encode", &NativeStore::encode, nb::arg("page_ids"), nb::arg("numbers"), nb::arg("starts"), nb::arg("k"), nb::arg("v"))
        .def("transfer", &NativeStore::transfer, nb::arg("is_key"), nb::arg("write"), nb::arg("page_ids"), nb::arg("codes"), nb::arg("scales"))
        .def("decode", &NativeStore::decode, nb::arg("is_key"), nb::arg("restore"), nb::arg("page_ids"), nb::arg("first_page"), nb::arg("rows"),
             nb::arg("scales"))
        .def("attend", &NativeStore::attend, nb::arg("queries"), nb::arg("out"), nb::arg("figures"), nb::arg("page_ids"), nb::arg("exact"),
             nb::arg("scale"), nb::arg("sinks").none(), nb::arg("window"), nb::arg("cap") = 0.0f);
}
