// What every kernel needs to know about one layer's compressed pages: geometry, tables, memory.
//
// Owns the slabs and the page layout's offsets. Leaves out how codes lie inside a group (codes.h) and all
// arithmetic. Plain data, compiled without instruction-set flags.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tq {

constexpr int kGroupTokens = 16;   // tokens that share a register in the widest instruction set
constexpr int kSlabPages = 1024;   // untouched pages of a slab cost address space only
constexpr int kRunPages = 16;      // neighbouring ids: a conversation prefilled in one go has them in order
constexpr int kMaxDim = 512;
constexpr int kMaxGroup = 8;       // query heads that share one unpack; larger groups are cut
constexpr int kDecodeRows = 8;     // query rows that integer arithmetic serves; more are worth float tiles
constexpr std::size_t kHugePage = std::size_t(2) << 20;

// Centroids as small integers: value = (entry - offset) * step. Fewer than 256 entries
// repeat to the end, so that any stretch of the table is a register-sized look-up table. `low` is used at 8 bits only, where
// value = (256 * entry + low - offset) * step.
struct IntTable {
    alignas(64) std::uint8_t entry[256] = {};
    alignas(64) std::uint8_t low[256] = {};
    alignas(64) std::uint8_t window[4][64] = {}; // a trellis's entries by the bits that isa_avx512.h puts together
    float step = 1.0f;
    float offset = 0.0f;
};

constexpr int kSpanBlocks = 16; // groups of 16 tokens whose share of a turning mean is computed together
constexpr int kMaxPairs = kMaxDim / 2;

// How the mean of keys turns with their position (codec/rotary.py), as tables; dispatch.cpp makes them, in double. Rows of
// pairs are padded with zeros. A span is 16 blocks of 16 tokens, and angles are those of blocks' and spans' middles.
struct Turning {
    int num_pairs = 0, padded = 0; // no pairs: the mean is constant
    int stride = 1, gap = 0;       // pair j is dims stride * j and stride * j + gap
    std::vector<double> frequencies;  // (pairs,) radians per position
    std::vector<double> mean;         // (heads, dim) before the turn, averaged over a block
    std::vector<float> first, second; // (heads, padded) each, that mean by pairs
    std::vector<float> spans;         // (n, 2, padded) cos and sin at position sink + 256 n; grown with the conversations
    std::vector<float> starts;        // (16, 2, padded) from there to the middle of the span that begins b blocks later
    std::vector<float> blocks;        // (padded, 16) cos and sin in turn from a span's middle to its blocks 8 to 15
};

enum class ScaleKind { unbiased, norm, least_squares, plain };

// What kernels are made for: the bits of a scalar code, or kTrellis more for a trellis code of that many.
constexpr int kTrellis = 16;
constexpr int kMinTrellisDim = 64; // three coordinates back is another quartet (codes.h)
constexpr int bits_of(int kind) { return kind % kTrellis; }
constexpr bool is_trellis(int kind) { return kind >= kTrellis; }

// Keys or values of one layer.
struct Side {
    int dim = 0, bits = 0;
    bool is_key = false, is_trellis = false;
    std::vector<float> signs;      // (dim,) of +-1, before the Hadamard matrix
    std::vector<float> base;       // (base_order, base_order), the odd factor of the Hadamard matrix
    int base_order = 1;
    std::vector<float> mean;       // (heads, dim), or empty when not centred; where it turns, with 0 in dims that do
    Turning turning;
    std::vector<float> book;       // 2^bits centroids, or a trellis's 2^(bits + 1) levels
    std::vector<float> thresholds; // 2^bits - 1; none of a trellis
    IntTable table;

    int kind() const { return is_trellis ? bits + kTrellis : bits; }
    int index_bits() const { return is_trellis ? bits + 1 : bits; } // of an index into the book
    std::size_t group_bytes() const { return std::size_t(2) * dim * bits; } // codes of 16 tokens
};

struct AlignedFree {
    void operator()(std::uint8_t* p) const { std::free(p); }
};

struct Store {
    int heads = 0, page_tokens = 0, sink_tokens = 0;
    Side k, v;
    ScaleKind scale_kind = ScaleKind::unbiased;
    std::vector<std::unique_ptr<std::uint8_t, AlignedFree>> slabs;
    std::size_t num_pages = 0;
    mutable std::mutex mutex; // one call at a time per layer: pages may not move or grow under a reader

    int groups_per_page() const { return page_tokens / kGroupTokens; }
    std::size_t code_bytes(const Side& side) const { return groups_per_page() * side.group_bytes(); } // one head, one page
    std::size_t scale_bytes() const { return std::size_t(2) * page_tokens; }
    std::size_t head_bytes() const { return code_bytes(k) + code_bytes(v) + 2 * scale_bytes(); }
    std::size_t page_bytes() const { return heads * head_bytes(); }

    // A run of pages lies as [head][k codes][k scales][v codes][v scales], each part of all the run's pages side by side:
    // pages in order are then one stream per head, which hardware prefetches at twice the rate of scattered pages.
    std::uint8_t* part(std::int64_t page, int head, std::size_t before, std::size_t bytes) const {
        const std::int64_t in_slab = page % kSlabPages;
        std::uint8_t* run = slabs[page / kSlabPages].get() + in_slab / kRunPages * kRunPages * page_bytes();
        return run + kRunPages * (head * head_bytes() + before) + in_slab % kRunPages * bytes;
    }
    std::uint8_t* codes(const Side& side, std::int64_t page, int head) const {
        return part(page, head, side.is_key ? 0 : code_bytes(k) + scale_bytes(), code_bytes(side));
    }
    std::uint8_t* scales(const Side& side, std::int64_t page, int head) const {
        return part(page, head, code_bytes(k) + (side.is_key ? 0 : scale_bytes() + code_bytes(v)), scale_bytes());
    }

    void grow(std::size_t pages) {
        const std::size_t slab_bytes = (kSlabPages * page_bytes() + kHugePage - 1) / kHugePage * kHugePage;
        while (slabs.size() * kSlabPages < pages) {
            auto* p = static_cast<std::uint8_t*>(std::aligned_alloc(kHugePage, slab_bytes));
            if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
            madvise(p, slab_bytes, MADV_HUGEPAGE); // scattered pages otherwise miss the TLB; as NumPy does for its arrays
#endif
            slabs.emplace_back(p);
        }
        if (pages > num_pages) num_pages = pages;
    }
};

} // namespace tq
