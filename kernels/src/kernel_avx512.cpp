// AVX-512 with dot products of bytes (VNNI): Intel from Ice Lake, AMD from Zen 4.
#include "kernels.h"

#ifdef MOLMO_X86
#include <utility>
#include <vector>

#include "kernel_avx512.h"

namespace molmo::avx512 {
namespace {

template <bool Unsigned>
MOLMO_AVX512 MOLMO_INLINE void round_row(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m128i flip = _mm_set1_epi8(Unsigned ? char(0x80) : 0);
    for (int64_t b = 0; b < inner / block; ++b, row += block, values += block) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t i = 0; i < block; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
        const float largest = _mm512_reduce_max_ps(most);
        scales[b] = largest / 127.0f;
        const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        for (int64_t i = 0; i < block; i += 16) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), factor));
            const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(whole), order);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), _mm_xor_si128(bytes, flip));
        }
    }
}

MOLMO_AVX512 MOLMO_INLINE __m512i two_rows(const uint8_t* first, const uint8_t* second) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}

// 16 columns of 8 words -> 8 words of 16 columns.
MOLMO_AVX512 MOLMO_INLINE void transpose(const uint8_t* codes, int64_t stride, __m512i out[8]) {
    __m512i r[8], t[8], u[8];
    for (int j = 0; j < 4; ++j) {
        r[j] = two_rows(codes + j * stride, codes + (j + 4) * stride);
        r[j + 4] = two_rows(codes + (j + 8) * stride, codes + (j + 12) * stride);
    }
    for (int j = 0; j < 8; j += 2) {
        t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
    }
    for (int j = 0; j < 8; j += 4) {
        u[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
        u[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
        u[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
        u[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        out[j] = _mm512_shuffle_i32x4(u[j], u[j + 4], 0x88);
        out[j + 4] = _mm512_shuffle_i32x4(u[j], u[j + 4], 0xdd);
    }
}

// A row for `dot`: of each 128 values those of the low and of the high halves of the codes, and their sums.
struct DotRow {
    std::vector<int8_t> memory;
    std::vector<float> scales;
    int8_t* values = nullptr;

    MOLMO_AVX512 void fill(const int8_t* row, int64_t inner, bool is_unsigned) {
        const __m512i flip = _mm512_set1_epi8(is_unsigned ? char(0x80) : 0), ones = _mm512_set1_epi8(1);
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        memory.resize(size_t(inner / 128 * 192 + 64));
        values = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
        for (int64_t k = 0; k + 128 <= inner; k += 128) {
            const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(row + k), flip);
            const __m512i b = _mm512_xor_si512(_mm512_loadu_si512(row + k + 64), flip);
            const __m512i low = _mm512_permutex2var_epi32(a, evens, b), high = _mm512_permutex2var_epi32(a, odds, b);
            int8_t* at = values + k / 128 * 192;
            _mm512_store_si512(at, low);
            _mm512_store_si512(at + 64, high);
            const __m512i sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, low), ones, high);
            _mm512_store_si512(at + 128, sums);
        }
    }

    // The scales of a column's blocks times those of the row.
    MOLMO_AVX512 const float* scaled(const Matrix& m, int64_t column, const float* row_scales) {
        const int64_t blocks = m.blocks(), first = column * blocks;
        scales.resize(size_t(blocks));
        for (int64_t b = 0; b < blocks; b += 16) {
            const __mmask16 some = blocks - b >= 16 ? __mmask16(0xffff) : __mmask16((1u << (blocks - b)) - 1);
            const __m512 own =
                m.half_scales
                    ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(m.scales) + first + b))
                    : _mm512_maskz_loadu_ps(some, static_cast<const float*>(m.scales) + first + b);
            _mm512_mask_storeu_ps(scales.data() + b, some, _mm512_mul_ps(own, _mm512_maskz_loadu_ps(some, row_scales + b)));
        }
        return scales.data();
    }
};

thread_local DotRow dot_row;

MOLMO_AVX512 MOLMO_INLINE __m512i zero_points_of_four(const Matrix& m, int64_t column, int64_t b) {
    if (m.block != 32) return _mm512_set1_epi32(int(zero_point_at(m, column, b)));
    const __m128i four = _mm_setr_epi32(int(zero_point_at(m, column, b)), int(zero_point_at(m, column, b + 1)),
                                        int(zero_point_at(m, column, b + 2)), int(zero_point_at(m, column, b + 3)));
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(quarters, _mm512_castsi128_si512(four));
}

template <bool Unsigned>
MOLMO_AVX512 MOLMO_INLINE void dot(const Matrix& m, int64_t column, int64_t count, const int8_t* row,
                                   const float* row_scales, float* out) {
    if ((m.block != 32 && m.block != 128) || m.inner % 128 != 0)
        return dot_loop<Unsigned>(m, column, count, row, row_scales, out);
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    dot_row.fill(row, m.inner, Unsigned);
    const int64_t per_step = 128 / m.block;
    for (int64_t n = column; n < column + count; ++n) {
        const uint8_t* codes = m.codes + n * (m.inner / 2);
        const int8_t* x = dot_row.values;
        const float* scales = dot_row.scaled(m, n, row_scales);
        __m512 total = _mm512_setzero_ps();
        for (int64_t k = 0; k < m.inner; k += 128, codes += 64, x += 192, scales += per_step) {
            const __m512i packed = _mm512_loadu_si512(codes), sums = _mm512_load_si512(x + 128);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
            __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(packed, nibble), _mm512_load_si512(x));
            sum = _mm512_dpbusd_epi32(sum, high, _mm512_load_si512(x + 64));
            sum = _mm512_sub_epi32(sum, m.zero_points == nullptr
                                            ? _mm512_slli_epi32(sums, 3)
                                            : _mm512_mullo_epi32(sums, zero_points_of_four(m, n, k / m.block)));
            const __m512 scale = per_step == 1 ? _mm512_set1_ps(*scales)
                                               : _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
            total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
        }
        out[n - column] = _mm512_reduce_add_ps(total);
    }
}

template <int Count>
MOLMO_AVX512 void multiply_rows(const int8_t* values, const float* row_scales, const Panel& panel, int64_t inner,
                                int64_t block, float* out, int64_t stride) {
    const int64_t blocks = inner / block;
    __m512 total[Count];
    for (int r = 0; r < Count; ++r) total[r] = _mm512_setzero_ps();
    const int8_t* weights = panel.weights;
    for (int64_t b = 0; b < blocks; ++b) {
        __m512i sums[Count];
        const __m512i start = _mm512_loadu_si512(panel.starts + b * kColumns);
        for (int r = 0; r < Count; ++r) sums[r] = start;
        for (int64_t k = b * block; k < (b + 1) * block; k += 4, weights += 4 * kColumns) {
            const __m512i w = _mm512_loadu_si512(weights);
            for (int r = 0; r < Count; ++r) {
                int32_t four;
                std::memcpy(&four, values + r * inner + k, 4);
                sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_set1_epi32(four), w);
            }
        }
        const __m512 scale = _mm512_loadu_ps(panel.scales + b * kColumns);
        for (int r = 0; r < Count; ++r) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(row_scales[r * blocks + b]));
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), both, total[r]);
        }
    }
    for (int r = 0; r < Count; ++r) _mm512_storeu_ps(out + r * stride, total[r]);
}

constexpr int64_t kMostRows = 12;  // sums of as many rows, and what they need, fit the 32 registers

template <int... Counts>
MOLMO_AVX512 MOLMO_INLINE void multiply_some(int64_t count, std::integer_sequence<int, Counts...>, const int8_t* values,
                                             const float* row_scales, const Panel& panel, int64_t inner, int64_t block,
                                             float* out, int64_t stride) {
    constexpr decltype(&multiply_rows<1>) kByCount[] = {multiply_rows<Counts + 1>...};
    kByCount[count - 1](values, row_scales, panel, inner, block, out, stride);
}

MOLMO_AVX512 void multiply(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,
                           int64_t stride) {
    const int64_t blocks = inner / block;
    for (int64_t r = 0, count; r < rows.count; r += count) {
        count = next_rows(rows.count - r, kMostRows);
        multiply_some(count, std::make_integer_sequence<int, kMostRows>(), rows.values + r * inner,
                      rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);
    }
}

}  // namespace

MOLMO_AVX512 void round_row_signed(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row<false>(row, inner, block, values, scales);
}
MOLMO_AVX512 void round_row_unsigned(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row<true>(row, inner, block, values, scales);
}

MOLMO_AVX512 void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    if (m.inner % 64 != 0) return unpack_loop(m, column, weights, scales, starts);
    const int64_t blocks = m.blocks(), bytes = m.inner / 2;
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    const __m512i quarter = _mm512_set1_epi32(-128);
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t n = 0; n < kColumns; ++n) {
            const int64_t at = (column + n) * blocks + b;
            scales[b * kColumns + n] =
                m.half_scales ? _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<const uint16_t*>(m.scales)[at])))
                              : static_cast<const float*>(m.scales)[at];
        }
    constexpr int64_t kLine = 128;  // weights in a line of the cache
    __m512i zero_point = _mm512_set1_epi8(8), sum = _mm512_setzero_si512();
    const uint8_t* codes = m.codes + column * bytes;
    const int64_t words_of_block = m.block / 8;
    int64_t b = 0, word = 0;  // the block, and the word of eight weights in it
    for (int64_t k = 0; k < m.inner; k += 64) {
        if (k % kLine == 0)  // the codes of the next panel, to arrive while this one is multiplied
            for (int64_t n = kColumns; n < 2 * kColumns; ++n)
                _mm_prefetch(reinterpret_cast<const char*>(codes + n * bytes + k / 2), _MM_HINT_T1);
        __m512i words[8];
        transpose(codes + k / 2, bytes, words);
        for (int j = 0; j < 8; ++j, weights += 8 * kColumns) {
            if (word == 0 && m.zero_points != nullptr) {
                alignas(64) uint32_t points[kColumns];
                for (int64_t n = 0; n < kColumns; ++n) points[n] = zero_point_at(m, column + n, b) * 0x01010101u;
                zero_point = _mm512_load_si512(points);
            }
            const __m512i low = _mm512_sub_epi8(_mm512_and_si512(words[j], nibble), zero_point);
            const __m512i high = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(words[j], 4), nibble), zero_point);
            _mm512_storeu_si512(weights, low);
            _mm512_storeu_si512(weights + 4 * kColumns, high);
            sum = _mm512_dpbusd_epi32(sum, ones, low);
            sum = _mm512_dpbusd_epi32(sum, ones, high);
            if (++word == words_of_block) {
                _mm512_storeu_si512(starts + b * kColumns, _mm512_mullo_epi32(sum, quarter));
                sum = _mm512_setzero_si512();
                word = 0, ++b;
            }
        }
    }
}

MOLMO_AVX512 void dot_signed(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales,
                             float* out) {
    dot<false>(m, column, count, row, scales, out);
}
MOLMO_AVX512 void dot_unsigned(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales,
                               float* out) {
    dot<true>(m, column, count, row, scales, out);
}
MOLMO_AVX512 void swiglu(const float* in, int64_t count, float* out) { swiglu_loop(in, count, out); }

}  // namespace molmo::avx512

namespace molmo {

const Kernel kAvx512 = {"avx512-vnni",    true,
                        avx512::round_row_unsigned, avx512::unpack,
                        avx512::multiply, avx512::dot_unsigned,
                        avx512::swiglu,   &avx512::kTiles};
#ifdef MOLMO_BFLOAT16
const Kernel kAvx512Bf16 = {"avx512-bf16",    true,
                            avx512::round_row_unsigned, avx512::unpack,
                            avx512::multiply, avx512::dot_unsigned,
                            avx512::swiglu,   &avx512::kTilesBf16};
#endif

}  // namespace molmo
#endif
