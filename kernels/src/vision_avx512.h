// What vision towers need beside products, with AVX-512.
#pragma once

#include "kernel_avx512.h"
#include "vision.h"

#define MOLMO_AVX512_BF16 MOLMO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c")

namespace molmo::avx512 {

// One tile of rows: x [count, inner] -> values [steps, 1024] and scales [count].
void round_tile(const float* x, int64_t count, int64_t inner, bool is_unsigned, int8_t* values, float* scales);

struct Finish {
    const float *column_scales, *bias, *row_scales, *residual;  // of the product's columns and rows; see EightBitLayer
    int64_t stride;                                             // of residual and out
};
void finish(const int32_t* sums, int64_t count, const Finish& how, Activation activation, float* out);

// Rows of one head in bfloat16, with zeros up to the padded sizes; `stride` is that of `rows`.
void round_to_tiles(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t padded, uint16_t* out);
// Panels of rows, for the product of queries and keys.
void pack_rows(const float* rows, int64_t stride, int64_t count, int64_t padded_count, int64_t width, int64_t padded,
               uint16_t* out);
// Panels of columns, for the product of weights and values.
void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t padded_count, int64_t width,
                  int64_t padded, uint16_t* out);
// scores [rows, stride] -> e^(scale * (score - the largest of the row)) of `keys` in tiles [2, stride / 32, 1024],
// and their sums [rows]
void softmax(const float* scores, int64_t stride, int64_t rows, int64_t keys, float scale, uint16_t* weights,
             float* sums);
// out[r] = in[r] / sums[r]
void divide(const float* in, int64_t in_stride, int64_t rows, int64_t width, const float* sums, float* out,
            int64_t stride);

}  // namespace molmo::avx512
