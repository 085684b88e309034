// A decoder of the Llama family: its weights, and one step over a batch.
#pragma once

#include <vector>

#include "attention.h"
#include "matrix.h"
#include "profile.h"

namespace baton {

struct Config {
  int32_t layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary;
  KvFormat kv_format;
  float eps, rope_scale;  // rope_scale: the factor of cosine and sine
};

// Matrices of a layer, in the order of the ABI.
enum Slot { QKV, OUTPUT, GATE, UP, DOWN, SLOTS };
// Vectors of a layer, in the order of the ABI; those the architecture lacks stay empty.
enum Vector { INPUT_NORM, MLP_NORM, Q_NORM, K_NORM, QKV_BIAS, OUTPUT_BIAS, VECTORS };

struct LayerMatrices {
  Matrix slots[SLOTS];
};
struct LayerVectors {
  Array<float> of[VECTORS];
};

struct Weights {
  Arena memory;
  std::vector<LayerMatrices> layers;
  Matrix head;
  Matrix embedding;  // without a format, token embeddings are the head's rows

  // Calls visit(matrix) for every packed matrix, always in the same order.
  template <class Visit>
  void each(Visit visit) const {
    if (embedding.format != Format::none) visit(embedding);
    if (head.format != Format::none) visit(head);
    for (const LayerMatrices& layer : layers)
      for (const Matrix& matrix : layer.slots)
        if (matrix.format != Format::none) visit(matrix);
  }
};

// A batch: `spans` cover rows [0, rows) of `tokens`; `logits` [sampled, vocabulary] are of `sampled_rows`, rising.
struct Batch {
  int32_t rows, spans, sampled;
  const int32_t* tokens;
  const Span* span;
  const int32_t* sampled_rows;
  float* logits;
};

class Model {
 public:
  Model(const Config& config, const float* inverse_frequencies);

  const Config& config() const { return config_; }
  Weights& weights() { return weights_; }
  LayerVectors& vectors(int layer) { return vectors_[layer]; }
  Array<float>& norm() { return norm_; }
  Profile& profile() { return profile_; }

  // Writes the batch's KV into the pool, and its logits.
  void step(void* pool, const Batch& batch);

 private:
  void embed(const Batch& batch);
  void tables(const Batch& batch);
  void rotate_and_store(int layer, void* pool, const Batch& batch);
  void rotate(float* head, const float* cosine, const float* sine, const float* norm) const;
  Batch narrow(const Batch& batch);
  void project(int layer, const LayerMatrices& matrices, void* pool, const Batch& batch);
  void attention(int layer, const LayerMatrices& matrices, void* pool, const Batch& batch);
  void mlp(int layer, const LayerMatrices& matrices, int rows);
  void logits(const Batch& batch);
  void send_for_kv(int layer, void* pool, const Batch& batch);
  void take(const Matrix& matrix, const float* rows, int count, int stride, const float* norm);

  Config config_;
  std::vector<float> inverse_frequencies_;
  Weights weights_;
  std::vector<LayerVectors> vectors_;
  Array<float> norm_;
  Profile profile_;

  // Scratch of a step, [rows, ...].
  Array<float> hidden_, qkv_, attended_, gated_, cosine_, sine_;
  Array<uint16_t> queries_;
  std::vector<Span> narrowed_;
  Operand operand_;
  Errand errand_;  // memory that the products of this part of a step prefetch
};

}  // namespace baton
