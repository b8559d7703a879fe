// Products of blocks of 16 x 32 or 32 x 32 numbers, on which attention and eight-bit layers are built.
//
// A tile has 16 rows of 64 bytes. Rows of the left matrix lie in tiles [rows / 16, steps], each with 64 int8 or 32
// bfloat16 of 16 rows; a step is such a width. The columns of the right matrix lie in panels of 16: tiles
// [columns / 16, steps], in which four int8 or two bfloat16 of one column follow each other: [16, 16 columns, 4 or 2].
#pragma once

#include <cstdint>

namespace molmo {

constexpr int64_t kTileBytes = 1024, kStepBytes = 64;

// `count` (1 to 32) rows times two panels.
struct Int8Product {
    const int8_t *rows, *panels;
    int64_t steps, depth, count;  // of `depth` steps of a row, `steps` are computed
    const int32_t* starts;  // [32], what the sums begin at (0 without Kernel::unsigned_rows); null: at what is in `out`
    const int8_t* next;     // panels to be multiplied soon: of each of their tiles, each eight rows request one line more
};

// One set of instructions.
struct Tiles {
    void (*begin)();  // before the products of a thread
    void (*end)();
    // -> out [count, 32], with room for whole tiles.
    void (*int8)(const Int8Product& product, int32_t* out);
    // `blocks` (1 or 2) tiles of rows in bfloat16 with sums in float32, which begin at 0: out [16 * blocks, stride]. Null:
    // not on this processor.
    void (*bfloat16)(const uint16_t* rows, const uint16_t* panels, int64_t steps, int64_t depth, int64_t blocks,
                     float* out, int64_t stride);
};

}  // namespace molmo
