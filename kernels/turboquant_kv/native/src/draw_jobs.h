// Drawing tokens from logits: what draw_module.cpp checks and the kernels trust.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tq {

constexpr int kSearchSteps = 13; // of top-p: SEARCH_STEPS of weighted_draw.py

// Factors of top-p's search: one step of weights up, the search's steps down, and one step down.
struct SearchFactors {
    float up, one, down[kSearchSteps];
};

// How a row is drawn.
struct DrawRow {
    int vocab_len = 0;
    std::uint32_t number = 0;  // random
    float octaves = 0.0f;      // log2(e) / temperature; 0: the likeliest
    float log2_min_p = 0.0f;   // minus infinity: none
    float top_p = 1.0f;        // 1: none
    int top_k = 0;             // at most vocab_len; 0: none
    const SearchFactors* steps = nullptr;
};

struct DrawnRow {
    std::uint32_t token;
    bool is_broken;            // NaN or infinity among the logits, or nothing that is possible
};

// One instruction-set level's kernels.
struct DrawTable {
    DrawnRow (*draw_row)(const float* logits, const DrawRow&, float* scratch);
    std::size_t (*scratch)(int vocab_len); // in floats
};

} // namespace tq
