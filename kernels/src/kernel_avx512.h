// What the AVX-512 and the AMX kernels share.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define MOLMO_AVX512 MOLMO_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")

namespace molmo::avx512 {

extern const Tiles kTiles, kTilesBf16;

void round_row_signed(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales);
void round_row_unsigned(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales);
void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts);
void dot_signed(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out);
void dot_unsigned(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out);
void swiglu(const float* in, int64_t count, float* out);

}  // namespace molmo::avx512
