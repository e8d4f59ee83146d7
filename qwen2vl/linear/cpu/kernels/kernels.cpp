// Matrix products of the CPU: y = x W^T + b, with weights in bf16, int8 or int4, in plain row-major
// order: as a bf16 checkpoint and a compressed-tensors folder store them, so that a mapped file is
// used where it lies.
//
// Two numbers decide how a product is computed. Each weight is read once per call: 2, 1 or 1/2
// bytes. Each row of x costs 2 operations a weight. One row, a decode step, is bound by the bytes
// (GEMV): a dot product per output, rows of W as streams. From about 16 rows on it is bound by the
// operations (GEMM): tiles of 16 outputs x 16 rows, on AMX where the processor has it. Weights are
// then the first operand, whose tile is 16 rows of W where they lie; x, small, is put into the
// order that the second operand needs.
//
//   weights   x is rounded to              products        one output is
//   bf16      bf16                         float32         sum + b
//   f32       as it comes                  float32         the same
//   int8      int8, a scale per row;       int32, exact    sum * scale_x * scale_w + b
//             15 bits up to 8 rows
//   int4      the same; one row: exact     int32 a group   sum of groups * scales + b
//             scales; more: weights are rounded once more, to int8 with a scale per output
//
// Letters: T rows of x, I inputs, O outputs. Every function is called with the path (Isa) to take
// and computes each output in one order of operations, whatever the number of threads. Arguments
// are checked by the caller (operators.py).

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "decode.h"
#include "products.h"

namespace qwen2vl {

Isa detect() {
#if X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    constexpr unsigned kAmxBits = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    constexpr long kRequestPermission = 0x1023, kTileData = 18;    // of arch_prctl
    if ((d & kAmxBits) == kAmxBits && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
        return kAmx;
#endif
    return kAvx512Bf16;
#else
    return kPortable;
#endif
}

template <class F>
int catch_bad_alloc(const F& compute) {
    try {
        compute();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The C interface. Returns 0, or 1 when there is no memory for x. `isa` is at most
// qwen2vl_detect_isa().

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int qwen2vl_detect_isa() {
    static const Isa isa = detect();
    return isa;
}

EXPORT int qwen2vl_linear_bf16(
    int isa, int threads, const void* x, const void* w, const float* bias, void* y,
    int64_t rows, int64_t inputs, int64_t outputs
) {
    Product p{Isa(isa), threads, kBf16, kBfloat16, x, static_cast<const uint8_t*>(w), {},
              nullptr, bias, y, rows, inputs, outputs, outputs};
    return catch_bad_alloc([&] { multiply(p); });
}

EXPORT int qwen2vl_linear_int8(
    int isa, int threads, int dtype, const void* x, const void* w, const float* scale,
    const float* bias, void* y, int64_t rows, int64_t inputs, int64_t outputs
) {
    Product p{Isa(isa), threads, kInt8, DType(dtype), x, static_cast<const uint8_t*>(w), {},
              scale, bias, y, rows, inputs, outputs, outputs};
    return catch_bad_alloc([&] { multiply(p); });
}

EXPORT int qwen2vl_linear_int4(
    int isa, int threads, int dtype, const void* x, const void* w, const uint16_t* scale,
    const uint8_t* zero, const float* bias, void* y,
    int64_t rows, int64_t inputs, int64_t outputs, int64_t group_size
) {
    Int4Weights int4{static_cast<const uint8_t*>(w), scale, zero, inputs, group_size,
                     inputs / group_size};
    Product p{Isa(isa), threads, kInt4, DType(dtype), x, nullptr, int4, nullptr, bias, y,
              rows, inputs, outputs, outputs};
    return catch_bad_alloc([&] { multiply(p); });
}

// hidden (T, D) is embeddings, and then the states after the final norm.
EXPORT int qwen2vl_decode(
    int isa, int threads, const Decoder* decoder, const Sequence* sequences, float* hidden,
    const float* cos, const float* sin, int64_t rows
) {
    return catch_bad_alloc([&] {
        decode(Isa(isa), threads, *decoder, sequences, hidden, cos, sin, rows);
    });
}
}

}  // namespace qwen2vl
