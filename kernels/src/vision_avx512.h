// What eight-bit layers need beside products, with AVX-512.
#pragma once

#include "kernel_avx512.h"
#include "vision.h"

namespace molmo::avx512 {

// One tile of rows: x [count, inner] -> values [steps, 1024] and scales [count].
void round_tile(const float* x, int64_t count, int64_t inner, bool is_unsigned, int8_t* values, float* scales);

struct Finish {
    const float *column_scales, *bias, *row_scales, *residual;  // of the product's columns and rows; see EightBitLayer
    int64_t stride;                                             // of residual and out
};
void finish(const int32_t* sums, int64_t count, const Finish& how, Activation activation, float* out);

}  // namespace molmo::avx512
