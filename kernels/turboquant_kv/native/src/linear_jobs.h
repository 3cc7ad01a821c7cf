// Products of a linear layer on the CPU, y = x W^T: what linear_module.cpp checks and the kernels trust.
//
// Weights stay as MLX stores them: rows of `bits`-bit codes, one little-endian bit stream a row, and an affine scale and
// bias for every `group` inputs, w = scale * code + bias. Codes of mxfp4 name one of 16 numbers instead, doubled and moved
// they are whole ones from 0 to 24 (kFp4), and a scale is a byte, the exponent of a power of two. Inputs are rounded to 16 bits, with a scale for every block of
// them, so that a block's product is an integer dot product: y = sum over blocks of s_w s_x (c_w . c_x) + b_w s_x sum(c_x).
// Eight bits would be a third faster for long prompts and no faster for a token, but cost 1% of perplexity.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tq {

enum class Dtype;

constexpr int kUnit = 64;  // inputs that are unpacked together; the number of inputs is a multiple of it
constexpr int kInputLimit = 32512; // of a rounded input: both of its bytes are signed then
constexpr std::uint8_t kFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; // w = scale * (kFp4[code] - 12) / 2
constexpr float kFp4Zero = 12.0f;
constexpr int kMostBlocks = 16; // padding of a row's blocks, in floats: the widest register

// W (num_out, num_in).
struct Matrix {
    int num_out = 0, num_in = 0;
    int bits = 0;                          // 2, 3, 4, 5, 6 or 8; 0: floats
    int group = 0;                         // 32, 64 or 128
    const std::uint8_t* codes = nullptr;   // (num_out, num_in * bits / 8)
    const void *scales = nullptr, *biases = nullptr; // (num_out, num_in / group) of `dtype`
    const void* floats = nullptr;          // (num_out, num_in) of `dtype`, where bits is 0
    Dtype dtype{};
    const float* offset = nullptr;         // (num_out,) added to every product, or null
    bool is_mxfp4 = false;                 // scales are exponents, and there are no biases
    bool nibbles = false;                  // 4-bit codes of a level that has an order of its own for their inputs

    int block() const { return group < kUnit ? group : kUnit; }
    int num_groups() const { return num_in / group; }
    int num_blocks() const { return num_in / block(); }
    int padded_blocks() const { return (num_blocks() + kMostBlocks - 1) / kMostBlocks * kMostBlocks; }
};

// Rows of x, rounded: x[m][i] is about scales[m][i / block] * codes[m][i]. A row with a NaN or an infinity has NaN scales.
struct Inputs {
    int num_rows = 0, num_in = 0, padded_blocks = 0;
    bool nibbles = false;                  // rows lie as 4-bit codes are unpacked; there may be a unit more
    std::int16_t* codes = nullptr;         // (num_rows, row_codes()), a unit's in the order of its level
    float *scales = nullptr, *sums = nullptr; // (num_rows, padded_blocks), zeros behind the blocks; sums: scale * sum of codes

    // Rows [first, first + count).
    Inputs part(int first, int count) const {
        Inputs x = *this;
        x.num_rows = count, x.codes += first * row_codes(), x.scales += std::size_t(first) * padded_blocks, x.sums += std::size_t(first) * padded_blocks;
        return x;
    }

    std::size_t row_codes() const { return nibbles ? std::size_t(num_in + kUnit) / (2 * kUnit) * (2 * kUnit) : num_in; }
};

// Where products go: of row m and output n to data[m * stride + n - first].
struct Outputs {
    float* data = nullptr;
    std::size_t stride = 0;
    int first = 0;

    float& at(int row, int output) const { return data[std::size_t(row) * stride + std::size_t(output - first)]; }
};

// One instruction-set level's kernels.
struct LinearTable {
    bool nibbles; // see Matrix

    void (*round_row)(const float* x, int block, const Inputs& to, int row);
    // Outputs [first, last) of all rows; scratch of product_scratch() floats.
    void (*product)(const Matrix&, const Inputs&, int first, int last, Outputs, float* scratch);
    void (*float_product)(const Matrix&, const float* x, int num_rows, int first, int last, Outputs, float* scratch);
    std::size_t (*product_scratch)(const Matrix&);
    // W as it stands, outputs [first, last) and inputs [from, to), which are multiples of kUnit, to out (last - first, to - from).
    void (*dense)(const Matrix&, int first, int last, int from, int to, float* out);
    float (*mark_of)(const float* x, int n); // 0, but NaN where one of n values, a multiple of kUnit, is none or infinite
};

// The rest of a decoder layer (blocks.h), row by row.
struct BlockTable {
    void (*norm_row)(const float* x, const float* weight, int n, float eps, float* out);
    void (*gate_row)(float* gate, const float* up, int n);
    // num_pairs pairs at dims stride * j and stride * j + gap, which are the first 2 * num_pairs dims.
    void (*turn_row)(const float* x, const float* turn, int dim, int num_pairs, int stride, int gap, float* out);
    void (*add_row)(const float* x, const float* more, int n, float* out);
};

} // namespace tq
