// What all kernels share: paths, sizes, conversions between number formats, scratch memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define TARGET_AVX512 __attribute__((target(AVX512)))
#define TARGET_BF16 __attribute__((target(AVX512 ",avx512bf16")))
#define TARGET_AMX __attribute__((target(AVX512 ",avx512bf16,amx-tile,amx-int8,amx-bf16")))
#endif

namespace qwen2vl {

// The instruction sets, each with those before it.
enum Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
enum DType { kFloat32, kBfloat16 };

constexpr int64_t kChunk = 64;       // bytes of one register, and of a row of a tile
constexpr int kRows = 4;             // outputs whose dot products are computed together
constexpr int kColumns = 4;          // and columns of x with which
constexpr int kTile = 16;            // outputs, and columns of x, of a tile
constexpr int kMaxPreciseRows = 8;   // rows that are rounded to 15 bits

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t to_bf16(float value) {  // round to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 1023;
    if (exponent == 0) {
        float value = float(rest) * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void store(void* y, int64_t index, float value, DType dtype) {
    if (dtype == kFloat32)
        static_cast<float*>(y)[index] = value;
    else
        static_cast<uint16_t*>(y)[index] = to_bf16(value);
}

// Memory of one thread that grows and is kept: a step calls a hundred products of a few sizes.
template <int Slot>
uint8_t* scratch(int64_t bytes) {
    struct Buffer {
        uint8_t* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = round_up(bytes, 4096);
        buffer.data = static_cast<uint8_t*>(std::aligned_alloc(4096, buffer.size));
        if (!buffer.data) throw std::bad_alloc();
    }
    return buffer.data;
}

}  // namespace qwen2vl
