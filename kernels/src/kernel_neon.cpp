// NEON with dot products of bytes (Arm from 2018: Raspberry Pi 5, Jetson Orin) and with products of 2 x 8 bytes (i8mm).
#include "kernels.h"

#ifdef MOLMO_ARM
#include <arm_neon.h>

#define MOLMO_DOT MOLMO_TARGET("arch=armv8.2-a+dotprod")
#define MOLMO_I8MM MOLMO_TARGET("arch=armv8.2-a+dotprod+i8mm")

namespace molmo {
namespace {

template <int Count>
MOLMO_DOT MOLMO_INLINE void dot_rows(const int8_t* values, const float* row_scales, const Panel& panel, int64_t inner,
                                     int64_t block, float* out, int64_t stride) {
    const int64_t blocks = inner / block;
    float32x4_t total[Count][4];
    for (int r = 0; r < Count; ++r)
        for (int c = 0; c < 4; ++c) total[r][c] = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; ++b) {
        int32x4_t sums[Count][4];
        for (int r = 0; r < Count; ++r)
            for (int c = 0; c < 4; ++c) sums[r][c] = vdupq_n_s32(0);
        for (int64_t k = b * block; k < (b + 1) * block; k += 16) {
            int8x16_t x[Count];
            for (int r = 0; r < Count; ++r) x[r] = vld1q_s8(values + r * inner + k);
#define MOLMO_LANE(lane)                                                                 \
    for (int c = 0; c < 4; ++c) {                                                        \
        const int8x16_t w = vld1q_s8(panel.weights + (k + 4 * lane) * kColumns + 16 * c); \
        for (int r = 0; r < Count; ++r) sums[r][c] = vdotq_laneq_s32(sums[r][c], w, x[r], lane); \
    }
            MOLMO_LANE(0)
            MOLMO_LANE(1)
            MOLMO_LANE(2)
            MOLMO_LANE(3)
        }
        for (int c = 0; c < 4; ++c) {
            const float32x4_t scale = vld1q_f32(panel.scales + b * kColumns + 4 * c);
            for (int r = 0; r < Count; ++r)
                total[r][c] = vfmaq_f32(total[r][c], vcvtq_f32_s32(sums[r][c]), vmulq_n_f32(scale, row_scales[r * blocks + b]));
        }
    }
    for (int r = 0; r < Count; ++r)
        for (int c = 0; c < 4; ++c) vst1q_f32(out + r * stride + 4 * c, total[r][c]);
}

MOLMO_DOT void multiply_dot(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,
                            int64_t stride) {
    const int64_t blocks = inner / block;
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        dot_rows<4>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
    for (; r < rows.count; ++r)
        dot_rows<1>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
}

MOLMO_I8MM MOLMO_INLINE int8x16_t pair(const int8_t* first, const int8_t* second) {
    return vcombine_s8(vld1_s8(first), vld1_s8(second));
}

// Two columns of eight weights: words c and c + 1 of two consecutive fours.
MOLMO_I8MM MOLMO_INLINE void columns_of_eight(const int8_t* weights, int8x16_t out[2]) {
    const int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(weights));
    const int32x4_t second = vreinterpretq_s32_s8(vld1q_s8(weights + 4 * kColumns));
    out[0] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
    out[1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
}

// Two or four rows (pairs of them).
template <int Pairs>
MOLMO_I8MM MOLMO_INLINE void i8mm_rows(const int8_t* values, const float* row_scales, const Panel& panel, int64_t inner,
                                       int64_t block, float* out, int64_t stride) {
    const int64_t blocks = inner / block;
    float32x4_t total[2 * Pairs][4];
    for (int r = 0; r < 2 * Pairs; ++r)
        for (int c = 0; c < 4; ++c) total[r][c] = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; ++b) {
        for (int c = 0; c < 4; ++c) {  // four columns at a time
            int32x4_t sums[Pairs][2];   // [row, column] of 2 x 2
            for (int p = 0; p < Pairs; ++p) sums[p][0] = sums[p][1] = vdupq_n_s32(0);
            for (int64_t k = b * block; k < (b + 1) * block; k += 8) {
                int8x16_t w[2];
                columns_of_eight(panel.weights + k * kColumns + 16 * c, w);
                for (int p = 0; p < Pairs; ++p) {
                    const int8x16_t x = pair(values + 2 * p * inner + k, values + (2 * p + 1) * inner + k);
                    sums[p][0] = vmmlaq_s32(sums[p][0], x, w[0]);
                    sums[p][1] = vmmlaq_s32(sums[p][1], x, w[1]);
                }
            }
            const float32x4_t scale = vld1q_f32(panel.scales + b * kColumns + 4 * c);
            for (int p = 0; p < Pairs; ++p) {
                const int64x2_t left = vreinterpretq_s64_s32(sums[p][0]), right = vreinterpretq_s64_s32(sums[p][1]);
                const int32x4_t row[2] = {vreinterpretq_s32_s64(vzip1q_s64(left, right)),
                                          vreinterpretq_s32_s64(vzip2q_s64(left, right))};
                for (int i = 0; i < 2; ++i) {
                    const int r = 2 * p + i;
                    total[r][c] = vfmaq_f32(total[r][c], vcvtq_f32_s32(row[i]), vmulq_n_f32(scale, row_scales[r * blocks + b]));
                }
            }
        }
    }
    for (int r = 0; r < 2 * Pairs; ++r)
        for (int c = 0; c < 4; ++c) vst1q_f32(out + r * stride + 4 * c, total[r][c]);
}

MOLMO_I8MM void multiply_i8mm(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,
                              int64_t stride) {
    const int64_t blocks = inner / block;
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        i8mm_rows<2>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
    for (; r + 2 <= rows.count; r += 2)
        i8mm_rows<1>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
    if (r < rows.count)
        dot_rows<1>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
}

void round_row(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row_loop<false>(row, inner, block, values, scales);
}
void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    unpack_loop(m, column, weights, scales, starts);
}
void dot(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out) {
    dot_loop<false>(m, column, count, row, scales, out);
}
void swiglu(const float* in, int64_t count, float* out) { swiglu_loop(in, count, out); }

}  // namespace

const Kernel kNeonDot = {"neon-dot", false, round_row, unpack, multiply_dot, dot, swiglu};
const Kernel kNeonI8mm = {"neon-i8mm", false, round_row, unpack, multiply_i8mm, dot, swiglu};

}  // namespace molmo
#endif
