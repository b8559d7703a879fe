#include "cached_attention.h"

#include <cstring>

#include "attention_tiles.h"

namespace molmo {

#ifdef MOLMO_BFLOAT16
namespace {

constexpr int64_t kRowsPerTask = 8 * kQueries;

struct Scratch {  // of a thread
    HeadTiles head;
    Buffer<float> rotated, weights;
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
        float *rotated = own.rotated.grow(a.width), *weights = own.weights.grow(total);
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
    const int64_t parts = (a.rows + kRowsPerTask - 1) / kRowsPerTask;
    each(parallel, a.kv_heads * parts, [&](int64_t task) {
        // The last rows first: without a bias they attend to the most keys.
        const int64_t kv_head = task % a.kv_heads, part = parts - 1 - task / a.kv_heads;
        const int64_t begin = part * kRowsPerTask, end = std::min(begin + kRowsPerTask, a.rows);
        const int64_t cache = kv_head * a.capacity * a.width;
        Scratch& own = scratch;
        own.head.pack(a.keys + cache, a.values + cache, a.width, a.bias == nullptr ? a.past + end : total, a.width);
        float* rotated = own.rotated.grow(kQueries * a.width);
        tiles.begin();
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (int64_t first = begin; first < end; first += kQueries) {
                const int64_t count = std::min(kQueries, end - first);
                for (int64_t r = 0; r < count; ++r) query(a, first + r, head, rotated + r * a.width);
                avx512::Scores visible = {nullptr, 0, count, total, 0, a.scale, nullptr, total};
                if (a.bias == nullptr)
                    visible.keys = a.past + first + 1, visible.more = 1;
                else
                    visible.bias = a.bias + first * total;
                own.head.attend(tiles, rotated, a.width, visible, out + first * stride + head * a.width, stride);
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
