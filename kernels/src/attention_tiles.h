// Attention on tiles of bfloat16: 32 queries at a time against the keys of a head.
#pragma once

#include "kernels.h"

#ifdef MOLMO_BFLOAT16
#include <algorithm>

#include "attention_avx512.h"

namespace molmo {

constexpr int64_t kQueries = 32;  // at a time

// The keys and values of one head, packed, and memory for the products of 32 queries with them. A thread keeps its own.
class HeadTiles {
public:
    // keys and values [count, width], whose rows are `stride` apart
    void pack(const float* keys, const float* values, int64_t stride, int64_t count, int64_t width) {
        constexpr int64_t kUnit = 32;  // counts and widths are padded to a multiple
        keys_count_ = up(count, kUnit), width_ = width, padded_ = up(width, kUnit);
        keys_.grow(keys_count_ * padded_), values_.grow(keys_count_ * padded_);
        queries_.grow(kQueries * padded_), weights_.grow(kQueries * keys_count_);
        scores_.grow(kQueries * keys_count_), sums_.grow(kQueries), result_.grow(kQueries * padded_);
        avx512::pack_rows(keys, stride, count, keys_count_, width, padded_, keys_.data());
        avx512::pack_columns(values, stride, count, keys_count_, width, padded_, values_.data());
    }

    // Queries [count, width] of `visible`, whose `values` and `stride` are set here -> out [count, width]. Between
    // tiles.begin() and tiles.end().
    void attend(const Tiles& tiles, const float* queries, int64_t query_stride, avx512::Scores visible, float* out,
                int64_t out_stride) const {
        const int64_t count = visible.rows, blocks = (count + kTile - 1) / kTile, seen = up(visible.last(), 32);
        visible.values = scores_.data(), visible.stride = keys_count_;
        avx512::round_to_tiles(queries, query_stride, count, width_, padded_, queries_.data());
        for (int64_t key = 0; key < seen; key += 32)
            tiles.bfloat16(queries_.data(), keys_.data() + key * padded_, padded_ / 32, padded_ / 32, blocks,
                           scores_.data() + key, keys_count_);
        avx512::softmax(visible, weights_.data(), sums_.data());
        for (int64_t c = 0; c < padded_; c += 32)
            tiles.bfloat16(weights_.data(), values_.data() + c * keys_count_, seen / 32, keys_count_ / 32, blocks,
                           result_.data() + c, padded_);
        avx512::divide(result_.data(), padded_, count, width_, sums_.data(), out, out_stride);
    }

private:
    Buffer<uint16_t> keys_, values_, queries_, weights_;
    Buffer<float> scores_, sums_, result_;
    int64_t keys_count_ = 0, width_ = 0, padded_ = 0;
};

}  // namespace molmo
#endif
