// AMX: products of tiles of 16 outputs and 16 columns of x.

#pragma once

#include "common.h"
#include "rows.h"

namespace qwen2vl {

#if X86

TARGET_AVX512 inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// A tile of the second operand: row r holds 4 bytes of each of 16 columns, those of inputs 4 r to
// 4 r + 3 of int8, 2 r and 2 r + 1 of bf16.
TARGET_AVX512 void pack_tiles(const Rows& x, int64_t block) {
    int64_t chunks = x.stride / kChunk;
    for (int64_t k = 0; k < chunks; k++) {
        __m512i v[16];
        for (int c = 0; c < kTile; c++) {
            int64_t column = block * kTile + c;
            v[c] = column < x.columns ? _mm512_loadu_si512(x.bytes + column * x.stride + k * kChunk)
                                      : _mm512_setzero_si512();
        }
        transpose(v);
        uint8_t* tile = x.tiles + (block * chunks + k) * kTile * kChunk;
        for (int r = 0; r < kTile; r++) _mm512_storeu_si512(tile + r * kChunk, v[r]);
    }
}

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// The tile registers belong to the thread; what oneDNN has configured is restored. As inline
// assembly, since the intrinsics of GCC 12 do not tell the compiler that all 64 bytes are read.
class TileScope {
  public:
    TileScope() {
        __asm__ volatile("sttilecfg %0" : "=m"(saved_));
        TileConfig config{};
        config.palette = 1;
        std::fill_n(config.row_bytes, 8, uint16_t(kChunk));
        std::fill_n(config.rows, 8, uint8_t(kTile));
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    ~TileScope() {
        if (saved_.palette)
            __asm__ volatile("ldtilecfg %0" : : "m"(saved_));
        else
            __asm__ volatile("tilerelease");
    }

  private:
    TileConfig saved_;
};

struct Tiles {
    const uint8_t* w;        // first of 16 or 32 rows of W
    int64_t stride, chunks;  // bytes of such a row; chunks to multiply
    const uint8_t* x[2];     // tiles of one or two blocks of columns
    int row_tiles, column_tiles;
    bool accumulates;        // adds to `out`
    int32_t* out;            // tiles (2, 2) of 16 outputs x 16 columns; floats of bf16
};

template <bool IsInt>
TARGET_AMX void multiply_tiles(const Tiles& t) {
#define MULTIPLY(c, a, b)        \
    if constexpr (IsInt)         \
        _tile_dpbssd(c, a, b);   \
    else                         \
        _tile_dpbf16ps(c, a, b)
    constexpr int64_t kSize = kTile * kTile;
    const uint8_t* lower = t.w + kTile * t.stride;
    if (t.accumulates) {
        _tile_loadd(0, t.out, kChunk);
        _tile_loadd(1, t.out + kSize, kChunk);
        _tile_loadd(2, t.out + 2 * kSize, kChunk);
        _tile_loadd(3, t.out + 3 * kSize, kChunk);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < t.chunks; k++) {
        int64_t at = k * kChunk, tile = k * kTile * kChunk;
        _tile_loadd(4, t.w + at, t.stride);
        _tile_loadd(6, t.x[0] + tile, kChunk);
        MULTIPLY(0, 4, 6);
        if (t.row_tiles == 2) {
            _tile_loadd(5, lower + at, t.stride);
            MULTIPLY(2, 5, 6);
        }
        if (t.column_tiles == 2) {
            _tile_loadd(7, t.x[1] + tile, kChunk);
            MULTIPLY(1, 4, 7);
            if (t.row_tiles == 2) {
                MULTIPLY(3, 5, 7);
            }
        }
    }
    _tile_stored(0, t.out, kChunk);
    _tile_stored(1, t.out + kSize, kChunk);
    _tile_stored(2, t.out + 2 * kSize, kChunk);
    _tile_stored(3, t.out + 3 * kSize, kChunk);
#undef MULTIPLY
}

#endif

}  // namespace qwen2vl
