// A decode step: one new token of each of T sequences through all blocks of the decoder.
//
// In one call, since around the four products of a block there are some fifty small operations,
// which take longer to call than to compute. States are float32 between products. A token of a 2B
// model reads all weights once, and 2 * layers * K * C numbers of cache for each earlier token.
//
// Letters: T sequences, D width, H query heads, K key/value heads, C channels of a head, G = H / K.

#pragma once

#include <vector>

#include "attention.h"
#include "common.h"
#include "products.h"
#include "threads.h"

namespace qwen2vl {

// Structs of the C interface, mirrored by linear/cpu/weights.py and decoder.py.
struct Linear {
    int64_t kind, outputs, inputs, group_size;
    const void* w;
    const void* scale;    // float32 of int8, float16 of int4
    const uint8_t* zero;  // of int4
    const float* bias;    // or null
};

struct Layer {
    const float* input_norm;
    const float* post_norm;
    int64_t num_qkv, num_gate_up;  // products in a row: fused, or one for each
    Linear qkv[3], o, gate_up[2], down;
};

struct Decoder {
    int64_t num_layers, width, heads, kv_heads, channels;
    double eps;
    const Layer* layers;
    const float* final_norm;
};

// Takes denormal numbers for 0 while it lives: attention makes some of far keys, and each costs an
// addition a hundred cycles.
class FlushDenormals {
  public:
#if X86
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#endif
};

// Rotates a head: channel i with channel i + C / 2.
inline __attribute__((always_inline)) void rotate_body(
    float* x, const float* cos, const float* sin, int64_t channels
) {
    for (int64_t i = 0; i < channels / 2; i++) {
        float left = x[i], right = x[i + channels / 2];
        x[i] = left * cos[i] - right * sin[i];
        x[i + channels / 2] = right * cos[i] + left * sin[i];
    }
}

inline __attribute__((always_inline)) void norm_body(
    const float* x, const float* weight, int64_t width, float eps, float* out
) {
    constexpr int kLanes = 16;
    float lanes[kLanes] = {}, total = 0;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
        for (int j = 0; j < kLanes; j++) lanes[j] += x[i + j] * x[i + j];
    for (; i < width; i++) total += x[i] * x[i];
    for (float lane : lanes) total += lane;
    float inverse = 1.f / std::sqrt(total / float(width) + eps);
    for (i = 0; i < width; i++) out[i] = x[i] * inverse * weight[i];
}

inline __attribute__((always_inline)) void swiglu_body(
    const float* gate, const float* up, int64_t n, float* out
) {
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.f + exp_float(-gate[i])) * up[i];
}

struct Loops {
    void (*attend)(const HeadCache&, const float* q, int64_t group, float* out, float* scores);
    void (*write)(const HeadCache&, const float* key, const float* value);
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t channels);
    void (*norm)(const float* x, const float* weight, int64_t width, float eps, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
};

// The loops above, compiled for one path.
#define DEFINE_LOOPS(path, TARGET)                                                               \
    TARGET void attend_##path(const HeadCache& cache, const float* q, int64_t group, float* out, \
                              float* scores) {                                                   \
        attend_body(cache, q, group, out, scores);                                               \
    }                                                                                            \
    TARGET void write_##path(const HeadCache& cache, const float* key, const float* value) {     \
        write_body(cache, key, value);                                                           \
    }                                                                                            \
    TARGET void rotate_##path(float* x, const float* cos, const float* sin, int64_t channels) {  \
        rotate_body(x, cos, sin, channels);                                                      \
    }                                                                                            \
    TARGET void norm_##path(const float* x, const float* weight, int64_t width, float eps,       \
                            float* out) {                                                        \
        norm_body(x, weight, width, eps, out);                                                   \
    }                                                                                            \
    TARGET void swiglu_##path(const float* gate, const float* up, int64_t n, float* out) {       \
        swiglu_body(gate, up, n, out);                                                           \
    }                                                                                            \
    constexpr Loops loops_##path{attend_##path, write_##path, rotate_##path, norm_##path,        \
                                 swiglu_##path};

DEFINE_LOOPS(portable, )
#if X86
DEFINE_LOOPS(avx2, TARGET_AVX2)
DEFINE_LOOPS(avx512, TARGET_AVX512)
#endif
#undef DEFINE_LOOPS

const Loops& loops_of(Isa isa) {
#if X86
    if (isa >= kAvx512) return loops_avx512;
    if (isa == kAvx2) return loops_avx2;
#endif
    (void)isa;
    return loops_portable;
}

// One decode step. Buffers hold a row for each sequence.
class DecodeStep {
  public:
    DecodeStep(
        Isa isa, int threads, const Decoder& decoder, const Sequence* sequences, float* hidden,
        const float* cos, const float* sin, int64_t rows
    )
        : isa_(isa), threads_(threads), d_(decoder), sequences_(sequences), hidden_(hidden),
          cos_(cos), sin_(sin), T_(rows), loops_(loops_of(isa)), normed_(T_ * d_.width),
          projected_(T_ * d_.width), qkv_(T_ * qkv_width()), attended_(T_ * d_.heads * d_.channels),
          gate_up_(T_ * outputs(d_.layers[0].gate_up, d_.layers[0].num_gate_up)),
          activated_(T_ * d_.layers[0].down.inputs) {}

    void run() {
        for (int64_t layer = 0; layer < d_.num_layers; layer++) {
            norm(d_.layers[layer].input_norm, normed_.data());
            attention(layer);
            norm(d_.layers[layer].post_norm, normed_.data());
            mlp(d_.layers[layer]);
        }
        norm(d_.final_norm, hidden_);
    }

  private:
    int64_t qkv_width() const { return (d_.heads + 2 * d_.kv_heads) * d_.channels; }

    static int64_t outputs(const Linear* linears, int64_t count) {
        int64_t total = 0;
        for (int64_t i = 0; i < count; i++) total += linears[i].outputs;
        return total;
    }

    void norm(const float* weight, float* out) {
        for (int64_t t = 0; t < T_; t++)
            loops_.norm(hidden_ + t * d_.width, weight, d_.width, float(d_.eps),
                        out + t * d_.width);
    }

    // Products of the same rows, side by side in y.
    void multiply_all(const Linear* linears, int64_t count, const float* x, float* y) {
        int64_t stride = outputs(linears, count);
        for (int64_t i = 0; i < count; y += linears[i++].outputs) {
            const Linear& l = linears[i];
            auto* w = static_cast<const uint8_t*>(l.w);
            Int4Weights int4{};
            if (l.kind == kInt4)
                int4 = {w, static_cast<const uint16_t*>(l.scale), l.zero, l.inputs, l.group_size,
                        l.inputs / l.group_size};
            multiply({isa_, threads_, Kind(l.kind), kFloat32, x, w, int4,
                      l.kind == kInt8 ? static_cast<const float*>(l.scale) : nullptr, l.bias, y,
                      T_, l.inputs, l.outputs, stride});
        }
    }

    void add_projected() {
        for (int64_t i = 0; i < T_ * d_.width; i++) hidden_[i] += projected_[i];
    }

    void attention(int64_t layer) {
        const Layer& weights = d_.layers[layer];
        multiply_all(weights.qkv, weights.num_qkv, normed_.data(), qkv_.data());
        for (int64_t t = 0; t < T_; t++) write_cache(layer, t);
        int64_t group = d_.heads / d_.kv_heads;
        parallel_for(T_ * d_.kv_heads, threads_, [&](int64_t piece) {
            [[maybe_unused]] FlushDenormals scope;
            int64_t t = piece / d_.kv_heads, head = piece % d_.kv_heads;
            HeadCache cache(sequences_[t], layer, head, d_.channels);
            auto* scores = reinterpret_cast<float*>(scratch<2>(4 * group * (cache.length + 1)));
            int64_t first = head * group * d_.channels;
            loops_.attend(cache, qkv_.data() + t * qkv_width() + first, group,
                          attended_.data() + t * d_.heads * d_.channels + first, scores);
        });
        multiply_all(&weights.o, 1, attended_.data(), projected_.data());
        add_projected();
    }

    // Rotates queries and keys in place, and writes the token's keys and values.
    void write_cache(int64_t layer, int64_t t) {
        const int64_t channels = d_.channels;
        float* row = qkv_.data() + t * qkv_width();
        const float *cos = cos_ + t * channels / 2, *sin = sin_ + t * channels / 2;
        for (int64_t head = 0; head < d_.heads + d_.kv_heads; head++)
            loops_.rotate(row + head * channels, cos, sin, channels);
        for (int64_t head = 0; head < d_.kv_heads; head++) {
            const float* key = row + (d_.heads + head) * channels;
            loops_.write(HeadCache(sequences_[t], layer, head, channels), key,
                         key + d_.kv_heads * channels);
        }
    }

    void mlp(const Layer& weights) {
        multiply_all(weights.gate_up, weights.num_gate_up, normed_.data(), gate_up_.data());
        int64_t n = weights.down.inputs;
        parallel_for(T_, threads_, [&](int64_t t) {
            const float* gate = gate_up_.data() + 2 * t * n;
            loops_.swiglu(gate, gate + n, n, activated_.data() + t * n);
        });
        multiply_all(&weights.down, 1, activated_.data(), projected_.data());
        add_projected();
    }

    Isa isa_;
    int threads_;
    const Decoder& d_;
    const Sequence* sequences_;
    float* hidden_;
    const float *cos_, *sin_;
    int64_t T_;
    const Loops& loops_;
    std::vector<float> normed_, projected_, qkv_, attended_, gate_up_, activated_;
};

void decode(
    Isa isa, int threads, const Decoder& decoder, const Sequence* sequences, float* hidden,
    const float* cos, const float* sin, int64_t rows
) {
    DecodeStep(isa, threads, decoder, sequences, hidden, cos, sin, rows).run();
}

}  // namespace qwen2vl
