// Attention of vision towers: every query attends to all keys.
#include "attention_tiles.h"
#include "vision.h"

namespace molmo {

#ifdef MOLMO_BFLOAT16
namespace {

thread_local HeadTiles head_tiles;

}  // namespace

void attention(const Kernel& kernel, const Parallel& parallel, const Heads& h, float* out) {
    const Tiles& tiles = *kernel.tiles;
    const int64_t stride = h.count * h.width;
    const float scale = 1.0f / std::sqrt(float(h.width));
    each(parallel, h.batch * h.count, [&](int64_t task) {
        const int64_t item = task / h.count, column = task % h.count * h.width, cache = item * h.keys * stride + column;
        HeadTiles& head = head_tiles;
        head.pack(h.k + cache, h.v + cache, stride, h.keys, h.width);
        tiles.begin();
        for (int64_t first = 0; first < h.queries; first += kQueries) {
            const int64_t at = (item * h.queries + first) * stride + column;
            const avx512::Scores all = {nullptr, 0, std::min(kQueries, h.queries - first), h.keys, 0, scale, nullptr, 0};
            head.attend(tiles, h.q + at, stride, all, out + at, stride);
        }
        tiles.end();
    });
}
#else
void attention(const Kernel&, const Parallel&, const Heads&, float*) {}  // no kernel has Tiles::bfloat16
#endif

}  // namespace molmo
