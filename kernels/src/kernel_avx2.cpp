// AVX2, with and without dot products of bytes (AVX-VNNI): x86 processors from 2013 on.
#include "kernels.h"

#ifdef MOLMO_X86
#include <immintrin.h>

#define MOLMO_AVX2 MOLMO_TARGET("avx2,fma,f16c")
#define MOLMO_AVXVNNI MOLMO_TARGET("avx2,fma,f16c,avxvnni")

namespace molmo {
namespace {

// Sixteen codes times sixteen bytes: pairs of products are at most 255 * 15 * 2, so four pairs fit into 16 bits.
struct Pairs {
    static MOLMO_AVX2 MOLMO_INLINE __m256i add(__m256i sums, const __m256i x[4], const __m256i w[4]) {
        __m256i pairs = _mm256_maddubs_epi16(x[0], w[0]);
        for (int i = 1; i < 4; ++i) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x[i], w[i]));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

struct Quads {
    static MOLMO_AVXVNNI MOLMO_INLINE __m256i add(__m256i sums, const __m256i x[4], const __m256i w[4]) {
        for (int i = 0; i < 4; ++i) sums = _mm256_dpbusd_avx_epi32(sums, x[i], w[i]);
        return sums;
    }
};

#define MOLMO_MULTIPLY(NAME, TARGET, DOT)                                                                            \
    template <int Count>                                                                                             \
    TARGET MOLMO_INLINE void NAME##_rows(const int8_t* values, const float* row_scales, const Panel& panel,          \
                                         int64_t inner, int64_t block, float* out, int64_t stride) {                 \
        const int64_t blocks = inner / block;                                                                        \
        __m256 total[Count][2];                                                                                      \
        for (int r = 0; r < Count; ++r) total[r][0] = total[r][1] = _mm256_setzero_ps();                             \
        for (int64_t b = 0; b < blocks; ++b) {                                                                       \
            __m256i sums[Count][2];                                                                                  \
            for (int r = 0; r < Count; ++r)                                                                          \
                for (int h = 0; h < 2; ++h) sums[r][h] = load(panel.starts + b * kColumns + 8 * h);                  \
            for (int64_t k = b * block; k < (b + 1) * block; k += 16) {                                              \
                for (int h = 0; h < 2; ++h) {                                                                        \
                    __m256i w[4];                                                                                    \
                    for (int i = 0; i < 4; ++i) w[i] = load(panel.weights + (k + 4 * i) * kColumns + 32 * h);        \
                    for (int r = 0; r < Count; ++r) {                                                                \
                        __m256i x[4];                                                                                \
                        for (int i = 0; i < 4; ++i) {                                                                \
                            int32_t four;                                                                            \
                            std::memcpy(&four, values + r * inner + k + 4 * i, 4);                                   \
                            x[i] = _mm256_set1_epi32(four);                                                          \
                        }                                                                                            \
                        sums[r][h] = DOT::add(sums[r][h], x, w);                                                     \
                    }                                                                                                \
                }                                                                                                    \
            }                                                                                                        \
            for (int h = 0; h < 2; ++h) {                                                                            \
                const __m256 scale = _mm256_loadu_ps(panel.scales + b * kColumns + 8 * h);                           \
                for (int r = 0; r < Count; ++r) {                                                                    \
                    const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(row_scales[r * blocks + b]));            \
                    total[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][h]), both, total[r][h]);                \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
        for (int r = 0; r < Count; ++r)                                                                              \
            for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + r * stride + 8 * h, total[r][h]);                     \
    }                                                                                                                \
    TARGET void NAME(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,                 \
                     int64_t stride) {                                                                               \
        const int64_t blocks = inner / block;                                                                        \
        int64_t r = 0;                                                                                               \
        for (; r + 3 <= rows.count; r += 3)                                                                          \
            NAME##_rows<3>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, \
                           stride);                                                                                  \
        for (; r < rows.count; ++r)                                                                                  \
            NAME##_rows<1>(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, out + r * stride, \
                           stride);                                                                                  \
    }

MOLMO_AVX2 MOLMO_INLINE __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

MOLMO_MULTIPLY(multiply_pairs, MOLMO_AVX2, Pairs)
MOLMO_MULTIPLY(multiply_quads, MOLMO_AVXVNNI, Quads)

MOLMO_AVX2 void round_row(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row_loop<true>(row, inner, block, values, scales);
}
MOLMO_AVX2 void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    unpack_loop(m, column, weights, scales, starts);
}
MOLMO_AVX2 void dot(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out) {
    dot_loop<true>(m, column, count, row, scales, out);
}
MOLMO_AVX2 void swiglu(const float* in, int64_t count, float* out) { swiglu_loop(in, count, out); }

}  // namespace

const Kernel kAvx2 = {"avx2", true, round_row, unpack, multiply_pairs, dot, swiglu};
const Kernel kAvxVnni = {"avx-vnni", true, round_row, unpack, multiply_quads, dot, swiglu};

}  // namespace molmo
#endif
