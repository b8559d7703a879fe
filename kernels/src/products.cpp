#include "products.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "read_ahead.h"

namespace molmo {
namespace {

constexpr int64_t kDotRows = 2;       // up to so many rows a product reads the codes once per row
constexpr int64_t kChunk = 256;       // rows that share an unpacked panel before the next one
constexpr int64_t kPanelsPerTask = 8;

int64_t with_padding(int64_t rows) { return rows <= kDotRows ? rows : up(rows, kTile); }

struct Unpacked {  // one panel; a thread keeps its memory
    Buffer<int8_t> weights;
    Buffer<float> scales;
    Buffer<int32_t> starts;

    Panel fill(const Kernel& kernel, const Matrix& m, int64_t column) {
        const int64_t blocks = m.blocks() * kColumns;
        weights.grow(m.inner * kColumns), scales.grow(blocks), starts.grow(blocks);
        kernel.unpack(m, column, weights.data(), scales.data(), starts.data());
        return {weights.data(), scales.data(), starts.data()};
    }
};

thread_local Unpacked panel_memory;
thread_local Buffer<float> result_memory;

Matrix expert(const Matrix& first, int64_t e) {
    Matrix m = first;
    m.codes += e * m.columns * m.inner / 2;
    m.scales = static_cast<const uint8_t*>(m.scales) + e * m.columns * m.blocks() * (m.half_scales ? 2 : 4);
    if (m.zero_points != nullptr) m.zero_points += e * m.columns * ((m.blocks() + 1) / 2);
    return m;
}

// Columns of a matrix times all rows of `rows`, into out [rows.count, stride].
void columns(const Kernel& kernel, const Rows& rows, const Matrix& m, int64_t column, int64_t count, float* out,
             int64_t stride) {
    const int64_t blocks = m.blocks();
    if (rows.count <= kDotRows) {
        for (int64_t r = 0; r < rows.count; ++r)
            kernel.dot(m, column, count, rows.values + r * m.inner, rows.scales + r * blocks, out + r * stride);
        return;
    }
    for (int64_t c = 0; c < count; c += kColumns) {
        const Panel panel = panel_memory.fill(kernel, m, column + c);
        kernel.multiply(rows, panel, m.inner, m.block, out + c, stride);
    }
}

}  // namespace

void multiply(const Kernel& kernel, const Parallel& parallel, const float* x, int64_t count, const Matrix& m,
              float* out) {
    if (reads_from_disk()) request(m);
    const int64_t blocks = m.blocks(), padded = with_padding(count);
    Buffer<int8_t> values(padded * m.inner);
    Buffer<float> scales(padded * blocks);
    each(parallel, (count + 15) / 16, [&](int64_t task) {
        for (int64_t r = task * 16; r < std::min(count, task * 16 + 16); ++r)
            kernel.round_row(x + r * m.inner, m.inner, m.block, values.data() + r * m.inner, scales.data() + r * blocks);
    });
    std::memset(values.data() + count * m.inner, 0, size_t((padded - count) * m.inner));
    std::memset(scales.data() + count * blocks, 0, size_t((padded - count) * blocks) * sizeof(float));
    const int64_t chunks = (count + kChunk - 1) / kChunk, width = kColumns * kPanelsPerTask;
    const int64_t groups = (m.columns + width - 1) / width;
    each(parallel, chunks * groups, [&](int64_t task) {
        const int64_t row = task / groups * kChunk, column = task % groups * width;
        const Rows rows = {values.data() + row * m.inner, scales.data() + row * blocks, std::min(kChunk, count - row)};
        columns(kernel, rows, m, column, std::min(width, m.columns - column), out + row * m.columns + column, m.columns);
    });
}

void experts(const Kernel& kernel, const Parallel& parallel, const float* x, int64_t count, const float* probabilities,
             const float* weights, const Experts& layer, float* out) {
    const Matrix &first = layer.first, &second = layer.second;
    const int64_t n = layer.count, k = layer.chosen, d = first.inner, f = second.inner;
    const int64_t blocks_1 = first.blocks(), blocks_2 = second.blocks();

    // The rows of each expert are consecutive, and start at a multiple of kTile: slots.
    std::vector<int32_t> picked(size_t(count * k));
    std::vector<int64_t> begin(size_t(n) + 1, 0), rows_of(size_t(n), 0);
    each(parallel, (count + 31) / 32, [&](int64_t task) {
        std::vector<int32_t> order{};
        order.resize(size_t(n));
        for (int64_t r = task * 32; r < std::min(count, task * 32 + 32); ++r) {
            const float* p = probabilities + r * n;
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + k, order.end(),
                              [p](int32_t a, int32_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
            std::copy(order.begin(), order.begin() + k, picked.begin() + r * k);
        }
    });
    for (const int32_t e : picked) ++rows_of[size_t(e)];
    for (int64_t e = 0; e < n; ++e) begin[size_t(e) + 1] = begin[size_t(e)] + with_padding(rows_of[size_t(e)]);
    const int64_t slots = begin[size_t(n)];
    std::vector<int32_t> row_of(size_t(slots), -1);  // -1: padding
    std::vector<float> share(size_t(slots), 0.0f);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < k; ++i) {
            const int64_t e = picked[size_t(r * k + i)], slot = next[size_t(e)]++;
            row_of[size_t(slot)] = int32_t(r);
            share[size_t(slot)] = weights[r * n + e];
        }

    // Rows are rounded once and copied to each of their experts.
    Buffer<int8_t> rounded(count * d), values_1(slots * d), values_2(slots * f);
    Buffer<float> rounded_scales(count * blocks_1), scales_1(slots * blocks_1), scales_2(slots * blocks_2);
    each(parallel, (count + 15) / 16, [&](int64_t task) {
        for (int64_t r = task * 16; r < std::min(count, task * 16 + 16); ++r)
            kernel.round_row(x + r * d, d, first.block, rounded.data() + r * d, rounded_scales.data() + r * blocks_1);
    });
    std::vector<int64_t> used;
    for (int64_t e = 0; e < n; ++e)
        if (rows_of[size_t(e)] != 0) used.push_back(e);
    if (reads_from_disk()) {
        for (const int64_t e : used) request(expert(first, e));
        for (const int64_t e : used) request(expert(second, e));
    }
    const int64_t copies = count <= kDotRows ? 1 : int64_t(used.size());  // a few rows are not worth waking threads
    each(parallel, copies, [&](int64_t task) {
        const int64_t e = used[size_t(task)], end = copies == 1 ? slots : begin[size_t(e) + 1];
        for (int64_t slot = begin[size_t(e)]; slot < end; ++slot) {
            const int64_t r = row_of[size_t(slot)];
            if (r >= 0) {
                std::memcpy(values_1.data() + slot * d, rounded.data() + r * d, size_t(d));
                std::memcpy(scales_1.data() + slot * blocks_1, rounded_scales.data() + r * blocks_1,
                            size_t(blocks_1) * sizeof(float));
            } else {
                std::memset(values_1.data() + slot * d, 0, size_t(d));
                std::memset(scales_1.data() + slot * blocks_1, 0, size_t(blocks_1) * sizeof(float));
                std::memset(values_2.data() + slot * f, 0, size_t(f));
                std::memset(scales_2.data() + slot * blocks_2, 0, size_t(blocks_2) * sizeof(float));
            }
        }
    });

    // Gate and up: a task is one block of the activations, which it rounds for the second product.
    const int64_t width = 2 * second.block;
    each(parallel, int64_t(used.size()) * blocks_2, [&](int64_t task) {
        const int64_t e = used[size_t(task / blocks_2)], b = task % blocks_2, slot = begin[size_t(e)];
        const int64_t own = rows_of[size_t(e)];
        float* both = result_memory.grow((own + 1) * width);
        const Rows rows = {values_1.data() + slot * d, scales_1.data() + slot * blocks_1, own};
        columns(kernel, rows, expert(first, e), b * width, width, both, width);
        float* hidden = both + own * width;
        for (int64_t r = 0; r < own; ++r) {
            kernel.swiglu(both + r * width, second.block, hidden);
            kernel.round_row(hidden, second.block, second.block, values_2.data() + (slot + r) * f + b * second.block,
                             scales_2.data() + (slot + r) * blocks_2 + b);
        }
    });

    // Down: a task owns some columns of the output, so the order of its sums never depends on the threads.
    const int64_t down = kColumns * std::max<int64_t>(1, std::min(kPanelsPerTask, second.columns / kColumns / 8));
    each(parallel, (second.columns + down - 1) / down, [&](int64_t task) {
        const int64_t column = task * down, some = std::min(down, second.columns - column);
        for (int64_t r = 0; r < count; ++r) std::memset(out + r * second.columns + column, 0, size_t(some) * sizeof(float));
        for (const int64_t e : used) {
            const int64_t slot = begin[size_t(e)], own = rows_of[size_t(e)];
            float* result = result_memory.grow(own * some);
            const Rows rows = {values_2.data() + slot * f, scales_2.data() + slot * blocks_2, own};
            columns(kernel, rows, expert(second, e), column, some, result, some);
            for (int64_t r = 0; r < own; ++r) {
                float* sum = out + row_of[size_t(slot + r)] * second.columns + column;
                const float weight = share[size_t(slot + r)];
                for (int64_t c = 0; c < some; ++c) sum[c] += weight * result[r * some + c];
            }
        }
    });
}

}  // namespace molmo
