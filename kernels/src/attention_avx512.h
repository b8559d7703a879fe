// The steps of attention with AVX-512 and bfloat16.
#pragma once

#include "kernel_avx512.h"
#include "parallel.h"

#define MOLMO_AVX512_BF16 MOLMO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c")

namespace molmo::avx512 {

// Rows of one head in bfloat16, with zeros up to the padded sizes; `stride` is that of `rows`.
void round_to_tiles(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t padded, uint16_t* out);
// Panels of rows, for the product of queries and keys.
void pack_rows(const float* rows, int64_t stride, int64_t count, int64_t padded_count, int64_t width, int64_t padded,
               uint16_t* out);
// Panels of columns, for the product of weights and values.
void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t padded_count, int64_t width,
                  int64_t padded, uint16_t* out);

// Products of queries and keys, [rows, stride]. Row r attends to the first `keys` + r * `more` of them.
struct Scores {
    float* values;
    int64_t stride, rows, keys, more;
    float scale;
    const float* bias;  // added after the scale, [rows, bias_stride]; null: none
    int64_t bias_stride;

    int64_t last() const { return keys + (rows - 1) * more; }  // the keys that the last row attends to
};
// -> e^(score - the largest of the row) in tiles [2, stride / 32, 1024], 0 for keys up to the next multiple of 32 after
// `last()`, and their sums [rows]
void softmax(const Scores& scores, uint16_t* weights, float* sums);
// out[r] = in[r] / sums[r]
void divide(const float* in, int64_t in_stride, int64_t rows, int64_t width, const float* sums, float* out,
            int64_t stride);

// Attention of one query to `count` keys and values [count, width], in float32: query [width], a multiple of 16; bias
// [count] or null; weights: memory for `count` numbers.
void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t width, float scale,
            const float* bias, float* weights, float* out);
// x [2, half] -> [x0 * cos - x1 * sin, x1 * cos + x0 * sin], half a multiple of 8
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out);

}  // namespace molmo::avx512
