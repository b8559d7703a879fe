// Loops that every kernel shares. They are inlined into functions compiled for one set of instructions.
#pragma once

#include <cmath>
#include <cstring>

#include "matrix.h"

#if defined(__GNUC__) || defined(__clang__)
#define MOLMO_INLINE inline __attribute__((always_inline))
#define MOLMO_TARGET(features) __attribute__((target(features)))
#else
#define MOLMO_INLINE __forceinline
#define MOLMO_TARGET(features)
#endif

namespace molmo {

MOLMO_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    float value;
    if (magnitude >= 0x7c00) bits += 112u << 23;  // infinity and NaN
    std::memcpy(&value, &bits, 4);
    if (magnitude < 0x0400) value = float(magnitude) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

MOLMO_INLINE float scale_at(const Matrix& m, int64_t index) {
    return m.half_scales ? half_to_float(static_cast<const uint16_t*>(m.scales)[index])
                         : static_cast<const float*>(m.scales)[index];
}

MOLMO_INLINE uint32_t zero_point_at(const Matrix& m, int64_t column, int64_t b) {
    if (m.zero_points == nullptr) return 8;
    const uint8_t pair = m.zero_points[column * ((m.blocks() + 1) / 2) + b / 2];
    return b & 1 ? pair >> 4 : pair & 15;
}

// e^x within 2e-7 of its size, without branches; x is clamped to what float32 can hold.
MOLMO_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float steps = x * 1.44269504f + 12582912.0f;  // the sum rounds to an integer, in the low bits
    const float whole = steps - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    int32_t exponent;
    std::memcpy(&exponent, &steps, 4);
    const int32_t bits = (exponent - 0x4b400000 + 127) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

MOLMO_INLINE void swiglu_loop(const float* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        const float gate = in[2 * i], up = in[2 * i + 1];
        out[i] = gate / (1.0f + exponential(-gate)) * up;
    }
}

template <bool Unsigned>
MOLMO_INLINE void round_row_loop(const float* row, int64_t inner, int64_t block, int8_t* values, float* scales) {
    for (int64_t b = 0; b < inner / block; ++b) {
        const float* x = row + b * block;
        float largest = 0;
        for (int64_t i = 0; i < block; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        scales[b] = largest / 127.0f;
        const float factor = largest > 0 ? 127.0f / largest : 0.0f;
        int8_t* q = values + b * block;
        for (int64_t i = 0; i < block; i += 8) {
            for (int64_t j = 0; j < 8; ++j) {
                const float rounded = std::nearbyintf(x[i + j] * factor);
                const int8_t value = int8_t(int(rounded));
                q[i + (j >> 1) + 4 * (j & 1)] = Unsigned ? int8_t(value ^ 0x80) : value;
            }
        }
    }
}

// Four codes in the bytes of a word, minus four times the same zero point.
MOLMO_INLINE uint32_t minus_zero_point(uint32_t codes, uint32_t zero_points) {
    return ((codes | 0x80808080u) - zero_points) ^ 0x80808080u;
}

MOLMO_INLINE void unpack_loop(const Matrix& m, int64_t column, int8_t* weights, float* scales, int32_t* starts) {
    const int64_t blocks = m.blocks(), words = m.block / 8;
    for (int64_t n = 0; n < kColumns; ++n) {
        const uint8_t* codes = m.codes + (column + n) * (m.inner / 2);
        for (int64_t b = 0; b < blocks; ++b) {
            const uint32_t zero_point = zero_point_at(m, column + n, b);
            int32_t sum = 0;
            for (int64_t w = 0; w < words; ++w) {
                uint32_t packed;
                std::memcpy(&packed, codes + (b * words + w) * 4, 4);
                const uint32_t low = packed & 0x0f0f0f0fu, high = (packed >> 4) & 0x0f0f0f0fu;
                sum += int32_t(((low + high) * 0x01010101u) >> 24);
                const uint32_t pair[2] = {minus_zero_point(low, zero_point * 0x01010101u),
                                          minus_zero_point(high, zero_point * 0x01010101u)};
                int8_t* at = weights + ((b * words + w) * 2 * kColumns + n) * 4;
                std::memcpy(at, &pair[0], 4);
                std::memcpy(at + kColumns * 4, &pair[1], 4);
            }
            scales[b * kColumns + n] = scale_at(m, (column + n) * blocks + b);
            starts[b * kColumns + n] = -128 * (sum - int32_t(zero_point) * int32_t(m.block));
        }
    }
}

template <bool Unsigned>
MOLMO_INLINE void dot_loop(const Matrix& m, int64_t column, int64_t count, const int8_t* row, const float* scales,
                           float* out) {
    const int64_t blocks = m.blocks(), half = m.block / 2;
    for (int64_t n = 0; n < count; ++n) {
        const uint8_t* codes = m.codes + (column + n) * (m.inner / 2);
        float total = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t zero_point = int32_t(zero_point_at(m, column + n, b));
            int32_t sum = 0;
            for (int64_t i = 0; i < half; ++i) {
                const int8_t* x = row + b * m.block + (i >> 2) * 8 + (i & 3);
                const int32_t even = Unsigned ? uint8_t(x[0]) - 128 : x[0], odd = Unsigned ? uint8_t(x[4]) - 128 : x[4];
                const uint8_t pair = codes[b * half + i];
                sum += even * ((pair & 15) - zero_point) + odd * ((pair >> 4) - zero_point);
            }
            total += float(sum) * (scales[b] * scale_at(m, (column + n) * blocks + b));
        }
        out[n] = total;
    }
}

template <bool Unsigned>
MOLMO_INLINE void multiply_loop(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,
                                int64_t stride) {
    const int64_t blocks = inner / block;
    for (int64_t r = 0; r < rows.count; ++r) {
        float total[kColumns] = {};
        for (int64_t b = 0; b < blocks; ++b) {
            int32_t sums[kColumns] = {};
            for (int64_t w = b * block / 4; w < (b + 1) * block / 4; ++w) {
                const int8_t* x = rows.values + r * inner + w * 4;
                const int8_t* y = panel.weights + w * 4 * kColumns;
                for (int n = 0; n < kColumns; ++n)
                    for (int i = 0; i < 4; ++i)
                        sums[n] += (Unsigned ? uint8_t(x[i]) - 128 : int32_t(x[i])) * int32_t(y[4 * n + i]);
            }
            const float scale = rows.scales[r * blocks + b];
            for (int n = 0; n < kColumns; ++n) total[n] += float(sums[n]) * (scale * panel.scales[b * kColumns + n]);
        }
        std::memcpy(out + r * stride, total, sizeof total);
    }
}

// How many of `left` rows to multiply at once, at most `most`. The last rows are split into similar parts, because a loop
// over few rows is limited by the latency of the dot products.
MOLMO_INLINE int64_t next_rows(int64_t left, int64_t most) {
    return left >= 2 * most || left == most ? most : left > most ? (left + 1) / 2 : left;
}

}  // namespace molmo
