// Vision towers with AVX-512: the parts of eight-bit layers, and their products on processors without AMX.
#include "kernels.h"

#ifdef MOLMO_X86
#include <algorithm>
#include <utility>

#include "parallel.h"
#include "vision_avx512.h"

namespace molmo::avx512 {
namespace {

constexpr float kTiny = 1e-30f;  // keeps the scale of zeros from being 0

MOLMO_AVX512 MOLMO_INLINE __mmask16 first_of(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 1 / (1 + e^-x) within 1e-6 of its size.
MOLMO_AVX512 MOLMO_INLINE __m512 sigmoid(__m512 x) {
    const __m512 limit = _mm512_set1_ps(126.0f), one = _mm512_set1_ps(1.0f);
    __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
    y = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, y));  // NaN stays
    const __m512 f = _mm512_reduce_ps(y, 0x08);  // y minus the nearest integer
    __m512 p = _mm512_set1_ps(1.32764720e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.67554138e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55071327e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40221197e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93146967e-1f));
    p = _mm512_fmadd_ps(p, f, one);
    const __m512 sum = _mm512_add_ps(one, _mm512_scalef_ps(p, _mm512_sub_ps(y, f)));
    const __m512 guess = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2.0f)));
}

template <Activation Which>
MOLMO_AVX512 MOLMO_INLINE __m512 activate(__m512 x) {
    if (Which == Activation::kQuickGelu) return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, _mm512_set1_ps(1.702f))));
    if (Which == Activation::kGeluTanh) {  // x * (1 + tanh(y)) / 2 = x * sigmoid(2 y)
        const __m512 square = _mm512_mul_ps(x, x);
        const __m512 factor = _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548163f), _mm512_set1_ps(1.5957691216f));
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, factor)));
    }
    return x;
}

template <Activation Which>
MOLMO_AVX512 MOLMO_INLINE void finish_rows(const int32_t* sums, int64_t count, const Finish& how, float* out) {
    __m512 scale[2], bias[2];
    for (int64_t half = 0; half < 2; ++half) {
        scale[half] = _mm512_loadu_ps(how.column_scales + half * kColumns);
        bias[half] = how.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(how.bias + half * kColumns);
    }
    for (int64_t r = 0; r < count; ++r) {
        const __m512 row_scale = _mm512_set1_ps(how.row_scales[r]);
        for (int64_t half = 0; half < 2; ++half, sums += kColumns) {
            const int64_t at = r * how.stride + half * kColumns;
            // In the order of the operators that this replaces, each rounded.
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), scale[half]), row_scale);
            y = activate<Which>(_mm512_add_ps(y, bias[half]));
            if (how.residual != nullptr) y = _mm512_add_ps(y, _mm512_loadu_ps(how.residual + at));
            _mm512_storeu_ps(out + at, y);
        }
    }
}

constexpr int64_t kWidth = 2 * kColumns;

// Some rows of a tile times 32 columns; without `starts` added to `out`.
template <int Rows>
MOLMO_AVX512 void int8_rows(const Int8Product& p, const int8_t* rows, int32_t* out) {
    __m512i sums[Rows][2];
    for (int r = 0; r < Rows; ++r) {
        const int32_t* start = p.starts != nullptr ? p.starts : out + r * kWidth;
        sums[r][0] = _mm512_loadu_si512(start);
        sums[r][1] = _mm512_loadu_si512(start + kColumns);
    }
    const int8_t *first = p.panels, *second = p.panels + p.depth * kTileBytes;
    for (int64_t at = 0; at < p.steps * kTileBytes; at += kTileBytes)
        for (int64_t quad = 0; quad < 16; ++quad) {
            const __m512i w0 = _mm512_loadu_si512(first + at + quad * 64);
            const __m512i w1 = _mm512_loadu_si512(second + at + quad * 64);
            for (int r = 0; r < Rows; ++r) {
                int32_t four;
                std::memcpy(&four, rows + at + r * kStepBytes + quad * 4, 4);
                const __m512i x = _mm512_set1_epi32(four);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, w0);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, w1);
            }
        }
    for (int r = 0; r < Rows; ++r) {
        _mm512_storeu_si512(out + r * kWidth, sums[r][0]);
        _mm512_storeu_si512(out + r * kWidth + kColumns, sums[r][1]);
    }
}

constexpr int64_t kMostRows = 8;  // sums of as many rows, and what they need, fit the 32 registers

template <int... Counts>
MOLMO_AVX512 MOLMO_INLINE void int8_some(int64_t count, std::integer_sequence<int, Counts...>, const Int8Product& p,
                                         const int8_t* rows, int32_t* out) {
    constexpr decltype(&int8_rows<1>) kByCount[] = {int8_rows<Counts + 1>...};
    kByCount[count - 1](p, rows, out);
}

MOLMO_AVX512 void int8_tiles(const Int8Product& p, int32_t* out) {
    const int8_t* next = p.next;
    for (int64_t r = 0, some; r < p.count; r += some, next += kStepBytes) {
        some = next_rows(std::min(p.count, up(r + 1, kTile)) - r, kMostRows);  // of this tile
        for (int64_t at = 0; at < p.steps * kTileBytes; at += kTileBytes) {
            _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(next + p.depth * kTileBytes + at), _MM_HINT_T1);
        }
        const int8_t* rows = p.rows + r / kTile * p.depth * kTileBytes + r % kTile * kStepBytes;
        int8_some(some, std::make_integer_sequence<int, kMostRows>(), p, rows, out + r * kWidth);
    }
}

void nothing() {}

}  // namespace

const Tiles kTiles = {nothing, nothing, int8_tiles, nullptr};

MOLMO_AVX512 void round_tile(const float* x, int64_t count, int64_t inner, bool is_unsigned, int8_t* values,
                             float* scales) {
    const __m128i flip = _mm_set1_epi8(is_unsigned ? char(0x80) : 0);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t r = 0; r < count; ++r, x += inner) {
        // As integers, of which NaN is the largest.
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < inner; i += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, _mm512_castps_si512(_mm512_maskz_loadu_ps(
                                                                          first_of(inner - i), x + i))));
        const int32_t bits = _mm512_reduce_max_epi32(most);
        float largest;
        std::memcpy(&largest, &bits, 4);
        scales[r] = (largest < kTiny ? kTiny : largest) * (1.0f / 127.0f);
        const __m512 factor = _mm512_set1_ps(1.0f / scales[r]);
        for (int64_t i = 0; i < inner; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_of(inner - i), x + i), factor);
            const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled)), flip);
            int8_t* to = values + i / kStepBytes * kTileBytes + r * kStepBytes + i % kStepBytes;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
        }
    }
}

MOLMO_AVX512 void finish(const int32_t* sums, int64_t count, const Finish& how, Activation activation, float* out) {
    switch (activation) {
        case Activation::kNone: return finish_rows<Activation::kNone>(sums, count, how, out);
        case Activation::kQuickGelu: return finish_rows<Activation::kQuickGelu>(sums, count, how, out);
        case Activation::kGeluTanh: return finish_rows<Activation::kGeluTanh>(sums, count, how, out);
    }
}

}  // namespace molmo::avx512
#endif
