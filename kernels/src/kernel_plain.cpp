// Standard C++, for processors without one of the other kernels' instructions.
#include "kernels.h"

namespace molmo {
namespace {

void round_row(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row_loop<false>(row, inner, block, values, scales);
}
void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    unpack_loop(m, column, weights, scales, starts);
}
void multiply(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out, int64_t stride) {
    multiply_loop<false>(rows, panel, inner, block, out, stride);
}
void dot(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out) {
    dot_loop<false>(m, column, count, row, scales, out);
}
void swiglu(const float* in, int64_t count, float* out) { swiglu_loop(in, count, out); }

}  // namespace

const Kernel kPlain = {"plain", false, round_row, unpack, multiply, dot, swiglu};

}  // namespace molmo
