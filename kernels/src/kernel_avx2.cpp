// AVX2, with and without dot products of bytes (AVX-VNNI): x86 processors from 2013 on.
#include "kernels.h"

#ifdef MOLMO_X86
#include <immintrin.h>

#include <utility>
#include <vector>

#include "parallel.h"

#define MOLMO_AVX2 MOLMO_TARGET("avx2,fma,f16c")
#define MOLMO_AVXVNNI MOLMO_TARGET("avx2,fma,f16c,avxvnni")

namespace molmo {
namespace {

constexpr int kLanes = kColumns / 2;  // columns of a register

MOLMO_AVX2 MOLMO_INLINE __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

MOLMO_AVX2 MOLMO_INLINE void store(void* at, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), value);
}

MOLMO_AVX2 MOLMO_INLINE __m256i four_bytes(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

// Sums of pairs of 16-bit numbers.
MOLMO_AVX2 MOLMO_INLINE __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Sixteen bytes of a row times as many weights. A pair of products is at most 255 * 15 * 2, so four pairs fit 16 bits.
struct Pairs {
    static MOLMO_AVX2 MOLMO_INLINE __m256i add(__m256i sums, const int8_t* x, const __m256i w[4]) {
        __m256i pairs[4];
        for (int i = 0; i < 4; ++i) pairs[i] = _mm256_maddubs_epi16(four_bytes(x + 4 * i), w[i]);
        const __m256i halves[2] = {_mm256_add_epi16(pairs[0], pairs[1]), _mm256_add_epi16(pairs[2], pairs[3])};
        return _mm256_add_epi32(sums, add_pairs(_mm256_add_epi16(halves[0], halves[1])));
    }
};

#ifdef MOLMO_AVXVNNI_COMPILES
struct Quads {
    static MOLMO_AVXVNNI MOLMO_INLINE __m256i add(__m256i sums, const int8_t* x, const __m256i w[4]) {
        for (int i = 0; i < 4; ++i) sums = _mm256_dpbusd_avx_epi32(sums, four_bytes(x + 4 * i), w[i]);
        return sums;
    }
};
#endif

constexpr int64_t kMostRows = 6;  // sums of as many rows, and what they need, fit the 16 registers

#define MOLMO_MULTIPLY(NAME, TARGET, DOT)                                                                             \
    template <int Count>                                                                                              \
    TARGET void NAME##_rows(const int8_t* values, const float* row_scales, const Panel& panel, int64_t inner,         \
                            int64_t block, float* out, int64_t stride) {                                              \
        const int64_t blocks = inner / block;                                                                         \
        for (int64_t half = 0; half < kColumns; half += kLanes) {                                                      \
            __m256 total[Count];                                                                                      \
            for (int r = 0; r < Count; ++r) total[r] = _mm256_setzero_ps();                                           \
            const int8_t *x = values, *weights = panel.weights + 4 * half;                                            \
            for (int64_t b = 0; b < blocks; ++b) {                                                                    \
                __m256i sums[Count];                                                                                  \
                const __m256i start = load(panel.starts + b * kColumns + half);                                       \
                for (int r = 0; r < Count; ++r) sums[r] = start;                                                      \
                for (int64_t k = 0; k < block; k += 16, x += 16, weights += 16 * kColumns) {                          \
                    __m256i w[4];                                                                                     \
                    for (int i = 0; i < 4; ++i) w[i] = load(weights + 4 * i * kColumns);                              \
                    for (int r = 0; r < Count; ++r) sums[r] = DOT::add(sums[r], x + r * inner, w);                    \
                }                                                                                                     \
                const __m256 scale = _mm256_loadu_ps(panel.scales + b * kColumns + half);                             \
                for (int r = 0; r < Count; ++r) {                                                                     \
                    const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(row_scales[r * blocks + b]));             \
                    total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r]), both, total[r]);                          \
                }                                                                                                     \
            }                                                                                                         \
            for (int r = 0; r < Count; ++r) _mm256_storeu_ps(out + r * stride + half, total[r]);                      \
        }                                                                                                             \
    }                                                                                                                 \
    template <int... Counts>                                                                                          \
    TARGET MOLMO_INLINE void NAME##_some(int64_t count, std::integer_sequence<int, Counts...>, const int8_t* values,  \
                                         const float* row_scales, const Panel& panel, int64_t inner, int64_t block,   \
                                         float* out, int64_t stride) {                                                \
        constexpr decltype(&NAME##_rows<1>) kByCount[] = {NAME##_rows<Counts + 1>...};                                \
        kByCount[count - 1](values, row_scales, panel, inner, block, out, stride);                                    \
    }                                                                                                                 \
    TARGET void NAME(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,                  \
                     int64_t stride) {                                                                                \
        const int64_t blocks = inner / block;                                                                         \
        for (int64_t r = 0, count; r < rows.count; r += count) {                                                      \
            count = next_rows(rows.count - r, kMostRows);                                                             \
            NAME##_some(count, std::make_integer_sequence<int, kMostRows>(), rows.values + r * inner,                 \
                        rows.scales + r * blocks, panel, inner, block, out + r * stride, stride);                     \
        }                                                                                                             \
    }

MOLMO_MULTIPLY(multiply_pairs, MOLMO_AVX2, Pairs)
#ifdef MOLMO_AVXVNNI_COMPILES
MOLMO_MULTIPLY(multiply_quads, MOLMO_AVXVNNI, Quads)
#endif

MOLMO_AVX2 void round_row(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    round_row_loop<true>(row, inner, block, values, scales);
}

// 8 columns of 8 words -> 8 words of 8 columns.
MOLMO_AVX2 MOLMO_INLINE void transpose(const uint8_t* codes, int64_t stride, __m256i out[8]) {
    __m256i r[8], t[8];
    for (int j = 0; j < 4; ++j)  // the words 0-3 of the columns j and j + 4; then the words 4-7
        for (int h = 0; h < 2; ++h) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j * stride + 16 * h));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (j + 4) * stride + 16 * h));
            r[j + 4 * h] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
    for (int j = 0; j < 8; j += 2) {
        t[j] = _mm256_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm256_unpackhi_epi32(r[j], r[j + 1]);
    }
    for (int j = 0; j < 8; j += 4) {
        out[j] = _mm256_unpacklo_epi64(t[j], t[j + 2]);
        out[j + 1] = _mm256_unpackhi_epi64(t[j], t[j + 2]);
        out[j + 2] = _mm256_unpacklo_epi64(t[j + 1], t[j + 3]);
        out[j + 3] = _mm256_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
}

MOLMO_AVX2 MOLMO_INLINE float to_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

MOLMO_AVX2 void unpack(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    constexpr int64_t kStep = 64, kLine = 128;  // weights that are unpacked at a time, and in a line of the cache
    if (m.inner % kStep != 0) return unpack_loop(m, column, weights, scales, starts);
    const int64_t blocks = m.blocks(), bytes = m.inner / 2;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t n = 0; n < kColumns; ++n) {
            const int64_t at = (column + n) * blocks + b;
            scales[b * kColumns + n] = m.half_scales ? to_float(static_cast<const uint16_t*>(m.scales)[at])
                                                     : static_cast<const float*>(m.scales)[at];
        }
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1);
    const int64_t words_of_block = m.block / 8;
    for (int64_t half = 0; half < kColumns; half += kLanes) {
        const uint8_t* codes = m.codes + (column + half) * bytes;
        int8_t* to = weights + 4 * half;
        __m256i zero_point = _mm256_set1_epi8(8), sum = _mm256_setzero_si256();
        int64_t b = 0, word = 0;  // the block, and the word of eight weights in it
        for (int64_t k = 0; k < m.inner; k += kStep) {
            if (k % kLine == 0)  // the codes of the next panel, to arrive while this one is multiplied
                for (int64_t n = kColumns; n < kColumns + kLanes; ++n)
                    _mm_prefetch(reinterpret_cast<const char*>(codes + n * bytes + k / 2), _MM_HINT_T1);
            __m256i words[8];
            transpose(codes + k / 2, bytes, words);
            for (int j = 0; j < 8; ++j, to += 8 * kColumns) {
                if (word == 0 && m.zero_points != nullptr) {
                    alignas(32) uint32_t points[kLanes];
                    for (int64_t n = 0; n < kLanes; ++n)
                        points[n] = zero_point_at(m, column + half + n, b) * 0x01010101u;
                    zero_point = load(points);
                }
                const __m256i low = _mm256_sub_epi8(_mm256_and_si256(words[j], nibble), zero_point);
                const __m256i codes_4 = _mm256_and_si256(_mm256_srli_epi16(words[j], 4), nibble);
                const __m256i high = _mm256_sub_epi8(codes_4, zero_point);
                store(to, low);
                store(to + 4 * kColumns, high);
                const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(ones, low), _mm256_maddubs_epi16(ones, high));
                sum = _mm256_add_epi32(sum, add_pairs(pairs));
                if (++word == words_of_block) {
                    store(starts + b * kColumns + half, _mm256_mullo_epi32(sum, _mm256_set1_epi32(-128)));
                    sum = _mm256_setzero_si256();
                    word = 0, ++b;
                }
            }
        }
    }
}

// A row for `dot`: of each 64 values those of the low and of the high halves of the codes, and the sums of its blocks.
struct DotRow {
    Buffer<int8_t> memory;
    std::vector<int32_t> sums;  // one for each lane of the products, see `fill`
    std::vector<float> scales;

    MOLMO_AVX2 void fill(const int8_t* row, int64_t inner) {
        const __m256i flip = _mm256_set1_epi8(char(0x80)), split = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        const __m256i ones = _mm256_set1_epi8(1);
        int8_t* to = memory.grow(inner);
        sums.resize(size_t(inner / 8));
        for (int64_t k = 0; k < inner; k += 64) {
            const __m256i a = _mm256_permutevar8x32_epi32(_mm256_xor_si256(load(row + k), flip), split);
            const __m256i b = _mm256_permutevar8x32_epi32(_mm256_xor_si256(load(row + k + 32), flip), split);
            const __m256i low = _mm256_permute2x128_si256(a, b, 0x20), high = _mm256_permute2x128_si256(a, b, 0x31);
            store(to + k, low);
            store(to + k + 32, high);
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(ones, low), _mm256_maddubs_epi16(ones, high));
            store(sums.data() + k / 8, add_pairs(pairs));
        }
    }

    // The scales of a column's blocks times those of the row.
    MOLMO_AVX2 const float* scaled(const Matrix& m, int64_t column, const float* row_scales) {
        const int64_t blocks = m.blocks(), first = column * blocks;
        scales.resize(size_t(blocks));
        int64_t b = 0;
        for (; b + 8 <= blocks; b += 8) {
            const __m256 own = m.half_scales ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(
                                                   static_cast<const uint16_t*>(m.scales) + first + b)))
                                             : _mm256_loadu_ps(static_cast<const float*>(m.scales) + first + b);
            _mm256_storeu_ps(scales.data() + b, _mm256_mul_ps(own, _mm256_loadu_ps(row_scales + b)));
        }
        for (; b < blocks; ++b) scales[size_t(b)] = scale_at(m, first + b) * row_scales[b];
        return scales.data();
    }
};

thread_local DotRow dot_row;

// One number in all lanes, or for blocks of 32 each of two in half of them.
template <bool Two>
MOLMO_AVX2 MOLMO_INLINE __m256 lanes(const float* numbers) {
    if (!Two) return _mm256_set1_ps(*numbers);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(numbers[0])), _mm_set1_ps(numbers[1]), 1);
}

template <bool Two>
MOLMO_AVX2 MOLMO_INLINE __m256i zero_points(const Matrix& m, int64_t column, int64_t b) {
    const int32_t first = int32_t(zero_point_at(m, column, b));
    if (!Two) return _mm256_set1_epi32(first);
    const int32_t second = int32_t(zero_point_at(m, column, b + 1));
    return _mm256_setr_epi32(first, first, first, first, second, second, second, second);
}

template <int64_t Block>
MOLMO_AVX2 void dot_columns(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* row_scales,
                            float* out) {
    constexpr int64_t kStep = Block < 64 ? 64 : Block;  // weights that share a sum
    constexpr bool kTwo = Block < kStep;
    const __m256i nibble = _mm256_set1_epi8(15);
    dot_row.fill(row, m.inner);
    for (int64_t n = column; n < column + count; ++n) {
        const uint8_t* codes = m.codes + n * (m.inner / 2);
        const int8_t* x = dot_row.memory.data();
        const int32_t* row_sums = dot_row.sums.data();
        const float* scales = dot_row.scaled(m, n, row_scales);
        __m256 total = _mm256_setzero_ps();
        for (int64_t b = 0; b < m.inner / Block; b += kStep / Block, scales += kStep / Block) {
            __m256i pairs = _mm256_setzero_si256(), sums = _mm256_setzero_si256();
            for (int64_t k = 0; k < kStep; k += 64, codes += 32, x += 64, row_sums += 8) {
                const __m256i packed = load(codes), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_and_si256(packed, nibble), load(x)));
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(high, load(x + 32)));
                sums = _mm256_add_epi32(sums, load(row_sums));
            }
            sums = m.zero_points == nullptr ? _mm256_slli_epi32(sums, 3)
                                            : _mm256_mullo_epi32(sums, zero_points<kTwo>(m, n, b));
            const __m256 products = _mm256_cvtepi32_ps(_mm256_sub_epi32(add_pairs(pairs), sums));
            total = _mm256_fmadd_ps(products, lanes<kTwo>(scales), total);
        }
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[n - column] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
}

MOLMO_AVX2 void dot(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales, float* out) {
    switch (m.inner % 64 == 0 ? m.block : 0) {
        case 32: return dot_columns<32>(m, column, count, row, scales, out);
        case 64: return dot_columns<64>(m, column, count, row, scales, out);
        case 128: return dot_columns<128>(m, column, count, row, scales, out);
        default: return dot_loop<true>(m, column, count, row, scales, out);
    }
}

MOLMO_AVX2 void swiglu(const float* in, int64_t count, float* out) { swiglu_loop(in, count, out); }

}  // namespace

const Kernel kAvx2 = {"avx2", true, round_row, unpack, multiply_pairs, dot, swiglu};
#ifdef MOLMO_AVXVNNI_COMPILES
const Kernel kAvxVnni = {"avx-vnni", true, round_row, unpack, multiply_quads, dot, swiglu};
#endif

}  // namespace molmo
#endif
