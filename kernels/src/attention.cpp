// Attention on tiles of bfloat16: 32 queries at a time against all keys of a head.
#include "vision.h"

#ifdef MOLMO_BFLOAT16
#include "attention_avx512.h"
#endif

namespace molmo {

#ifdef MOLMO_BFLOAT16
namespace {

constexpr int64_t kQueries = 32, kUnit = 32;  // keys and widths are padded to a multiple

struct Scratch {  // of a thread
    Buffer<uint16_t> keys, values, queries, weights;
    Buffer<float> scores, sums, result;
};

thread_local Scratch scratch;

}  // namespace

void attention(const Kernel& kernel, const Parallel& parallel, const Heads& h, float* out) {
    const Tiles& tiles = *kernel.tiles;
    const int64_t keys = up(h.keys, kUnit), width = up(h.width, kUnit), stride = h.count * h.width;
    each(parallel, h.batch * h.count, [&](int64_t task) {
        const int64_t item = task / h.count, column = task % h.count * h.width;
        Scratch& own = scratch;
        own.keys.grow(keys * width), own.values.grow(keys * width);
        own.queries.grow(kQueries * width), own.weights.grow(kQueries * keys);
        own.scores.grow(kQueries * keys), own.sums.grow(kQueries), own.result.grow(kQueries * width);
        avx512::pack_rows(h.k + item * h.keys * stride + column, stride, h.keys, keys, h.width, width, own.keys.data());
        avx512::pack_columns(h.v + item * h.keys * stride + column, stride, h.keys, keys, h.width, width,
                             own.values.data());
        tiles.begin();
        for (int64_t first = 0; first < h.queries; first += kQueries) {
            const int64_t count = h.queries - first < kQueries ? h.queries - first : kQueries;
            const int64_t blocks = (count + kTile - 1) / kTile, at = (item * h.queries + first) * stride + column;
            avx512::round_to_tiles(h.q + at, stride, count, h.width, width, own.queries.data());
            for (int64_t key = 0; key < keys; key += 32)
                tiles.bfloat16(own.queries.data(), own.keys.data() + key * width, width / 32, width / 32, blocks,
                               own.scores.data() + key, keys);
            const float scale = 1.0f / std::sqrt(float(h.width));
            avx512::softmax({own.scores.data(), keys, count, h.keys, 0, scale, nullptr, 0}, own.weights.data(),
                            own.sums.data());
            for (int64_t c = 0; c < width; c += 32)
                tiles.bfloat16(own.weights.data(), own.values.data() + c * keys, keys / 32, keys / 32, blocks,
                               own.result.data() + c, width);
            avx512::divide(own.result.data(), width, count, h.width, own.sums.data(), out + at, stride);
        }
        tiles.end();
    });
}
#else
void attention(const Kernel&, const Parallel&, const Heads&, float*) {}  // no kernel has Tiles::bfloat16
#endif

}  // namespace molmo
