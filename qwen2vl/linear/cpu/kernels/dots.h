// Dot products of up to 4 rows of W, bf16 or int8, with up to 4 columns of x.

#pragma once

#include "common.h"

namespace qwen2vl {

struct Dots {
    const uint8_t* w[kRows];    // rows of W; one that is not there repeats the last
    const uint8_t* x[kColumns];
    int32_t sums[kColumns];     // of the columns' elements; of int8 only
    int64_t bytes;              // of a row of W
    int columns;                // 1 to 4
};

using IntDots = void (*)(const Dots& dots, int32_t out[kRows][kColumns]);
using FloatDots = void (*)(const Dots& dots, float out[kRows][kColumns]);

void int8_dots_portable(const Dots& dots, int32_t out[kRows][kColumns]) {
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < dots.columns; c++) {
            auto* w = reinterpret_cast<const int8_t*>(dots.w[r]);
            auto* x = reinterpret_cast<const int8_t*>(dots.x[c]);
            int32_t total = 0;
            for (int64_t i = 0; i < dots.bytes; i++) total += int32_t(w[i]) * x[i];
            out[r][c] = total;
        }
}

void bf16_dots_portable(const Dots& dots, float out[kRows][kColumns]) {
    constexpr int kLanes = 8;
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < dots.columns; c++) {
            auto* w = reinterpret_cast<const uint16_t*>(dots.w[r]);
            auto* x = reinterpret_cast<const uint16_t*>(dots.x[c]);
            float lanes[kLanes] = {};
            int64_t n = dots.bytes / 2, i = 0;
            for (; i + kLanes <= n; i += kLanes)
                for (int j = 0; j < kLanes; j++) lanes[j] += to_float(w[i + j]) * to_float(x[i + j]);
            float total = 0;
            for (; i < n; i++) total += to_float(w[i]) * to_float(x[i]);
            for (float lane : lanes) total += lane;
            out[r][c] = total;
        }
}

// Sums in lanes, which the compiler turns into vectors of each path's width.
inline __attribute__((always_inline)) void f32_dots_body(const Dots& dots, float out[kRows][kColumns]) {
    constexpr int kLanes = 16;
    int64_t n = dots.bytes / 4, whole = n / kLanes * kLanes;
    for (int c = 0; c < dots.columns; c++)
        for (int r = 0; r < kRows; r++) {
            auto* w = reinterpret_cast<const float*>(dots.w[r]);
            auto* x = reinterpret_cast<const float*>(dots.x[c]);
            float lanes[kLanes] = {};
            for (int64_t i = 0; i < whole; i += kLanes)
                for (int j = 0; j < kLanes; j++) lanes[j] += w[i + j] * x[i + j];
            float total = 0;
            for (int64_t i = whole; i < n; i++) total += w[i] * x[i];
            for (float lane : lanes) total += lane;
            out[r][c] = total;
        }
}

void f32_dots_portable(const Dots& dots, float out[kRows][kColumns]) { f32_dots_body(dots, out); }

#if X86

TARGET_AVX2 void f32_dots_avx2(const Dots& dots, float out[kRows][kColumns]) {
    f32_dots_body(dots, out);
}

TARGET_AVX512 void f32_dots_avx512(const Dots& dots, float out[kRows][kColumns]) {
    f32_dots_body(dots, out);
}

// A row's last bytes, with zeros after them: reading beyond the row may leave the mapped file.
struct Tail {
    alignas(64) uint8_t bytes[kRows][kChunk];
    Tail(const Dots& dots, int64_t start) {
        for (int r = 0; r < kRows; r++) {
            std::memset(bytes[r], 0, kChunk);
            std::memcpy(bytes[r], dots.w[r] + start, dots.bytes - start);
        }
    }
};

template <int C>
TARGET_AVX2 inline void int8_dots_avx2_chunk(
    const uint8_t* const w[kRows], const Dots& dots, int64_t k, __m256i sums[kRows][C]
) {
    for (int half = 0; half < kChunk; half += 16) {
        __m256i x[C];
        for (int c = 0; c < C; c++)
            x[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(dots.x[c] + k + half)));
        for (int r = 0; r < kRows; r++) {
            __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w[r] + half)));
            for (int c = 0; c < C; c++)
                sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(wide, x[c]));
        }
    }
}

TARGET_AVX2 inline int32_t reduce_avx2(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

TARGET_AVX2 inline float reduce_avx2(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <int C>
TARGET_AVX2 void int8_dots_avx2(const Dots& dots, int32_t out[kRows][kColumns]) {
    __m256i sums[kRows][C];
    for (auto& row : sums)
        for (auto& v : row) v = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + kChunk <= dots.bytes; k += kChunk) {
        const uint8_t* w[kRows];
        for (int r = 0; r < kRows; r++) w[r] = dots.w[r] + k;
        int8_dots_avx2_chunk<C>(w, dots, k, sums);
    }
    if (k < dots.bytes) {
        Tail tail(dots, k);
        const uint8_t* w[kRows] = {tail.bytes[0], tail.bytes[1], tail.bytes[2], tail.bytes[3]};
        int8_dots_avx2_chunk<C>(w, dots, k, sums);
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < C; c++) out[r][c] = reduce_avx2(sums[r][c]);
}

template <int C>
TARGET_AVX2 inline void bf16_dots_avx2_chunk(
    const uint8_t* const w[kRows], const Dots& dots, int64_t k, __m256 sums[kRows][C]
) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    for (int half = 0; half < kChunk; half += 32) {
        __m256 even[C], odd[C];  // elements: a pair lies in 32 bits
        for (int c = 0; c < C; c++) {
            __m256i pairs = _mm256_loadu_si256((const __m256i*)(dots.x[c] + k + half));
            even[c] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            odd[c] = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
        }
        for (int r = 0; r < kRows; r++) {
            __m256i pairs = _mm256_loadu_si256((const __m256i*)(w[r] + half));
            __m256 w_even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            __m256 w_odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
            for (int c = 0; c < C; c++) {
                sums[r][c] = _mm256_fmadd_ps(w_even, even[c], sums[r][c]);
                sums[r][c] = _mm256_fmadd_ps(w_odd, odd[c], sums[r][c]);
            }
        }
    }
}

template <int C>
TARGET_AVX2 void bf16_dots_avx2(const Dots& dots, float out[kRows][kColumns]) {
    __m256 sums[kRows][C];
    for (auto& row : sums)
        for (auto& v : row) v = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + kChunk <= dots.bytes; k += kChunk) {
        const uint8_t* w[kRows];
        for (int r = 0; r < kRows; r++) w[r] = dots.w[r] + k;
        bf16_dots_avx2_chunk<C>(w, dots, k, sums);
    }
    if (k < dots.bytes) {
        Tail tail(dots, k);
        const uint8_t* w[kRows] = {tail.bytes[0], tail.bytes[1], tail.bytes[2], tail.bytes[3]};
        bf16_dots_avx2_chunk<C>(w, dots, k, sums);
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < C; c++) out[r][c] = reduce_avx2(sums[r][c]);
}

TARGET_AVX512 inline __mmask64 first_bytes(int64_t n) {
    return n >= kChunk ? ~__mmask64(0) : (__mmask64(1) << n) - 1;
}

// VNNI multiplies unsigned by signed bytes. With their sign bit flipped, weights are unsigned and
// 128 too large, which the sum of x takes off again.
template <int C>
TARGET_AVX512 void int8_dots_avx512(const Dots& dots, int32_t out[kRows][kColumns]) {
    const __m512i sign = _mm512_set1_epi8(char(0x80));
    __m512i sums[kRows][C];
    for (auto& row : sums)
        for (auto& v : row) v = _mm512_setzero_si512();
    for (int64_t k = 0; k < dots.bytes; k += kChunk) {
        __mmask64 mask = first_bytes(dots.bytes - k);
        __m512i x[C];
        for (int c = 0; c < C; c++) x[c] = _mm512_loadu_si512(dots.x[c] + k);
        for (int r = 0; r < kRows; r++) {
            __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, dots.w[r] + k), sign);
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], w, x[c]);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < C; c++)
            out[r][c] = _mm512_reduce_add_epi32(sums[r][c]) - 128 * dots.sums[c];
}

template <int C>
TARGET_AVX512 void bf16_dots_avx512(const Dots& dots, float out[kRows][kColumns]) {
    const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512 sums[kRows][C];
    for (auto& row : sums)
        for (auto& v : row) v = _mm512_setzero_ps();
    for (int64_t k = 0; k < dots.bytes; k += kChunk) {
        __mmask64 mask = first_bytes(dots.bytes - k);
        __m512 even[C], odd[C];
        for (int c = 0; c < C; c++) {
            __m512i pairs = _mm512_loadu_si512(dots.x[c] + k);
            even[c] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            odd[c] = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
        }
        for (int r = 0; r < kRows; r++) {
            __m512i pairs = _mm512_maskz_loadu_epi8(mask, dots.w[r] + k);
            __m512 w_even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            __m512 w_odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
            for (int c = 0; c < C; c++) {
                sums[r][c] = _mm512_fmadd_ps(w_even, even[c], sums[r][c]);
                sums[r][c] = _mm512_fmadd_ps(w_odd, odd[c], sums[r][c]);
            }
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < C; c++) out[r][c] = _mm512_reduce_add_ps(sums[r][c]);
}

template <int C>
TARGET_BF16 void bf16_dots_avx512_bf16(const Dots& dots, float out[kRows][kColumns]) {
    __m512 sums[kRows][C];
    for (auto& row : sums)
        for (auto& v : row) v = _mm512_setzero_ps();
    for (int64_t k = 0; k < dots.bytes; k += kChunk) {
        __mmask64 mask = first_bytes(dots.bytes - k);
        __m512bh x[C];
        for (int c = 0; c < C; c++) x[c] = (__m512bh)_mm512_loadu_si512(dots.x[c] + k);
        for (int r = 0; r < kRows; r++) {
            auto w = (__m512bh)_mm512_maskz_loadu_epi8(mask, dots.w[r] + k);
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w, x[c]);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < C; c++) out[r][c] = _mm512_reduce_add_ps(sums[r][c]);
}

#endif

IntDots int8_dots(Isa isa, int columns) {
#if X86
    if (isa >= kAvx512)
        return columns == 1   ? int8_dots_avx512<1>
               : columns == 2 ? int8_dots_avx512<2>
               : columns == 3 ? int8_dots_avx512<3>
                              : int8_dots_avx512<4>;
    if (isa == kAvx2)
        return columns == 1   ? int8_dots_avx2<1>
               : columns == 2 ? int8_dots_avx2<2>
               : columns == 3 ? int8_dots_avx2<3>
                              : int8_dots_avx2<4>;
#endif
    return int8_dots_portable;
}

FloatDots f32_dots(Isa isa) {
#if X86
    if (isa >= kAvx512) return f32_dots_avx512;
    if (isa == kAvx2) return f32_dots_avx2;
#endif
    return f32_dots_portable;
}

FloatDots bf16_dots(Isa isa, int columns) {
#if X86
    if (isa >= kAvx512Bf16)
        return columns == 1   ? bf16_dots_avx512_bf16<1>
               : columns == 2 ? bf16_dots_avx512_bf16<2>
               : columns == 3 ? bf16_dots_avx512_bf16<3>
                              : bf16_dots_avx512_bf16<4>;
    if (isa == kAvx512)
        return columns == 1   ? bf16_dots_avx512<1>
               : columns == 2 ? bf16_dots_avx512<2>
               : columns == 3 ? bf16_dots_avx512<3>
                              : bf16_dots_avx512<4>;
    if (isa == kAvx2)
        return columns == 1   ? bf16_dots_avx2<1>
               : columns == 2 ? bf16_dots_avx2<2>
               : columns == 3 ? bf16_dots_avx2<3>
                              : bf16_dots_avx2<4>;
#endif
    return bf16_dots_portable;
}

}  // namespace qwen2vl
