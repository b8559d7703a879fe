// Attention of a decoder over its cache of keys and values.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace molmo {

// Rows of one sequence at the positions past .. past + rows - 1. Groups of heads / kv_heads heads share keys and values.
struct Cached {
    const float *q, *k, *v;  // [rows, heads * width], [rows, kv_heads * width], not rotated
    float *keys, *values;    // the cache [kv_heads, capacity, width], of which `past` positions are filled
    const float *cos, *sin;  // [positions, width / 2]
    const float* bias;       // [rows, past + rows], added to the scaled products; null: causal
    int64_t rows, past, capacity, heads, kv_heads, width;
    float scale;
};

// Writes the rotated keys and the values of the rows into the cache -> out [rows, heads * width]. Up to kSingleRows rows
// are computed one by one in float32, so that a token has the same result alone and beside drafted ones: 16 rows
// (molmo_edge.runtimes.protocol.DRAFT_ROWS) and the spare row of a decoder that verifies them. With more rows products are bfloat16
// with sums in float32, softmax is float32. Needs Tiles::bfloat16 and a width that is a multiple of 16.
constexpr int64_t kSingleRows = 17;
void cached_attention(const Kernel& kernel, const Parallel& parallel, const Cached& attention, float* out);

}  // namespace molmo
