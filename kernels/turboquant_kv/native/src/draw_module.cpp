// Drawing tokens for Python: see draw.h.
#include "draw_module.h"

#include <nanobind/stl/string.h>

#include <cmath>

#include "buffers.h"
#include "dispatch.h"
#include "linear_weights.h"

namespace nb = nanobind;

namespace tq {
namespace {

template <class T> const T* column(const View& view, const char* codes, std::int64_t count) {
    view.expect_type(codes, sizeof(T));
    view.expect_shape({count});
    view.expect_dense();
    return static_cast<const T*>(view.data());
}

// logits (B, V) float32; of each row numbers (B,) uint32, octaves, log2_min_p, top_p (B,) float32 and top_k (B,) int32 as DrawRow
// has them; steps (15,) float32: SearchFactors. tokens (B,) uint32 and is_broken (B,) bool are written.
void draw(nb::handle logits, nb::handle numbers, nb::handle octaves, nb::handle log2_min_p, nb::handle top_p, nb::handle top_k, nb::handle steps,
          nb::handle tokens, nb::handle is_broken, const std::string& isa) {
    const KernelTable* level = find_level(isa);
    const View in(logits, "logits", 2), n(numbers, "numbers", 1), o(octaves, "octaves", 1), m(log2_min_p, "log2_min_p", 1), p(top_p, "top_p", 1);
    const View k(top_k, "top_k", 1), s(steps, "steps", 1), out(tokens, "tokens", 1, true), broken(is_broken, "is_broken", 1, true);
    in.expect_type("f", 4);
    in.expect_dense();
    const std::int64_t rows = in.shape(0);
    if (in.shape(1) < 1 || in.shape(1) > kMostWidth || rows > kMostWidth) in.fail("are out of range");
    const auto* number = column<std::uint32_t>(n, "IL", rows);
    const auto *octave = column<float>(o, "f", rows), *least = column<float>(m, "f", rows), *mass = column<float>(p, "f", rows);
    const auto* most = column<std::int32_t>(k, "il", rows);
    const auto* factors = reinterpret_cast<const SearchFactors*>(column<float>(s, "f", 2 + kSearchSteps));
    auto* token = const_cast<std::uint32_t*>(column<std::uint32_t>(out, "IL", rows));
    auto* flag = const_cast<bool*>(column<bool>(broken, "?", rows));
    for (std::int64_t i = 0; i < rows; i++) {
        if (most[i] < 0 || most[i] > in.shape(1)) k.fail("is out of range");
        if (!(octave[i] >= 0) || std::isinf(octave[i])) o.fail("have a value that is no finite number from 0 on");
        if (!(least[i] <= 0)) m.fail("has a value above 0");
        if (!(mass[i] >= 0 && mass[i] <= 1)) p.fail("has a value that is not between 0 and 1");
    }
    const auto* data = static_cast<const float*>(in.data());
    const int vocab_len = int(in.shape(1));
    nb::gil_scoped_release release;
    run_tasks(int(rows), [&](int i, int) {
        const DrawRow row{vocab_len, number[i], octave[i], least[i], mass[i], most[i], factors};
        const DrawnRow drawn = level->draw.draw_row(data + std::size_t(i) * vocab_len, row, scratch_floats<8>(level->draw.scratch(vocab_len)));
        token[i] = drawn.token, flag[i] = drawn.is_broken;
    });
}

} // namespace

void bind_draw(nb::module_& m) {
    m.def("draw", &draw, nb::arg("logits"), nb::arg("numbers"), nb::arg("octaves"), nb::arg("log2_min_p"), nb::arg("top_p"), nb::arg("top_k"),
          nb::arg("steps"), nb::arg("tokens"), nb::arg("is_broken"), nb::arg("isa"));
}

} // namespace tq
