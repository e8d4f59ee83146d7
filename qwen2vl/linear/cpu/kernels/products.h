// y = x W^T + b: panels of outputs, shared by threads; each in blocks of outputs and columns of x.

#pragma once

#include <optional>
#include <vector>

#include "common.h"
#include "dots.h"
#include "int4.h"
#include "rows.h"
#include "threads.h"
#include "tiles.h"

namespace qwen2vl {

constexpr int64_t kPieceBytes = 1 << 16;   // of weights that a thread takes at once, for few rows
constexpr int64_t kMinParallel = 1 << 13;  // numbers of x that are worth a second thread

enum Kind { kBf16, kInt8, kInt4, kF32 };

struct Product {
    Isa isa;
    int threads;
    Kind kind;
    DType dtype;  // of x and y
    const void* x;
    const uint8_t* w;    // (O, I), but of int4
    Int4Weights int4;
    const float* scale;  // (O) of int8
    const float* bias;   // (O), or null
    void* y;
    int64_t T, I, O;
    int64_t y_stride;  // of a row of y, at least O

    bool is_float() const { return kind == kBf16 || kind == kF32; }
    int64_t row_bytes() const {
        return kind == kF32 ? 4 * I : kind == kBf16 ? 2 * I : kind == kInt8 ? I : I / 2;
    }
    // Of a row as it is multiplied; int4 is widened to int8, and padded.
    int64_t wide_bytes() const { return kind == kInt4 ? round_up(I, 2 * kChunk) : row_bytes(); }
};

constexpr int kBlock = 2 * kTile;             // outputs, and columns, computed together
constexpr int64_t kBlockNumbers = kBlock * kBlock;
constexpr int64_t kPanel = 4 * kBlock;        // outputs that a thread takes at once, at most
constexpr int64_t kMaxRows = 512;             // rows of x that are computed together

// Bytes of a row of W, and of a column of x, that are multiplied at once. A thread's second-level
// cache holds that of kPanel outputs and of kMaxRows columns, and their sums.
constexpr int64_t kDepth = 2048;

struct Block {  // of outputs and columns
    int64_t o, c;
    int outputs, columns;  // up to kBlock
    const uint8_t* w;      // `outputs` rows of W, int4 widened
    int64_t stride;
    const float* scale;    // of these outputs
    int32_t* out;          // tiles (2, 2) of 16 outputs x 16 columns

    int64_t index(int r, int c) const {
        return ((r / kTile * 2 + c / kTile) * kTile + r % kTile) * kTile + c % kTile;
    }
};

void fill_dots(const Product& p, const Rows& x, const Block& block, int first_output) {
    for (int r = first_output; r < block.outputs; r += kRows)
        for (int c = 0; c < block.columns; c += kColumns) {
            Dots dots;
            dots.bytes = p.wide_bytes();
            dots.columns = std::min(kColumns, block.columns - c);
            for (int i = 0; i < kRows; i++)
                dots.w[i] = block.w + std::min(r + i, block.outputs - 1) * block.stride;
            for (int i = 0; i < kColumns; i++) {
                int64_t column = block.c + std::min(c + i, block.columns - 1);
                dots.x[i] = reinterpret_cast<const uint8_t*>(x.bytes) + column * x.stride;
                dots.sums[i] = p.is_float() ? 0 : x.sums[column];
            }
            int32_t ints[kRows][kColumns];
            float floats[kRows][kColumns];
            if (p.kind == kF32)
                f32_dots(p.isa)(dots, floats);
            else if (p.kind == kBf16)
                bf16_dots(p.isa, dots.columns)(dots, floats);
            else
                int8_dots(p.isa, dots.columns)(dots, ints);
            const void* found = p.is_float() ? static_cast<void*>(floats) : ints;
            for (int i = 0; i < kRows && r + i < block.outputs; i++)
                for (int j = 0; j < dots.columns; j++)
                    std::memcpy(&block.out[block.index(r + i, c + j)],
                                static_cast<const int32_t*>(found) + i * kColumns + j, 4);
        }
}

// The order of operations is that of finish_avx512.
void finish(const Product& p, const Rows& x, const Block& block) {
    int rows = x.parts == 1 ? block.columns : int(x.num_rows);
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < block.outputs; r++) {
            int32_t total = block.out[block.index(r, t)];
            float value;
            if (p.is_float()) {
                std::memcpy(&value, &total, 4);
            } else {
                int64_t exact = total;
                if (x.parts == 2) exact = 256 * exact + block.out[block.index(r, t + rows)];
                value = float(exact) * (x.scales[block.c + t] * block.scale[r]);
            }
            if (p.bias) value += p.bias[block.o + r];
            store(p.y, (block.c + t) * p.y_stride + block.o + r, value, p.dtype);
        }
}

#if X86

TARGET_AVX512 void store_avx512(void* y, int64_t index, __mmask16 mask, __m512 v, DType dtype) {
    if (dtype == kFloat32) {
        _mm512_mask_storeu_ps(static_cast<float*>(y) + index, mask, v);
        return;
    }
    __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + index, mask,
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

// 256 * high + low of integers, rounded once.
TARGET_AVX512 inline __m512 join_parts(__m512i high, __m512i low) {
    __m256 halves[2];
    for (int i = 0; i < 2; i++) {
        __m512i h = _mm512_cvtepi32_epi64(i ? _mm512_extracti64x4_epi64(high, 1)
                                            : _mm512_castsi512_si256(high));
        __m512i l = _mm512_cvtepi32_epi64(i ? _mm512_extracti64x4_epi64(low, 1)
                                            : _mm512_castsi512_si256(low));
        halves[i] = _mm512_cvtepi64_ps(_mm512_add_epi64(_mm512_slli_epi64(h, 8), l));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(halves[0]), halves[1], 1);
}

TARGET_AVX512 void finish_avx512(const Product& p, const Rows& x, const Block& block) {
    int rows = x.parts == 1 ? block.columns : int(x.num_rows);
    for (int r = 0; r < block.outputs; r += kTile) {
        __mmask16 mask = __mmask16(first_bytes(std::min(kTile, block.outputs - r)));
        __m512 zeros = _mm512_setzero_ps();
        __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + block.o + r) : zeros;
        __m512 scale = block.scale ? _mm512_maskz_loadu_ps(mask, block.scale + r) : zeros;
        for (int c = 0; c < rows; c += kTile) {
            __m512i v[kTile];
            for (int i = 0; i < kTile; i++)
                v[i] = _mm512_load_si512(&block.out[block.index(r + i, c)]);
            transpose(v);
            for (int i = 0; i < std::min(kTile, rows - c); i++) {
                int64_t t = block.c + c + i;
                __m512 value = _mm512_castsi512_ps(v[i]);
                if (!p.is_float()) {
                    value = x.parts == 1 ? _mm512_cvtepi32_ps(v[i]) : join_parts(v[i], v[i + rows]);
                    value = _mm512_mul_ps(
                        value, _mm512_mul_ps(_mm512_set1_ps(x.scales[t]), scale));
                }
                if (p.bias) value = _mm512_add_ps(value, bias);
                store_avx512(p.y, t * p.y_stride + block.o + r, mask, value, p.dtype);
            }
        }
    }
}

#endif

#if X86

// The block's whole tiles, over `bytes` bytes of rows of W from `start`.
void multiply_block(const Rows& x, const Block& block, bool is_int, int64_t start, int64_t bytes) {
    int64_t column = x.stride * kTile;
    const uint8_t* first = x.tiles + block.c / kTile * column + start * kTile;
    Tiles tiles{block.w + start, block.stride, bytes / kChunk, {first, first + column},
                block.outputs / kTile, block.columns > kTile ? 2 : 1, start > 0, block.out};
    if (is_int)
        multiply_tiles<true>(tiles);
    else
        multiply_tiles<false>(tiles);
}

#endif

void finish_block(const Product& p, const Rows& x, const Block& block) {
    fill_dots(p, x, block, x.tiles ? block.outputs / kTile * kTile : 0);
#if X86
    if (p.isa >= kAvx512) return finish_avx512(p, x, block);
#endif
    finish(p, x, block);
}

float widen_int4(const Product& p, int64_t o, int8_t* out, int8_t* tables) {
#if X86
    if (p.isa >= kAvx512) return widen_int4_avx512(p.int4, o, out, tables);
    if (p.isa == kAvx2) return widen_int4_avx2(p.int4, o, out, tables);
#endif
    return widen_int4_portable(p.int4, o, out, tables);
}

// Widens int4 weights of outputs o0 to o1 into scratch memory, or returns them as they are.
const uint8_t* panel_weights(const Product& p, int64_t o0, int64_t o1, float* scales) {
    if (p.kind != kInt4) return p.w + o0 * p.row_bytes();
    int64_t table_bytes = 16 * (p.int4.num_groups + 4);
    auto* wide = reinterpret_cast<int8_t*>(scratch<1>(kPanel * p.wide_bytes() + table_bytes));
    int8_t* tables = wide + kPanel * p.wide_bytes();
    for (int64_t r = 0; r < o1 - o0; r++)
        scales[r] = widen_int4(p, o0 + r, wide + r * p.wide_bytes(), tables);
    return reinterpret_cast<uint8_t*>(wide);
}

// Outputs o0 to o1, at most kPanel.
void compute_panel(const Product& p, const Rows& x, int64_t o0, int64_t o1) {
    float scales[kPanel];
    const uint8_t* w = panel_weights(p, o0, o1, scales);
    const float* scale = p.kind == kInt4 ? scales : p.scale ? p.scale + o0 : nullptr;
    int64_t blocks = round_up(o1 - o0, kBlock) / kBlock * (round_up(x.columns, kBlock) / kBlock);
    auto* out = reinterpret_cast<int32_t*>(scratch<3>(4 * kBlockNumbers * blocks));
    int64_t bytes = p.wide_bytes(), depth = x.tiles && x.columns > kBlock ? kDepth : bytes;
#if X86
    std::optional<TileScope> scope;
    if (x.tiles) scope.emplace();
#endif
    for (int64_t start = 0; start < bytes; start += depth) {
        int64_t index = 0;
        for (int64_t c = 0; c < x.columns; c += kBlock)
            for (int64_t o = o0; o < o1; o += kBlock) {
                Block block{o, c, int(std::min<int64_t>(kBlock, o1 - o)),
                            int(std::min<int64_t>(kBlock, x.columns - c)),
                            w + (o - o0) * bytes, bytes, scale ? scale + (o - o0) : nullptr,
                            out + kBlockNumbers * index++};
#if X86
                if (x.tiles && block.outputs >= kTile)
                    multiply_block(x, block, !p.is_float(), start, std::min(depth, bytes - start));
#endif
                if (start + depth >= bytes) finish_block(p, x, block);
            }
    }
}

void quantize_row(const Product& p, const Rows& x, int64_t row) {
    bool is_split = p.kind == kInt4;
#if X86
    if (p.isa >= kAvx512) return quantize_row_avx512(p.x, p.dtype, x, row, is_split);
    if (p.isa == kAvx2) return quantize_row_avx2(p.x, p.dtype, x, row, is_split);
#endif
    quantize_row_portable(p.x, p.dtype, x, row, is_split);
}

// Copies a row of bf16 or float32, rounds one of float32 to bf16.
void copy_row(const Product& p, const Rows& x, int64_t row) {
    int64_t bytes = p.row_bytes();
    int8_t* column = x.bytes + row * x.stride;
    std::memset(column + bytes, 0, x.stride - bytes);
    if (p.kind == kF32 || p.dtype == kBfloat16) {
        std::memcpy(column, static_cast<const char*>(p.x) + row * bytes, bytes);
        return;
    }
    auto* source = static_cast<const float*>(p.x) + row * p.I;
    auto* target = reinterpret_cast<uint16_t*>(column);
    for (int64_t i = 0; i < p.I; i++) target[i] = to_bf16(source[i]);
}

// Rounds x, or copies it, into the caller's scratch memory, and puts it into tiles.
Rows prepare_rows(const Product& p, bool uses_tiles) {
    Rows x{};
    x.num_rows = p.T;
    x.num_inputs = p.I;
    x.parts = !p.is_float() && p.T <= kMaxPreciseRows ? 2 : 1;
    x.columns = x.parts * p.T;
    x.stride = round_up(p.wide_bytes(), kChunk);
    int64_t bytes = x.columns * x.stride;
    int64_t tile_bytes = uses_tiles ? round_up(x.columns, kTile) * x.stride : 0;
    uint8_t* memory = scratch<0>(tile_bytes + bytes + round_up(4 * x.columns, 64) + 4 * p.T);
    x.tiles = uses_tiles ? memory : nullptr;
    x.bytes = reinterpret_cast<int8_t*>(memory + tile_bytes);
    x.sums = reinterpret_cast<int32_t*>(memory + tile_bytes + bytes);
    x.scales = reinterpret_cast<float*>(x.sums + round_up(x.columns, 16));
    parallel_for(p.T, p.T * p.I < kMinParallel ? 1 : p.threads, [&](int64_t row) {
        if (p.is_float())
            copy_row(p, x, row);
        else
            quantize_row(p, x, row);
    });
#if X86
    if (uses_tiles) {
        int64_t blocks = (x.columns + kTile - 1) / kTile;
        parallel_for(blocks, p.threads, [&](int64_t block) { pack_tiles(x, block); });
    }
#endif
    return x;
}

// Outputs that a thread takes at once: as many as keep the rows of x in its cache busy, and few
// enough that all threads have some.
int64_t panel_outputs(const Product& p, const Rows& x) {
    int64_t unit = x.tiles ? kBlock : 2 * kRows;
    int64_t wanted = x.columns > kBlock ? p.O / (4 * p.threads) : kPieceBytes / p.row_bytes();
    return std::clamp(round_up(wanted, unit), unit, kPanel);
}

// Up to kMaxRows rows.
void multiply_rows(const Product& p) {
    // A tile reads whole chunks of a row of W.
    bool uses_tiles = p.isa >= kAmx && p.kind != kF32 && p.wide_bytes() % kChunk == 0;
    Rows x = prepare_rows(p, uses_tiles);
    int64_t outputs = panel_outputs(p, x);
    parallel_for((p.O + outputs - 1) / outputs, p.threads, [&](int64_t panel) {
        compute_panel(p, x, panel * outputs, std::min(p.O, (panel + 1) * outputs));
    });
}

// kRows outputs from `o`. scales: scratch of kRows * (G + 16) floats.
void int4_dots(
    const Product& p, int64_t o, const Rows& x, const float* sums, float* scales, float out[kRows]
) {
#if X86
    if (p.isa >= kAvx512) return int4_dots_avx512(p.int4, o, p.O - 1, x, sums, scales, out);
#endif
    for (int64_t r = 0; r < kRows && o + r < p.O; r++) {
#if X86
        if (p.isa == kAvx2) {
            out[r] = int4_dot_avx2(p.int4, o + r, x, sums, scales);
            continue;
        }
#endif
        out[r] = int4_dot_portable(p.int4, o + r, x, sums);
    }
}

// One row: each group with its own scale.
void multiply_int4_row(const Product& p) {
    Rows x = prepare_rows(p, false);
    int64_t groups = p.int4.num_groups, half_group = p.int4.group_size / 2;
    std::vector<float> sums(groups);
    for (int64_t g = 0; g < groups; g++) {
        int32_t high = 0, low = 0;
        for (int64_t b = g * half_group; b < (g + 1) * half_group; b++) {
            int64_t even = b / kChunk * 2 * kChunk + b % kChunk, odd = even + kChunk;
            high += x.bytes[even] + x.bytes[odd];
            low += x.bytes[x.stride + even] + x.bytes[x.stride + odd];
        }
        sums[g] = float(256 * high + low);
    }
    int64_t outputs = round_up(std::max<int64_t>(1, kPieceBytes / p.row_bytes()), 2 * kRows);
    parallel_for((p.O + outputs - 1) / outputs, p.threads, [&](int64_t piece) {
        auto* scales = reinterpret_cast<float*>(scratch<1>(kRows * 4 * (groups + 16)));
        int64_t end = std::min(p.O, (piece + 1) * outputs);
        for (int64_t o = piece * outputs; o < end; o += kRows) {
            float totals[kRows];
            int4_dots(p, o, x, sums.data(), scales, totals);
            for (int64_t r = 0; r < std::min<int64_t>(kRows, end - o); r++) {
                float value = totals[r] * x.scales[0];
                if (p.bias) value += p.bias[o + r];
                store(p.y, o + r, value, p.dtype);
            }
        }
    });
}

void multiply(const Product& p) {
    if (p.kind == kInt4 && p.T == 1) return multiply_int4_row(p);
    int64_t size = p.dtype == kFloat32 ? 4 : 2, blocks = (p.T + kMaxRows - 1) / kMaxRows;
    // Equal blocks: the rounding of a row must not depend on its place.
    int64_t count = round_up((p.T + blocks - 1) / blocks, kBlock);
    for (int64_t t = 0; t < p.T; t += count) {
        Product rows = p;
        rows.x = static_cast<const char*>(p.x) + t * p.I * size;
        rows.y = static_cast<char*>(p.y) + t * p.y_stride * size;
        rows.T = std::min(count, p.T - t);
        multiply_rows(rows);
    }
}

}  // namespace qwen2vl
