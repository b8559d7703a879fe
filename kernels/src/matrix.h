// Products of float rows with four-bit weights, through int8.
//
// A weight is (code - zero point) * scale, with one scale for `block` weights along the inner dimension, as
// onnxruntime's MatMulNBits and QMoE store it. Rows are rounded to int8 with one scale per row and block, so that the
// product of a block is an exact sum of integers. A kernel computes 16 columns at a time: it unpacks the codes of these
// columns to int8 in the layout of AMX tiles and of dot-product instructions, then multiplies all rows with them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace molmo {

constexpr int kColumns = 16;  // of a panel
constexpr int kTile = 16;     // rows that AMX multiplies at a time; buffers of rows are padded to a multiple

// A matrix [columns, inner]: its product with a row of `inner` floats has `columns` floats.
struct Matrix {
    const uint8_t* codes;        // [columns, inner / 2], the first of a pair in the low half
    const void* scales;          // [columns, inner / block], float32 or float16
    const uint8_t* zero_points;  // [columns, ceil(inner / block / 2)], packed as codes; null: 8 everywhere
    int64_t columns, inner, block;
    bool half_scales;

    int64_t blocks() const { return inner / block; }
};

// Weights of 16 columns, unpacked. Eight consecutive weights lie in the order 0, 2, 4, 6, 1, 3, 5, 7; rows, too.
struct Panel {
    const int8_t* weights;  // [inner / 4, 16, 4], code - zero point
    const float* scales;    // [blocks, 16]
    const int32_t* starts;  // [blocks, 16], -128 * the sum of a block's weights; for kernels with unsigned rows
};

// Rounded rows: signed bytes, or with `Kernel::unsigned_rows` 128 more.
struct Rows {
    const int8_t* values;  // [count, inner]
    const float* scales;   // [count, blocks]
    int64_t count;
};

// One set of instructions. Sizes: `inner` is a multiple of `block`, `block` a multiple of 32, columns one of 16.
struct Kernel {
    const char* name;
    bool unsigned_rows;
    void (*round_row)(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales);
    void (*unpack)(const Matrix& matrix, int64_t column, int8_t* weights, float* scales, int32_t* starts);
    // out[r, 0..15] = the product of row r; AMX reads rows up to the next multiple of kTile.
    void (*multiply)(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out, int64_t stride);
    // A single row, straight from the codes: out[i] of `count` columns.
    void (*dot)(const Matrix& matrix, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out);
    // gate and up alternate: out[i] = in[2i] * sigmoid(in[2i]) * in[2i + 1]
    void (*swiglu)(const float* in, int64_t count, float* out);
    const Tiles* tiles = nullptr;  // for attention and eight-bit layers; null: ONNX Runtime computes them
};

// The fastest kernel of this processor, or the one that MOLMO_EDGE_KERNEL names if the processor has it.
const Kernel& kernel();
const Kernel* kernel_named(const char* name);  // null if unknown or not supported here

}  // namespace molmo
