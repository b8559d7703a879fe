#include "cached_attention.h"

#include <algorithm>
#include <cstring>

#ifdef MOLMO_BFLOAT16
#include "attention_avx512.h"
#endif

namespace molmo {

#ifdef MOLMO_BFLOAT16
namespace {

constexpr int64_t kQueries = 32, kUnit = 32;  // positions and widths are padded to a multiple
constexpr int64_t kRowsPerTask = 8 * kQueries;

struct Scratch {  // of a thread
    Buffer<uint16_t> keys, values, queries, weights;
    Buffer<float> rotated, scores, sums, result;
};

thread_local Scratch scratch;

// The query of a row and a head, rotated.
void query(const Cached& a, int64_t row, int64_t head, float* out) {
    const int64_t half = a.width / 2, at = (a.past + row) * half;
    avx512::rotate(a.q + (row * a.heads + head) * a.width, a.cos + at, a.sin + at, half, out);
}

void append(const Parallel& parallel, const Cached& a) {
    each(parallel, a.kv_heads, [&](int64_t head) {
        const int64_t half = a.width / 2;
        for (int64_t r = 0; r < a.rows; ++r) {
            const int64_t from = (r * a.kv_heads + head) * a.width, position = a.past + r;
            const int64_t to = (head * a.capacity + position) * a.width;
            avx512::rotate(a.k + from, a.cos + position * half, a.sin + position * half, half, a.keys + to);
            std::memcpy(a.values + to, a.v + from, size_t(a.width) * sizeof(float));
        }
    });
}

void single_rows(const Parallel& parallel, const Cached& a, float* out) {
    const int64_t total = a.past + a.rows, group = a.heads / a.kv_heads;
    each(parallel, a.heads, [&](int64_t head) {
        Scratch& own = scratch;
        float *rotated = own.rotated.grow(a.width), *weights = own.scores.grow(total);
        const int64_t cache = head / group * a.capacity * a.width;
        for (int64_t r = 0; r < a.rows; ++r) {
            query(a, r, head, rotated);
            avx512::attend(rotated, a.keys + cache, a.values + cache, a.bias == nullptr ? a.past + r + 1 : total,
                           a.width, a.scale, a.bias == nullptr ? nullptr : a.bias + r * total, weights,
                           out + (r * a.heads + head) * a.width);
        }
    });
}

// A task computes some rows for the heads that share keys and values. It packs the keys and values that its rows attend
// to.
void tiles_of_rows(const Kernel& kernel, const Parallel& parallel, const Cached& a, float* out) {
    const Tiles& tiles = *kernel.tiles;
    const int64_t total = a.past + a.rows, group = a.heads / a.kv_heads, stride = a.heads * a.width;
    const int64_t width = up(a.width, kUnit), parts = (a.rows + kRowsPerTask - 1) / kRowsPerTask;
    each(parallel, a.kv_heads * parts, [&](int64_t task) {
        // The last rows first: without a bias they attend to the most keys.
        const int64_t kv_head = task % a.kv_heads, part = parts - 1 - task / a.kv_heads;
        const int64_t begin = part * kRowsPerTask, end = std::min(begin + kRowsPerTask, a.rows);
        const int64_t seen = a.bias == nullptr ? a.past + end : total, keys = up(seen, kUnit);
        const int64_t cache = kv_head * a.capacity * a.width;
        Scratch& own = scratch;
        own.keys.grow(keys * width), own.values.grow(keys * width), own.weights.grow(kQueries * keys);
        own.scores.grow(kQueries * keys), own.rotated.grow(kQueries * a.width), own.queries.grow(kQueries * width);
        own.sums.grow(kQueries), own.result.grow(kQueries * width);
        avx512::pack_rows(a.keys + cache, a.width, seen, keys, a.width, width, own.keys.data());
        avx512::pack_columns(a.values + cache, a.width, seen, keys, a.width, width, own.values.data());
        tiles.begin();
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (int64_t first = begin; first < end; first += kQueries) {
                const int64_t count = std::min(kQueries, end - first), blocks = (count + kTile - 1) / kTile;
                for (int64_t r = 0; r < count; ++r) query(a, first + r, head, own.rotated.data() + r * a.width);
                avx512::round_to_tiles(own.rotated.data(), a.width, count, a.width, width, own.queries.data());
                avx512::Scores scores = {own.scores.data(), keys, count, total, 0, a.scale, nullptr, total};
                if (a.bias == nullptr)
                    scores.keys = a.past + first + 1, scores.more = 1;
                else
                    scores.bias = a.bias + first * total;
                const int64_t visible = up(scores.last(), kUnit);
                for (int64_t key = 0; key < visible; key += 32)
                    tiles.bfloat16(own.queries.data(), own.keys.data() + key * width, width / 32, width / 32, blocks,
                                   own.scores.data() + key, keys);
                avx512::softmax(scores, own.weights.data(), own.sums.data());
                for (int64_t c = 0; c < width; c += 32)
                    tiles.bfloat16(own.weights.data(), own.values.data() + c * keys, visible / 32, keys / 32, blocks,
                                   own.result.data() + c, width);
                avx512::divide(own.result.data(), width, count, a.width, own.sums.data(),
                               out + first * stride + head * a.width, stride);
            }
        tiles.end();
    });
}

}  // namespace

void cached_attention(const Kernel& kernel, const Parallel& parallel, const Cached& attention, float* out) {
    append(parallel, attention);
    if (attention.rows <= kSingleRows)
        single_rows(parallel, attention, out);
    else
        tiles_of_rows(kernel, parallel, attention, out);
}
#else
void cached_attention(const Kernel&, const Parallel&, const Cached&, float*) {}  // no kernel has Tiles::bfloat16
#endif

}  // namespace molmo
