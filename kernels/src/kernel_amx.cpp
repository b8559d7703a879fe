// AMX: tiles of 16 x 16 sums of products of bytes. Intel Xeon from Sapphire Rapids.
#include "kernels.h"

#ifdef MOLMO_AMX
#include "kernel_avx512.h"

namespace molmo {
namespace {

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Inline assembly instead of GCC's intrinsics, which let the compiler move stores past the loads of tiles.
#define TILE_LOAD(tile, base, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(tile, base, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(int64_t(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory")
#define TILE_DOT(sums, rows, weights) \
    __asm__ volatile("tdpbssd %%tmm" #weights ", %%tmm" #rows ", %%tmm" #sums ::: "memory")

// The sums of one block in tile `tile`, and from there in `sums`.
#define BLOCK(tile, rows, weights, sums)                                             \
    TILE_ZERO(tile);                                                                 \
    for (int64_t k = 0; k < block; k += step) {                                      \
        TILE_LOAD(rows, x + k, inner);                                               \
        TILE_LOAD(weights, w + k * kColumns, 4 * kColumns);                          \
        TILE_DOT(tile, rows, weights);                                               \
    }                                                                                \
    TILE_STORE(tile, sums, 64);                                                      \
    x += block;                                                                      \
    w += block * kColumns;

MOLMO_AVX512 MOLMO_INLINE void add_block(const int32_t* sums, const float* row_scales, int64_t blocks,
                                         const float* column_scales, __m512 total[kTile]) {
    const __m512 scale = _mm512_loadu_ps(column_scales);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(row_scales[r * blocks]));
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kColumns)), both, total[r]);
    }
}

MOLMO_AVX512 MOLMO_INLINE void multiply_tile(const int8_t* x, const float* row_scales, const Panel& panel,
                                             int64_t inner, int64_t block, int64_t step, int64_t count, float* out,
                                             int64_t stride) {
    alignas(64) int32_t sums[2][kTile * kColumns];
    const int64_t blocks = inner / block;
    __m512 total[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) total[r] = _mm512_setzero_ps();
    const int8_t* w = panel.weights;
    // The sums of a block are scaled while the tiles work on the next one.
    BLOCK(0, 4, 6, sums[0]);
    int64_t b = 1;
    for (; b + 2 <= blocks; b += 2) {
        BLOCK(1, 5, 7, sums[1]);
        add_block(sums[0], row_scales + b - 1, blocks, panel.scales + (b - 1) * kColumns, total);
        BLOCK(0, 4, 6, sums[0]);
        add_block(sums[1], row_scales + b, blocks, panel.scales + b * kColumns, total);
    }
    if (b < blocks) {
        BLOCK(1, 5, 7, sums[1]);
        add_block(sums[0], row_scales + b - 1, blocks, panel.scales + (b - 1) * kColumns, total);
        add_block(sums[1], row_scales + b, blocks, panel.scales + b * kColumns, total);
    } else {
        add_block(sums[0], row_scales + b - 1, blocks, panel.scales + (b - 1) * kColumns, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
        if (r < count) _mm512_storeu_ps(out + r * stride, total[r]);
}

MOLMO_AVX512 void multiply(const Rows& rows, const Panel& panel, int64_t inner, int64_t block, float* out,
                           int64_t stride) {
    const int64_t step = block % 64 == 0 ? 64 : 32, blocks = inner / block;
    Configuration shape;
    for (int tile = 0; tile < 8; ++tile) {
        shape.rows[tile] = uint8_t(tile < 6 ? kTile : step / 4);
        shape.bytes[tile] = uint16_t(tile == 4 || tile == 5 ? step : 64);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
    for (int64_t r = 0; r < rows.count; r += kTile)
        multiply_tile(rows.values + r * inner, rows.scales + r * blocks, panel, inner, block, step, rows.count - r,
                      out + r * stride, stride);
    __asm__ volatile("tilerelease" ::: "memory");
}

#define TILE_DOT_BF16(sums, rows, panels) \
    __asm__ volatile("tdpbf16ps %%tmm" #panels ", %%tmm" #rows ", %%tmm" #sums ::: "memory")

// 32 rows times 32 columns in four tiles of sums, or 16 rows in two.
#define BLOCKS(DOT, depth, first)                                                            \
    const uint8_t *second = rows + depth * kTileBytes, *right = panels + depth * kTileBytes; \
    if (first) {                                                                             \
        TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);                              \
    } else {                                                                                 \
        TILE_LOAD(0, to, stride); TILE_LOAD(1, to + 64, stride);                             \
        if (blocks == 2) {                                                                   \
            TILE_LOAD(2, to + kTile * stride, stride);                                       \
            TILE_LOAD(3, to + kTile * stride + 64, stride);                                  \
        }                                                                                    \
    }                                                                                        \
    if (blocks == 2) {                                                                       \
        for (int64_t at = 0; at < steps * kTileBytes; at += kTileBytes) {                    \
            TILE_LOAD(4, rows + at, kStepBytes);                                             \
            TILE_LOAD(6, panels + at, kStepBytes);                                           \
            TILE_LOAD(7, right + at, kStepBytes);                                            \
            TILE_LOAD(5, second + at, kStepBytes);                                           \
            DOT(0, 4, 6); DOT(1, 4, 7); DOT(2, 5, 6); DOT(3, 5, 7);                          \
        }                                                                                    \
        TILE_STORE(2, to + kTile * stride, stride);                                          \
        TILE_STORE(3, to + kTile * stride + 64, stride);                                     \
    } else {                                                                                 \
        for (int64_t at = 0; at < steps * kTileBytes; at += kTileBytes) {                    \
            TILE_LOAD(4, rows + at, kStepBytes);                                             \
            TILE_LOAD(6, panels + at, kStepBytes);                                           \
            TILE_LOAD(7, right + at, kStepBytes);                                            \
            DOT(0, 4, 6); DOT(1, 4, 7);                                                      \
        }                                                                                    \
    }                                                                                        \
    TILE_STORE(0, to, stride);                                                               \
    TILE_STORE(1, to + 64, stride)

void begin() {
    Configuration shape;
    for (int tile = 0; tile < 8; ++tile) shape.rows[tile] = kTile, shape.bytes[tile] = kStepBytes;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}

void end() { __asm__ volatile("tilerelease" ::: "memory"); }

void int8_tiles(const Int8Product& p, int32_t* out) {
    const uint8_t *rows = reinterpret_cast<const uint8_t*>(p.rows), *panels = reinterpret_cast<const uint8_t*>(p.panels);
    uint8_t* to = reinterpret_cast<uint8_t*>(out);
    const int64_t stride = 2 * kColumns * 4, steps = p.steps, blocks = p.count <= kTile ? 1 : 2;
    BLOCKS(TILE_DOT, p.depth, p.starts != nullptr);
}

void bfloat16_tiles(const uint16_t* x, const uint16_t* w, int64_t steps, int64_t depth, int64_t blocks, float* out,
                    int64_t columns) {
    const uint8_t *rows = reinterpret_cast<const uint8_t*>(x), *panels = reinterpret_cast<const uint8_t*>(w);
    uint8_t* to = reinterpret_cast<uint8_t*>(out);
    const int64_t stride = columns * 4;
    BLOCKS(TILE_DOT_BF16, depth, true);
}

const Tiles kAmxTiles = {begin, end, int8_tiles, bfloat16_tiles};

}  // namespace

const Kernel kAmx = {"amx",    false,
                     avx512::round_row_signed, avx512::unpack,
                     multiply, avx512::dot_signed,
                     avx512::swiglu, &kAmxTiles};

}  // namespace molmo
#endif
