// Rows of x, rounded to integers: each with a scale of its own.

#pragma once

#include "common.h"

namespace qwen2vl {

struct Rows {  // x, as the products read it
    int64_t num_rows, num_inputs;
    int parts;       // 1: int8; 2: 15 bits, as high and low bytes
    int64_t columns; // parts * num_rows; column part * num_rows + row
    int64_t stride;  // bytes of a column, a multiple of kChunk; zeros after the inputs
    int8_t* bytes;   // (columns, stride); null where only tiles are needed
    int32_t* sums;   // (columns)
    float* scales;   // (num_rows)
    uint8_t* tiles;  // AMX: (ceil(columns / 16), stride / 64) tiles, see pack_tiles
};

constexpr float kPreciseMax = 127 * 256;  // of 15 bits: high byte 127, low byte 0
constexpr float kMax = 127;
constexpr float kMinAbs = 1e-30f;  // a row of zeros is divided by this

// The largest magnitude. As integers, floats without their sign have their order, NaN last.
inline __attribute__((always_inline)) float max_abs(const void* x, int64_t n, DType dtype) {
    if (dtype == kFloat32) {
        auto* bits = static_cast<const int32_t*>(x);
        int32_t largest = 0;
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, bits[i] & 0x7fffffff);
        float value;
        std::memcpy(&value, &largest, 4);
        return value;
    }
    auto* bits = static_cast<const int16_t*>(x);
    int16_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, int16_t(bits[i] & 0x7fff));
    return to_float(uint16_t(largest));
}

// Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even.
inline __attribute__((always_inline)) int32_t round_to_int(float value) {
    constexpr float kRound = 12582912.f;
    return int32_t((value + kRound) - kRound);
}

inline __attribute__((always_inline)) void round_row(
    const void* x, int64_t n, DType dtype, float inverse, int parts, int8_t* high, int8_t* low
) {
    auto* floats = static_cast<const float*>(x);
    auto* halves = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < n; i++) {
        float value = dtype == kFloat32 ? floats[i] : to_float(halves[i]);
        int32_t rounded = round_to_int(value * inverse);
        if (parts == 1) {
            high[i] = int8_t(rounded);
        } else {
            high[i] = int8_t((rounded + 128) >> 8);  // rounded = 256 * high + low
            low[i] = int8_t(rounded);
        }
    }
}

// Within each 128 inputs the even ones first, then the odd ones: as the low and the high nibbles of
// 64 bytes of int4 weights lie.
inline __attribute__((always_inline)) void split_even_odd(int8_t* bytes, int64_t n) {
    int8_t copy[2 * kChunk];
    for (int64_t start = 0; start < n; start += 2 * kChunk) {
        int8_t* part = bytes + start;
        std::memcpy(copy, part, 2 * kChunk);
        for (int i = 0; i < kChunk; i++) part[i] = copy[2 * i];
        for (int i = 0; i < kChunk; i++) part[kChunk + i] = copy[2 * i + 1];
    }
}

inline __attribute__((always_inline)) int32_t sum(const int8_t* bytes, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += bytes[i];
    return total;
}

inline __attribute__((always_inline)) void quantize_row_body(
    const void* x, DType dtype, const Rows& rows, int64_t row, bool is_split
) {
    int64_t n = rows.num_inputs;
    const void* source = static_cast<const char*>(x) + row * n * (dtype == kFloat32 ? 4 : 2);
    float largest = std::max(max_abs(source, n, dtype), kMinAbs);  // of a NaN: the NaN
    float steps = rows.parts == 1 ? kMax : kPreciseMax;
    rows.scales[row] = largest / steps;
    int8_t* parts[2] = {
        rows.bytes + row * rows.stride, rows.bytes + (rows.num_rows + row) * rows.stride};
    round_row(source, n, dtype, steps / largest, rows.parts, parts[0], parts[1]);
    for (int part = 0; part < rows.parts; part++) {
        std::memset(parts[part] + n, 0, rows.stride - n);
        if (is_split) split_even_odd(parts[part], rows.stride);
        rows.sums[part * rows.num_rows + row] = sum(parts[part], rows.stride);
    }
}

// The same loops, compiled for each path.
void quantize_row_portable(const void* x, DType dtype, const Rows& rows, int64_t row, bool split) {
    quantize_row_body(x, dtype, rows, row, split);
}
#if X86
TARGET_AVX2 void quantize_row_avx2(
    const void* x, DType dtype, const Rows& rows, int64_t row, bool split
) {
    quantize_row_body(x, dtype, rows, row, split);
}
TARGET_AVX512 void quantize_row_avx512(
    const void* x, DType dtype, const Rows& rows, int64_t row, bool split
) {
    quantize_row_body(x, dtype, rows, row, split);
}
#endif

}  // namespace qwen2vl
