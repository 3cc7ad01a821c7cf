// The work orders that native_store.h checks and the kernels trust: every pointer and index here is already proven.
#pragma once
#include <vector>

#include "draw_jobs.h"
#include "linear_jobs.h"
#include "store.h"

namespace tq {

enum class Dtype { f32, f16, bf16 };

// (heads, tokens, dim) of the model's dtype; strides in elements, the last axis is dense.
struct Rows {
    const void* data = nullptr;
    std::int64_t head_stride = 0, token_stride = 0;
    Dtype dtype = Dtype::f32;
    int num_tokens = 0;
};

// What is subtracted from the vectors of a page's group g before they are coded: data + g * stride; null: nothing.
struct Centre {
    const float* data = nullptr;
    std::int64_t stride = 0;
};

// Query rows of one sequence that see the same pages: T consecutive positions inside one page.
struct Item {
    int batch = 0, first_row = 0, num_rows = 0; // rows of q and out
    std::int64_t position = 0;                  // of the first row
    const std::int64_t* pages = nullptr;
    std::int64_t first_page = 0, num_pages = 0; // pages seen: [first_page, num_pages) of the table
    Rows sink_k, sink_v;
    Rows window_k, window_v;
    std::int64_t window_start = 0;
    int num_segments = 1;                       // tasks along the sequence
    int first_partial = 0;                      // index of segment 0, head 0 in the partials
};

struct Attention {
    const Store* store = nullptr;
    const void* q = nullptr;                    // (B, Hq, T, D), strides in elements
    Dtype q_dtype = Dtype::f32;
    std::int64_t q_strides[3] = {0, 0, 0};
    void* out = nullptr;                        // (B, Hq, T, Dv) dense
    Dtype out_dtype = Dtype::f32;
    int num_q_heads = 0, num_rows = 0, group = 1;
    float scale = 1.0f;
    float cap = 0.0f;                           // scores s become cap * tanh(s / cap); 0: as they are
    const float* sinks = nullptr;               // (Hq,) or null
    std::int64_t window = 0;                    // keys j with p - j < window are seen; 0: all
    std::vector<Item> items;
    int segment_pages = 1;

    // Position from which on a query at p sees keys.
    std::int64_t oldest(std::int64_t p) const { return window > 0 && p >= window ? p - window + 1 : 0; }
};

// One instruction-set level's kernels; `ranges` say which integers its dot products take.
struct KernelTable {
    const char* name;
    int k_low, k_high;                          // table entries for keys, and for values below:
    int v_low, v_high;                          // negative values are stored as two's complement
    int lanes;
    // Attention over segment `segment` of an item for one KV head; scratch of attend_scratch() floats.
    void (*decode_segment)(const Attention&, const Item&, int kv_head, int segment, float* partial, float* scratch);
    void (*merge_segments)(const Attention&, const Item&, int kv_head, float* partials, float* scratch);
    std::size_t (*decode_scratch)(const Attention&);
    std::size_t (*partial_floats)(const Attention&, const Item&);
    void (*prefill)(const Attention&, const Item&, int kv_head, float* scratch);
    std::size_t (*prefill_scratch)(const Attention&);
    // Encode one page of one head from exact rows beginning at token `first`.
    void (*encode_page)(const Store&, const Side&, const Rows&, int head, int first, Centre, std::uint8_t* codes, std::uint8_t* scales);
    // Centroids (tokens, dim) and scales (tokens) of one page of one head, rotated basis.
    void (*decode_page)(const Store&, const Side&, const std::uint8_t* codes, const std::uint8_t* scales, float* rows, float* row_scales);
    // One page between this layout and the canonical bitstream.
    void (*to_canonical)(const Store&, const Side&, const std::uint8_t* codes, std::uint8_t* packed);
    void (*from_canonical)(const Store&, const Side&, const std::uint8_t* packed, std::uint8_t* codes);
    void (*unrotate_rows)(const Side&, Centre, float* rows, int num_rows); // and add what was subtracted
    LinearTable linear;
    BlockTable blocks;
    DrawTable draw;
};

const KernelTable* avx512_kernels(); // null where the compiler or architecture has none, or the build left it out
const KernelTable* avx2_kernels();
const KernelTable* neon_kernels();
const KernelTable* portable_kernels();

} // namespace tq
