// The steps of attention with AVX-512 and bfloat16: Intel from Sapphire Rapids (and Cooper Lake), AMD from Zen 4.
#include "kernels.h"

#ifdef MOLMO_BFLOAT16
#include <algorithm>

#include "attention_avx512.h"

namespace molmo::avx512 {
namespace {

MOLMO_AVX512_BF16 MOLMO_INLINE __mmask16 first_of(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 32 numbers of a row from `at` on, as bfloat16; zeros from `end` on.
MOLMO_AVX512_BF16 MOLMO_INLINE __m512i rounded(const float* row, int64_t at, int64_t end) {
    const __m512 low = _mm512_maskz_loadu_ps(first_of(end - at), row + at);
    const __m512 high = _mm512_maskz_loadu_ps(first_of(end - at - 16), row + at + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

MOLMO_AVX512_BF16 MOLMO_INLINE void transpose(__m512i r[16]) {  // 16 x 16 words
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // r[4 j + i]: the words i, 4 + i, 8 + i and 12 + i of four rows
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Eight rows times 32 columns.
MOLMO_AVX512_BF16 MOLMO_INLINE void bfloat16_rows(const uint16_t* rows, const uint16_t* panels, int64_t steps,
                                                  int64_t depth, float* out, int64_t stride) {
    constexpr int64_t kRows = 8, kNumbers = kTileBytes / 2;
    __m512 sums[kRows][2];
    for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    const uint16_t* second = panels + depth * kNumbers;
    for (int64_t at = 0; at < steps * kNumbers; at += kNumbers)
        for (int64_t pair = 0; pair < 16; ++pair) {
            const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panels + at + pair * 32);
            const __m512bh w1 = (__m512bh)_mm512_loadu_si512(second + at + pair * 32);
            for (int64_t r = 0; r < kRows; ++r) {
                int32_t two;
                std::memcpy(&two, rows + at + r * 32 + pair * 2, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, w0);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, w1);
            }
        }
    for (int64_t r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(out + r * stride, sums[r][0]);
        _mm512_storeu_ps(out + r * stride + kColumns, sums[r][1]);
    }
}

MOLMO_AVX512_BF16 void bfloat16_tiles(const uint16_t* rows, const uint16_t* panels, int64_t steps, int64_t depth,
                                      int64_t blocks, float* out, int64_t stride) {
    for (int64_t r = 0; r < blocks * kTile; r += 8)
        bfloat16_rows(rows + (r / kTile * depth * kTileBytes + r % kTile * kStepBytes) / 2, panels, steps, depth,
                      out + r * stride, stride);
}

// 2^y for y <= 0 within 4e-6, a hundredth of what bfloat16 keeps.
MOLMO_AVX512_BF16 MOLMO_INLINE __m512 power_of_two(__m512 y) {
    const __m512 f = _mm512_reduce_ps(y, 0x09);  // y minus the integer below it
    __m512 p = _mm512_set1_ps(1.3534167e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.2011464e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144275e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(p, y);
}

}  // namespace

const Tiles kTilesBf16 = {kTiles.begin, kTiles.end, kTiles.int8, bfloat16_tiles};

MOLMO_AVX512_BF16 void round_to_tiles(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t padded,
                                      uint16_t* out) {
    for (int64_t r = 0; r < up(count, kTile); ++r)
        for (int64_t d = 0; d < padded; d += 32) {
            const __m512i row = r < count ? rounded(rows + r * stride, d, width) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + (r / kTile * padded / 32 + d / 32) * 512 + r % kTile * 32, row);
        }
}

MOLMO_AVX512_BF16 void pack_rows(const float* rows, int64_t stride, int64_t count, int64_t padded_count, int64_t width,
                                 int64_t padded, uint16_t* out) {
    for (int64_t first = 0; first < padded_count; first += kColumns)
        for (int64_t d = 0; d < padded; d += 32, out += 512) {
            __m512i words[16];
            for (int64_t i = 0; i < kColumns; ++i)
                words[i] = first + i < count ? rounded(rows + (first + i) * stride, d, width) : _mm512_setzero_si512();
            transpose(words);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + 32 * i, words[i]);
        }
}

MOLMO_AVX512_BF16 void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t padded_count,
                                    int64_t width, int64_t padded, uint16_t* out) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t key = 0; key < padded_count; key += 2)
        for (int64_t d = 0; d < padded; d += 32) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i even = key < count ? rounded(rows + key * stride, d, width) : zero;
            const __m512i odd = key + 1 < count ? rounded(rows + (key + 1) * stride, d, width) : zero;
            // Pairs of the numbers 0-3, 8-11, 16-19, 24-27 and of the others.
            const __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
            uint16_t* to = out + (d / kColumns * padded_count / 32 + key / 32) * 512 + key % 32 / 2 * 32;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi32(first, low, second));
            _mm512_storeu_si512(to + padded_count / 32 * 512, _mm512_permutex2var_epi32(first, high, second));
        }
}

MOLMO_AVX512_BF16 void softmax(const Scores& scores, uint16_t* weights, float* sums) {
    constexpr float kLog2E = 1.44269504f;
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    // 2^-1000 is 0, and -infinity has no fraction. With NaN the second operand of max counts, so that NaN stays.
    const __m512 lowest = _mm512_set1_ps(-1000.0f);
    const float scale = scores.bias == nullptr ? scores.scale * kLog2E : kLog2E;
    const int64_t end = up(scores.last(), 32);
    for (int64_t r = 0; r < scores.rows; ++r) {
        float* row = scores.values + r * scores.stride;
        const int64_t keys = scores.keys + r * scores.more;
        if (scores.bias != nullptr)
            for (int64_t i = 0; i < keys; i += 16) {
                const __m512 bias = _mm512_maskz_loadu_ps(first_of(keys - i), scores.bias + r * scores.bias_stride + i);
                _mm512_storeu_ps(row + i, _mm512_fmadd_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(scores.scale), bias));
            }
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < keys; i += 16)
            most = _mm512_mask_max_ps(most, first_of(keys - i), most, _mm512_loadu_ps(row + i));
        const __m512 factor = _mm512_set1_ps(scale);
        const __m512 start = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), factor);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < end; i += 32) {
            __m512 power[2];
            for (int64_t half = 0; half < 2; ++half) {
                const __mmask16 some = first_of(keys - i - 16 * half);
                const __m512 y = _mm512_fmsub_ps(_mm512_loadu_ps(row + i + 16 * half), factor, start);
                power[half] = _mm512_maskz_mov_ps(some, power_of_two(_mm512_max_ps(lowest, y)));
            }
            const __m512bh both = _mm512_cvtne2ps_pbh(power[1], power[0]);
            sum = _mm512_dpbf16_ps(sum, both, ones);  // of the rounded weights, so that they add up to one
            _mm512_storeu_si512(weights + (r / kTile * scores.stride / 32 + i / 32) * 512 + r % kTile * 32, (__m512i)both);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

MOLMO_AVX512_BF16 void divide(const float* in, int64_t in_stride, int64_t rows, int64_t width, const float* sums,
                              float* out, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / sums[r]);
        for (int64_t d = 0; d < width; d += 16)
            _mm512_mask_storeu_ps(out + r * stride + d, first_of(width - d),
                                  _mm512_mul_ps(_mm512_loadu_ps(in + r * in_stride + d), factor));
    }
}

// The sum of the weighted values in 16 * Parts columns.
template <int Parts>
MOLMO_AVX512_BF16 MOLMO_INLINE void add_values(const float* weights, const float* values, int64_t count, int64_t width,
                                               __m512 factor, float* out) {
    __m512 sums[Parts];
    for (int i = 0; i < Parts; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; ++j, values += width)
        for (int i = 0; i < Parts; ++i)
            sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[j]), _mm512_loadu_ps(values + 16 * i), sums[i]);
    for (int i = 0; i < Parts; ++i) _mm512_storeu_ps(out + 16 * i, _mm512_mul_ps(sums[i], factor));
}

MOLMO_AVX512_BF16 void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t width,
                              float scale, const float* bias, float* weights, float* out) {
    float most = -INFINITY;
    for (int64_t j = 0; j < count; ++j, keys += width) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), _mm512_loadu_ps(keys + d), sum);
        weights[j] = _mm512_reduce_add_ps(sum) * scale + (bias == nullptr ? 0.0f : bias[j]);
        most = std::max(most, weights[j]);
    }
    for (int64_t j = 0; j < count; ++j) weights[j] = exponential(weights[j] - most);
    float total = 0;
    for (int64_t j = 0; j < count; ++j) total += weights[j];
    const __m512 factor = _mm512_set1_ps(1.0f / total);
    int64_t d = 0;
    for (; d + 128 <= width; d += 128) add_values<8>(weights, values + d, count, width, factor, out + d);
    for (; d + 32 <= width; d += 32) add_values<2>(weights, values + d, count, width, factor, out + d);
    for (; d < width; d += 16) add_values<1>(weights, values + d, count, width, factor, out + d);
}

MOLMO_AVX512_BF16 void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

}  // namespace molmo::avx512
#endif
