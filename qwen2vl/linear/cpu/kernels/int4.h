// int4 weights in groups of 32, 64 or 128 inputs, each with a scale and a zero point.
//
// One row of x: dot products with the exact scales. Several rows: the weights of some outputs are
// widened to int8 with one scale per output, a table of 16 entries for each group.

#pragma once

#include "common.h"
#include "dots.h"
#include "rows.h"

namespace qwen2vl {

struct Int4Weights {
    const uint8_t* ints;    // (O, I / 2): input 2b in the low, 2b + 1 in the high nibble of byte b
    const uint16_t* scale;  // (O, G) float16
    const uint8_t* zero;    // (O, G)
    int64_t num_inputs, group_size, num_groups;
};

// Returns sum over groups of scale * (sum of int * x - zero * group_sums).
// group_sums: (G), of x as 15-bit integers; x: high and low bytes, split into even and odd.
// scales: scratch of G + 16 floats.
float int4_dot_portable(
    const Int4Weights& w, int64_t o, const Rows& x, const float* group_sums
) {
    const uint8_t* bytes = w.ints + o * w.num_inputs / 2;
    float total = 0;
    for (int64_t g = 0; g < w.num_groups; g++) {
        int32_t high = 0, low = 0;
        for (int64_t b = g * w.group_size / 2; b < (g + 1) * w.group_size / 2; b++) {
            int64_t even = b / kChunk * 2 * kChunk + b % kChunk, odd = even + kChunk;
            int32_t q0 = bytes[b] & 15, q1 = bytes[b] >> 4;
            high += q0 * x.bytes[even] + q1 * x.bytes[odd];
            low += q0 * x.bytes[x.stride + even] + q1 * x.bytes[x.stride + odd];
        }
        int64_t at = o * w.num_groups + g;
        total += half_to_float(w.scale[at]) *
                 (float(256 * high + low) - float(w.zero[at]) * group_sums[g]);
    }
    return total;
}

#if X86

// Which of the groups from a chunk's first one a lane of 8 inputs belongs to.
struct LaneGroups {
    alignas(64) int32_t index[16];
    explicit LaneGroups(int64_t group_size) {
        for (int lane = 0; lane < 16; lane++) index[lane] = int32_t(lane * 8 / group_size);
    }
};

TARGET_AVX2 inline __m256i load_avx2(const int8_t* bytes) {
    return _mm256_loadu_si256((const __m256i*)bytes);
}

TARGET_AVX2 float int4_dot_avx2(
    const Int4Weights& w, int64_t o, const Rows& x, const float* group_sums, float* scales
) {
    constexpr int64_t kBytes = 32;
    const uint8_t* bytes = w.ints + o * w.num_inputs / 2;
    float correction = 0;
    for (int64_t g = 0; g < w.num_groups; g++) {
        int64_t at = o * w.num_groups + g;
        scales[g] = half_to_float(w.scale[at]);
        correction += scales[g] * float(w.zero[at]) * group_sums[g];
    }
    const LaneGroups lanes(w.group_size);
    const __m256i index = _mm256_load_si256((const __m256i*)lanes.index);
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int8_t *high = x.bytes, *low = x.bytes + x.stride;
    __m256 total = _mm256_setzero_ps();
    int64_t num_bytes = w.num_inputs / 2;
    for (int64_t b = 0; b < num_bytes; b += kBytes) {
        alignas(32) uint8_t tail[kBytes] = {};
        const uint8_t* source = bytes + b;
        if (b + kBytes > num_bytes) {
            std::memcpy(tail, source, num_bytes - b);
            source = tail;
        }
        __m256i both = _mm256_loadu_si256((const __m256i*)source);
        __m256i even = _mm256_and_si256(both, nibble);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        int64_t at = b / kChunk * 2 * kChunk + b % kChunk;
        // Four products of 15 * 128 stay within 16 bits.
        __m256i h = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_avx2(high + at)),
                                     _mm256_maddubs_epi16(odd, load_avx2(high + at + kChunk)));
        __m256i l = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_avx2(low + at)),
                                     _mm256_maddubs_epi16(odd, load_avx2(low + at + kChunk)));
        __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(h, ones), 8),
                                       _mm256_madd_epi16(l, ones));
        __m256 groups = _mm256_loadu_ps(scales + 2 * b / w.group_size);
        __m256 scale = _mm256_permutevar8x32_ps(groups, index);
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total);
    }
    return reduce_avx2(total) - correction;
}

// kRows outputs from `o`; one that is not there repeats the last.
TARGET_AVX512 void int4_dots_avx512(
    const Int4Weights& w, int64_t o, int64_t last, const Rows& x, const float* group_sums,
    float* scales, float out[kRows]
) {
    int64_t groups = w.num_groups, num_bytes = w.num_inputs / 2;
    int64_t padded = groups + 16, groups_per_chunk = 2 * kChunk / w.group_size;
    __m512 total[kRows];
    const uint8_t* bytes[kRows];
    for (int r = 0; r < kRows; r++) {
        int64_t row = std::min(o + r, last);
        bytes[r] = w.ints + row * num_bytes;
        __m512 correction = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g += 16) {
            __mmask16 mask = __mmask16(first_bytes(std::min<int64_t>(groups - g, 16)));
            __m512 scale = _mm512_cvtph_ps(
                _mm256_maskz_loadu_epi16(mask, w.scale + row * groups + g));
            __m512 zero = _mm512_cvtepi32_ps(
                _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zero + row * groups + g)));
            _mm512_storeu_ps(scales + r * padded + g, scale);
            __m512 sums = _mm512_maskz_loadu_ps(mask, group_sums + g);
            correction = _mm512_fnmadd_ps(_mm512_mul_ps(scale, zero), sums, correction);
        }
        total[r] = correction;
    }
    const LaneGroups lanes(w.group_size);
    const __m512i index = _mm512_load_si512(lanes.index);
    const __m512i nibble = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
    const int8_t *high = x.bytes, *low = x.bytes + x.stride;
    for (int64_t b = 0; b < num_bytes; b += kChunk) {
        __mmask64 mask = first_bytes(num_bytes - b);
        __m512i high_even = _mm512_loadu_si512(high + 2 * b);
        __m512i high_odd = _mm512_loadu_si512(high + 2 * b + kChunk);
        __m512i low_even = _mm512_loadu_si512(low + 2 * b);
        __m512i low_odd = _mm512_loadu_si512(low + 2 * b + kChunk);
        for (int r = 0; r < kRows; r++) {
            _mm_prefetch(bytes[r] + b + kRows * num_bytes, _MM_HINT_T0);
            __m512i both = _mm512_maskz_loadu_epi8(mask, bytes[r] + b);
            __m512i even = _mm512_and_si512(both, nibble);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            __m512i sum = _mm512_dpbusd_epi32(none, even, high_even);
            sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, odd, high_odd), 8);
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, low_even), odd, low_odd);
            const float* groups_of_chunk = scales + r * padded + b / kChunk * groups_per_chunk;
            __m512 scale = _mm512_permutexvar_ps(
                index, _mm512_castps128_ps512(_mm_loadu_ps(groups_of_chunk)));
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r]);
        }
    }
    for (int r = 0; r < kRows; r++) out[r] = _mm512_reduce_add_ps(total[r]);
}

#endif

// int4, several rows of x: weights of a few outputs are rounded to int8 ------------------------------

// Writes round((int - zero) * scale / scale_of_row), even inputs of 128 first, and returns
// scale_of_row. tables: scratch of 16 * (G + 4) bytes: the int8 of each int4, by group.
inline __attribute__((always_inline)) float fill_tables(
    const Int4Weights& w, int64_t o, int8_t* tables
) {
    float largest = 0;
    for (int64_t g = 0; g < w.num_groups; g++) {
        int64_t at = o * w.num_groups + g;
        largest = std::max(largest, std::abs(half_to_float(w.scale[at])) *
                                        float(std::max<int>(w.zero[at], 15 - w.zero[at])));
    }
    float row_scale = std::max(largest, kMinAbs) / kMax;
    for (int64_t g = 0; g < w.num_groups; g++) {
        int64_t at = o * w.num_groups + g;
        float ratio = half_to_float(w.scale[at]) / row_scale, zero = float(w.zero[at]);
        for (int q = 0; q < 16; q++)
            tables[16 * g + q] = int8_t(round_to_int((float(q) - zero) * ratio));
    }
    return row_scale;
}

float widen_int4_portable(const Int4Weights& w, int64_t o, int8_t* out, int8_t* tables) {
    float row_scale = fill_tables(w, o, tables);
    const uint8_t* bytes = w.ints + o * w.num_inputs / 2;
    for (int64_t b = 0; b < w.num_inputs / 2; b++) {
        const int8_t* table = tables + 16 * (2 * b / w.group_size);
        int64_t even = b / kChunk * 2 * kChunk + b % kChunk;
        out[even] = table[bytes[b] & 15];
        out[even + kChunk] = table[bytes[b] >> 4];
    }
    return row_scale;
}

#if X86

TARGET_AVX2 float widen_int4_avx2(const Int4Weights& w, int64_t o, int8_t* out, int8_t* tables) {
    float row_scale = fill_tables(w, o, tables);
    const __m128i nibble = _mm_set1_epi8(15);
    const uint8_t* bytes = w.ints + o * w.num_inputs / 2;
    for (int64_t b = 0; b < w.num_inputs / 2; b += 16) {  // 32 inputs, the smallest group
        __m128i table = _mm_loadu_si128((const __m128i*)(tables + 16 * (2 * b / w.group_size)));
        __m128i both = _mm_loadu_si128((const __m128i*)(bytes + b));
        int64_t even = b / kChunk * 2 * kChunk + b % kChunk;
        __m128i low = _mm_and_si128(both, nibble);
        __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
        _mm_storeu_si128((__m128i*)(out + even), _mm_shuffle_epi8(table, low));
        _mm_storeu_si128((__m128i*)(out + even + kChunk), _mm_shuffle_epi8(table, high));
    }
    return row_scale;
}

TARGET_AVX512 inline float half_to_float_avx512(uint16_t half) {
    return _mm_cvtss_f32(_mm256_castps256_ps128(
        _mm512_castps512_ps256(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(half))))));
}

TARGET_AVX512 inline float fill_tables_avx512(const Int4Weights& w, int64_t o, int8_t* tables) {
    const uint16_t* scale_G = w.scale + o * w.num_groups;
    const uint8_t* zero_G = w.zero + o * w.num_groups;
    const __m512i all_ones = _mm512_set1_epi32(15);
    __m512 largest = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.num_groups; g += 16) {
        __mmask16 mask = __mmask16(first_bytes(std::min<int64_t>(w.num_groups - g, 16)));
        __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scale_G + g));
        __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, zero_G + g));
        __m512i range = _mm512_max_epi32(zero, _mm512_sub_epi32(all_ones, zero));
        __m512 extreme = _mm512_mul_ps(_mm512_abs_ps(scale), _mm512_cvtepi32_ps(range));
        largest = _mm512_max_ps(largest, extreme);
    }
    float row_scale = std::max(_mm512_reduce_max_ps(largest), kMinAbs) / kMax;
    const __m512 ints = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t g = 0; g < w.num_groups; g++) {
        __m512 ratio = _mm512_set1_ps(half_to_float_avx512(scale_G[g]) / row_scale);
        __m512 steps = _mm512_sub_ps(ints, _mm512_set1_ps(float(zero_G[g])));
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(steps, ratio));
        _mm_storeu_si128((__m128i*)(tables + 16 * g), _mm512_cvtepi32_epi8(rounded));
    }
    return row_scale;
}

TARGET_AVX512 float widen_int4_avx512(const Int4Weights& w, int64_t o, int8_t* out, int8_t* tables) {
    float row_scale = fill_tables_avx512(w, o, tables);
    const __m512i nibble = _mm512_set1_epi8(15);
    alignas(64) int64_t lanes[8];  // of 32 inputs two halves of a table
    for (int i = 0; i < 8; i++) lanes[i] = i / 2 * 32 / w.group_size * 2 + i % 2;
    const __m512i index = _mm512_load_si512(lanes);
    const uint8_t* bytes = w.ints + o * w.num_inputs / 2;
    int64_t num_bytes = w.num_inputs / 2, groups_per_chunk = 2 * kChunk / w.group_size;
    for (int64_t b = 0; b < num_bytes; b += kChunk) {
        _mm_prefetch(bytes + b + kRows * num_bytes, _MM_HINT_T0);
        __m512i table = _mm512_permutexvar_epi64(
            index, _mm512_loadu_si512(tables + 16 * (b / kChunk * groups_per_chunk)));
        __m512i both = _mm512_maskz_loadu_epi8(first_bytes(num_bytes - b), bytes + b);
        __m512i low = _mm512_and_si512(both, nibble);
        __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        _mm512_storeu_si512(out + 2 * b, _mm512_shuffle_epi8(table, low));
        _mm512_storeu_si512(out + 2 * b + kChunk, _mm512_shuffle_epi8(table, high));
    }
    return row_scale;
}

#endif

}  // namespace qwen2vl
