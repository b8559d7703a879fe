// The parts of a vision tower that take its time: attention without a mask, and layers with eight-bit weights.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace molmo {

// q [batch, queries, heads * width], k and v [batch, keys, heads * width] -> out as q. Products are bfloat16 with sums
// in float32, softmax is float32. Needs Tiles::bfloat16.
struct Heads {
    const float *q, *k, *v;
    int64_t batch, queries, keys, count, width;
};
void attention(const Kernel& kernel, const Parallel& parallel, const Heads& heads, float* out);

// Rows rounded to int8, one scale each, in tiles: see tiles.h. Values beyond `inner` are undefined.
struct RoundedRows {
    int8_t* values;  // [tiles of rows, steps, 1024]
    float* scales;   // [count]
    int64_t count, inner;

    static int64_t steps(int64_t inner) { return up(inner, kStepBytes) / kStepBytes; }
    static int64_t bytes(int64_t count, int64_t inner) { return up(count, kTile) * steps(inner) * kStepBytes; }
};
void round_rows(const Kernel& kernel, const Parallel& parallel, const float* x, const RoundedRows& rows);

enum class Activation : int64_t { kNone = 0, kQuickGelu = 1, kGeluTanh = 2 };

// The weights of a layer in panels. Zeros pad `inner` to whole steps.
class EightBitLayer {
public:
    // weights [inner, columns], columns a multiple of 32; scales [columns]; bias [columns] or null
    EightBitLayer(const int8_t* weights, const float* scales, const float* bias, int64_t inner, int64_t columns);

    // rows -> out [rows.count, columns]: activation(sum * scale of the column * scale of the row + bias) + residual;
    // residual as out, or null
    void multiply(const Kernel& kernel, const Parallel& parallel, const RoundedRows& rows, Activation activation,
                  const float* residual, float* out) const;

    int64_t inner() const { return inner_; }
    int64_t columns() const { return columns_; }

private:
    Buffer<int8_t> panels_;
    Buffer<int32_t> starts_;
    Buffer<float> scales_, bias_;
    int64_t inner_, columns_, steps_;
};

}  // namespace molmo
