// Attention of one new token to the keys and values of its sequence, and writing its own.
//
// For a long sequence it is bound by the operations, not by the bytes: rows are converted in blocks
// that stay in the first-level cache for all query heads of the group. The order of additions does
// not depend on the blocks. Letters: K key/value heads, C channels of a head, G = H / K query heads
// that share a key/value head.

#pragma once

#include <cmath>

#include "common.h"
#include "rows.h"

namespace qwen2vl {

constexpr int64_t kMaxChannels = 512;  // of a head
constexpr int64_t kBlockRows = 16;     // keys, or values, that are converted to float32 together
constexpr int64_t kSumRows = 4;        // values added to a sum while it is in a register
constexpr int kLanes = 16;             // partial sums of a dot product

// Numbers of a cache. Integers have a scale for each token and head: model/int8_kv_cache.py, the
// reference.
enum CacheDType { kCacheFloat32, kCacheBfloat16, kCacheInt8 };

// A struct of the C interface, mirrored by linear/cpu/decoder.py.
struct Sequence {
    void *k, *v;                        // (layers, K, slots, C)
    float *k_scale, *v_scale;           // (layers, K, slots) of int8, or null
    int64_t dtype;                      // CacheDType
    int64_t length;                     // tokens before this one
    int64_t layer_stride, head_stride;  // in numbers
};

// The keys and values of one head in one layer.
struct HeadCache {
    CacheDType dtype;
    int64_t length, channels;
    char *k, *v;
    float *k_scale, *v_scale;

    HeadCache(const Sequence& s, int64_t layer, int64_t head, int64_t C)
        : dtype(CacheDType(s.dtype)), length(s.length), channels(C) {
        int64_t start = layer * s.layer_stride + head * s.head_stride;
        k = static_cast<char*>(s.k) + start * size();
        v = static_cast<char*>(s.v) + start * size();
        bool has_scales = dtype == kCacheInt8;
        k_scale = has_scales ? s.k_scale + start / C : nullptr;
        v_scale = has_scales ? s.v_scale + start / C : nullptr;
    }

    int64_t size() const { return dtype == kCacheFloat32 ? 4 : dtype == kCacheBfloat16 ? 2 : 1; }
};

// e^x, relative error below 2e-7; a loop over it is vectorized.
inline __attribute__((always_inline)) float exp_float(float x) {
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    float n = (x * 1.44269504f + 12582912.f) - 12582912.f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// Converts `count` rows of C numbers; integers without their scales.
inline __attribute__((always_inline)) void load_rows(
    const HeadCache& cache, const char* numbers, int64_t first, int64_t count, float* rows
) {
    const int64_t n = count * cache.channels;
    const char* source = numbers + first * cache.channels * cache.size();
    if (cache.dtype == kCacheFloat32) {
        std::memcpy(rows, source, 4 * n);
    } else if (cache.dtype == kCacheBfloat16) {
        auto* halves = reinterpret_cast<const uint16_t*>(source);
        for (int64_t i = 0; i < n; i++) rows[i] = to_float(halves[i]);
    } else {
        auto* ints = reinterpret_cast<const int8_t*>(source);
        for (int64_t i = 0; i < n; i++) rows[i] = float(ints[i]);
    }
}

// Dot products of q with `count` rows. lanes: scratch of (kBlockRows, kLanes); totals: kBlockRows,
// of which `count` are valid.
inline __attribute__((always_inline)) void dot_rows(
    const float* q, const float* rows, int64_t count, int64_t channels, float* lanes, float* totals
) {
    for (int64_t r = 0; r < count; r++) {
        const float* row = rows + r * channels;
        float sums[kLanes] = {}, total = 0;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes)
            for (int j = 0; j < kLanes; j++) sums[j] += q[c + j] * row[c + j];
        for (; c < channels; c++) total += q[c] * row[c];
        std::memcpy(lanes + r * kLanes, sums, sizeof sums);
        totals[r] = total;
    }
    // For all rows at once, so that it is vectorized over rows.
    for (int64_t r = 0; r < kBlockRows; r++)
        for (int j = 0; j < kLanes; j++) totals[r] += lanes[r * kLanes + j];
}

// sums (C) += p (count) * rows (count, C), row after row.
inline __attribute__((always_inline)) void add_rows(
    const float* p, const float* rows, int64_t count, int64_t channels, float* sums
) {
    int64_t r = 0;
    for (; r + kSumRows <= count; r += kSumRows) {
        const float* row = rows + r * channels;
        for (int64_t c = 0; c < channels; c++) {
            float sum = sums[c];
            for (int64_t i = 0; i < kSumRows; i++) sum += p[r + i] * row[i * channels + c];
            sums[c] = sum;
        }
    }
    for (; r < count; r++)
        for (int64_t c = 0; c < channels; c++) sums[c] += p[r] * rows[r * channels + c];
}

// Conditional expressions rather than std::max, which is not vectorized for AVX2.
inline __attribute__((always_inline)) void softmax_body(float* p, int64_t length) {
    float largest = p[0], lanes[kLanes], total = 0;
    std::fill_n(lanes, kLanes, largest);
    int64_t z = 0;
    for (; z + kLanes <= length; z += kLanes)
        for (int j = 0; j < kLanes; j++) lanes[j] = lanes[j] < p[z + j] ? p[z + j] : lanes[j];
    for (; z < length; z++) largest = std::max(largest, p[z]);
    for (float lane : lanes) largest = std::max(largest, lane);
    for (z = 0; z < length; z++) p[z] = exp_float(p[z] - largest);
    std::fill_n(lanes, kLanes, 0.f);
    for (z = 0; z + kLanes <= length; z += kLanes)
        for (int j = 0; j < kLanes; j++) lanes[j] += p[z + j];
    for (; z < length; z++) total += p[z];
    for (float lane : lanes) total += lane;
    for (z = 0; z < length; z++) p[z] /= total;
}

// The G query heads of one key/value head. q: (G, C); out: (G, C); scores: scratch of
// G * (length + 1) floats. A scale of int8 is a factor of the key's score, and of the value's
// probability.
inline __attribute__((always_inline)) void attend_body(
    const HeadCache& cache, const float* q, int64_t group, float* out, float* scores
) {
    const int64_t C = cache.channels, length = cache.length + 1;
    const float scale = 1.f / std::sqrt(float(C));
    // Aligned, since a load across two cache lines takes twice as long.
    alignas(kChunk) float rows[kBlockRows * kMaxChannels];
    alignas(kChunk) float lanes[kBlockRows * kLanes] = {};
    float factors[kBlockRows];
    for (int64_t z = 0; z < length; z += kBlockRows) {
        const int64_t count = std::min(kBlockRows, length - z);
        load_rows(cache, cache.k, z, count, rows);
        for (int64_t r = 0; r < count; r++)
            factors[r] = cache.k_scale ? scale * cache.k_scale[z + r] : scale;
        for (int64_t g = 0; g < group; g++) {
            float totals[kBlockRows] = {};
            dot_rows(q + g * C, rows, count, C, lanes, totals);
            for (int64_t r = 0; r < count; r++) scores[g * length + z + r] = totals[r] * factors[r];
        }
    }
    for (int64_t g = 0; g < group; g++) softmax_body(scores + g * length, length);
    std::memset(out, 0, 4 * group * C);
    for (int64_t z = 0; z < length; z += kBlockRows) {
        const int64_t count = std::min(kBlockRows, length - z);
        load_rows(cache, cache.v, z, count, rows);
        for (int64_t g = 0; g < group; g++) {
            float* p = scores + g * length + z;
            if (cache.v_scale)
                for (int64_t r = 0; r < count; r++) p[r] *= cache.v_scale[z + r];
            add_rows(p, rows, count, C, out + g * C);
        }
    }
}

// Rounds a row to int8, as `quantize_heads` of model/int8_kv_cache.py; returns its scale.
inline __attribute__((always_inline)) float quantize_head(
    const float* x, int64_t channels, int8_t* ints
) {
    // Of a row with a NaN: the NaN, and so a scale with which the row is read as NaN.
    const float scale = std::max(max_abs(x, channels, kFloat32), kMinAbs) / kMax;
    for (int64_t c = 0; c < channels; c++) ints[c] = int8_t(round_to_int(x[c] / scale));
    return scale;
}

// Writes the key and the value of the new token.
inline __attribute__((always_inline)) void write_body(
    const HeadCache& cache, const float* key, const float* value
) {
    const int64_t C = cache.channels, start = cache.length * C;
    if (cache.dtype == kCacheInt8) {
        auto *keys = reinterpret_cast<int8_t*>(cache.k), *values = reinterpret_cast<int8_t*>(cache.v);
        cache.k_scale[cache.length] = quantize_head(key, C, keys + start);
        cache.v_scale[cache.length] = quantize_head(value, C, values + start);
        return;
    }
    const auto dtype = cache.dtype == kCacheFloat32 ? kFloat32 : kBfloat16;
    for (int64_t c = 0; c < C; c++) {
        store(cache.k, start + c, key[c], dtype);
        store(cache.v, start + c, value[c], dtype);
    }
}

}  // namespace qwen2vl
