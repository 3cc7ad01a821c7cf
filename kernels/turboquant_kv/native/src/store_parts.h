// What native_store.h is made of: geometry as Python hands it over, workers' scratch, what pages are centred by.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace tq {

template <class T> std::vector<T> numbers(nanobind::handle object, const char* name, std::int64_t count) { // count -1: any
    View view(object, name, 1);
    view.expect_type(sizeof(T) == 4 ? "f" : "d", sizeof(T));
    view.expect_shape({count});
    view.expect_dense();
    const T* p = static_cast<const T*>(view.data());
    return std::vector<T>(p, p + view.shape(0));
}
inline std::vector<float> floats(nanobind::handle object, const char* name, std::int64_t count) { return numbers<float>(object, name, count); }

inline Side make_side(bool is_key, int heads, int dim, int bits, nanobind::handle signs, nanobind::handle base, nanobind::handle mean, nanobind::handle book, nanobind::handle thresholds) {
    if (dim < 16 || dim > kMaxDim || dim % 16) throw std::invalid_argument("head dimensions are multiples of 16 up to 512");
    const bool is_trellis = thresholds.is_none();
    if (is_trellis && (bits < 2 || bits > 4)) throw std::invalid_argument("bits of a trellis are 2, 3 or 4");
    if (is_trellis && dim < kMinTrellisDim) throw std::invalid_argument("head dimensions of a trellis are 64 at least");
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) throw std::invalid_argument("bits are 2, 3, 4 or 8");
    Side side;
    side.is_key = is_key;
    side.is_trellis = is_trellis;
    side.dim = dim;
    side.bits = bits;
    side.signs = floats(signs, "signs", dim);
    const std::int64_t base_floats = View(base, "base", 1).shape(0);
    while (std::int64_t(side.base_order) * side.base_order < base_floats) side.base_order++;
    const int power = dim / side.base_order;
    if (dim % side.base_order || power < 4 || (power & (power - 1))) throw std::invalid_argument("base does not divide the head dimension");
    side.base = floats(base, "base", std::int64_t(side.base_order) * side.base_order);
    if (!mean.is_none()) side.mean = floats(mean, "mean", std::int64_t(heads) * dim);
    side.book = floats(book, "book", 1 << side.index_bits());
    if (!is_trellis) side.thresholds = floats(thresholds, "thresholds", (1 << bits) - 1);
    return side;
}

inline ScaleKind scale_kind(const std::string& name) {
    if (name == "unbiased") return ScaleKind::unbiased;
    if (name == "norm") return ScaleKind::norm;
    if (name == "least_squares") return ScaleKind::least_squares;
    if (name == "plain") return ScaleKind::plain;
    throw std::invalid_argument("scale '" + name + "' is unknown");
}

// Scratch of each worker that turns up, made at its first task.
class Scratch {
  public:
    explicit Scratch(std::size_t floats_each) : floats_each_(floats_each) {}
    float* of(int worker) {
        if (!data_[worker]) data_[worker].reset(new float[floats_each_]);
        return data_[worker].get();
    }

  private:
    std::size_t floats_each_;
    std::array<std::unique_ptr<float[]>, kMaxThreads> data_;
};

// What keys and values of a conversation's pages are centred by.
class Centres {
  public:
    // numbers (num_pages,): which page of its conversation each is.
    Centres(const Store& store, const std::int64_t* numbers, int num_pages)
        : store_(store), num_blocks_(std::int64_t(num_pages) * store.groups_per_page()) {
        const Side& side = store.k;
        if (side.turning.num_pairs == 0) return;
        turned_.resize(std::size_t(store.heads) * num_blocks_ * side.dim);
        run_tasks(num_pages, [&](int page, int) {
            for (int g = 0; g < store.groups_per_page(); g++) {
                const std::int64_t block = std::int64_t(page) * store.groups_per_page() + g;
                const double start = double(store.sink_tokens) + double(numbers[page]) * store.page_tokens + double(g) * kGroupTokens;
                block_means(side.turning, store.heads, side.dim, start + (kGroupTokens - 1) / 2.0, &turned_[block * side.dim], num_blocks_ * side.dim);
            }
        });
    }
    Centre of(const Side& side, int page, int head) const {
        if (side.turning.num_pairs) return {&turned_[(head * num_blocks_ + std::int64_t(page) * store_.groups_per_page()) * side.dim], side.dim};
        return {side.mean.empty() ? nullptr : &side.mean[std::size_t(head) * side.dim], 0};
    }

  private:
    const Store& store_;
    std::int64_t num_blocks_;
    std::vector<float> turned_; // keys': (heads, blocks, dim)
};

} // namespace tq
