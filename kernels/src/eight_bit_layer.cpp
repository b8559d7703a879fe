// Layers with eight-bit weights: one scale per row of the input and one per output column.
#include <algorithm>
#include <cstring>

#include "vision.h"

#ifdef MOLMO_X86
#include "vision_avx512.h"
#endif

namespace molmo {
namespace {

constexpr int64_t kPair = 2 * kColumns;      // columns of a product
constexpr int64_t kRowsPerTask = 128;
constexpr int64_t kWeightsPerTask = 1 << 20;  // half of a second-level cache
constexpr int64_t kSteps = 16;                // at a time: a panel of them stays in the first-level cache

}  // namespace

EightBitLayer::EightBitLayer(const int8_t* weights, const float* scales, const float* bias, int64_t inner,
                             int64_t columns)
    : inner_(inner), columns_(columns), steps_(RoundedRows::steps(inner)) {
    panels_.grow(steps_ * kStepBytes * columns), starts_.grow(columns), scales_.grow(columns);
    std::memcpy(scales_.data(), scales, size_t(columns) * sizeof(float));
    if (bias != nullptr) std::memcpy(bias_.grow(columns), bias, size_t(columns) * sizeof(float));
    std::memset(starts_.data(), 0, size_t(columns) * sizeof(int32_t));
    const int64_t quads = steps_ * kStepBytes / 4;
    for (int64_t panel = 0; panel < columns / kColumns; ++panel) {
        int32_t* start = starts_.data() + panel * kColumns;
        for (int64_t quad = 0; quad < quads; ++quad) {
            int8_t* to = panels_.data() + (panel * quads + quad) * 4 * kColumns;
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t k = 4 * quad + i;
                const int8_t* from = weights + k * columns + panel * kColumns;
                for (int64_t c = 0; c < kColumns; ++c) {
                    to[4 * c + i] = k < inner ? from[c] : int8_t(0);
                    start[c] -= k < inner ? 128 * from[c] : 0;
                }
            }
        }
    }
}

#ifdef MOLMO_X86
void round_rows(const Kernel& kernel, const Parallel& parallel, const float* x, const RoundedRows& rows) {
    const int64_t block = RoundedRows::steps(rows.inner) * kTileBytes;
    each(parallel, up(rows.count, kTile) / kTile, [&](int64_t task) {
        const int64_t first = task * kTile, count = rows.count - first < kTile ? rows.count - first : kTile;
        avx512::round_tile(x + first * rows.inner, count, rows.inner, kernel.unsigned_rows,
                           rows.values + task * block, rows.scales + first);
    });
}

void EightBitLayer::multiply(const Kernel& kernel, const Parallel& parallel, const RoundedRows& rows,
                             Activation activation, const float* residual, float* out) const {
    const int64_t depth = steps_ * kStepBytes, fitting = kWeightsPerTask / depth / kPair * kPair;
    const int64_t width = fitting < kPair ? kPair : fitting > columns_ ? columns_ : fitting;
    const int64_t groups = (columns_ + width - 1) / width, chunks = (rows.count + kRowsPerTask - 1) / kRowsPerTask;
    const Tiles& tiles = *kernel.tiles;
    // Consecutive tasks share their weights.
    each(parallel, groups * chunks, [&](int64_t task) {
        const int64_t first = task % chunks * kRowsPerTask, column = task / chunks * width;
        const int64_t last = first + kRowsPerTask < rows.count ? first + kRowsPerTask : rows.count;
        const int64_t end = column + width < columns_ ? column + width : columns_;
        alignas(64) int32_t sums[kRowsPerTask * kPair];
        tiles.begin();
        for (int64_t c = column; c < end; c += kPair) {
            const int8_t* panels = panels_.data() + c * depth;
            for (int64_t step = 0; step < steps_; step += kSteps) {
                const int64_t some = std::min(kSteps, steps_ - step);
                const int8_t* next = panels + (step + some) * kTileBytes;
                if (step + some == steps_) next = c + kPair < end ? panels + kPair * depth : panels;
                for (int64_t r = first; r < last; r += 2 * kTile)
                    tiles.int8({rows.values + r * depth + step * kTileBytes, panels + step * kTileBytes, some, steps_,
                                std::min<int64_t>(2 * kTile, last - r), step == 0 ? starts_.data() + c : nullptr,
                                next + (r - first) / 8 * kStepBytes},
                               sums + (r - first) * kPair);
            }
            const float* bias = bias_.data() == nullptr ? nullptr : bias_.data() + c;
            const int64_t at = first * columns_ + c;
            const float* added = residual == nullptr ? nullptr : residual + at;
            avx512::finish(sums, last - first, {scales_.data() + c, bias, rows.scales + first, added, columns_},
                           activation, out + at);
        }
        tiles.end();
    });
}
#else
void round_rows(const Kernel&, const Parallel&, const float*, const RoundedRows&) {}  // no kernel has tiles
void EightBitLayer::multiply(const Kernel&, const Parallel&, const RoundedRows&, Activation, const float*,
                             float*) const {}
#endif

}  // namespace molmo
