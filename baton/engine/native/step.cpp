// One step: the residual stream is f32; operands of products are rounded to the format of the weights.
#include "model.h"
#include "simd.h"

namespace baton {

Model::Model(const Config& config, const float* inverse_frequencies)
    : config_(config),
      inverse_frequencies_(inverse_frequencies, inverse_frequencies + config.head_dim / 2),
      vectors_(config.layers) {
  weights_.layers.resize(config.layers);
}

void Model::step(void* pool, const Batch& batch) {
  const int rows = batch.rows, heads = config_.heads + 2 * config_.kv_heads;
  hidden_.reserve(static_cast<size_t>(rows) * config_.hidden);
  qkv_.reserve(static_cast<size_t>(rows) * heads * config_.head_dim);
  queries_.reserve(static_cast<size_t>(rows) * config_.heads * config_.head_dim);
  attended_.reserve(static_cast<size_t>(rows) * config_.heads * config_.head_dim);
  gated_.reserve(static_cast<size_t>(rows) * config_.mlp);
  errand_.clear();
  embed(batch);
  tables(batch);
  for (int layer = 0; layer < config_.layers; layer++) {
    project(layer, weights_.layers[layer], pool, batch);
    // After its keys and values, the last layer computes the sampled rows only.
    const Batch narrowed = layer + 1 < config_.layers ? batch : narrow(batch);
    if (narrowed.rows == 0) return;
    attention(layer, weights_.layers[layer], pool, narrowed);
    send_for_kv(layer + 1, pool, batch);
    mlp(layer, weights_.layers[layer], narrowed.rows);
  }
  logits(batch);
}

// The batch of the sampled rows alone, each a span of its own; moves their scratch to the front.
Batch Model::narrow(const Batch& batch) {
  if (batch.sampled == batch.rows) return batch;
  const size_t width = config_.hidden, heads = static_cast<size_t>(config_.heads) * config_.head_dim;
  narrowed_.clear();
  for (int i = 0, s = 0; i < batch.sampled; i++) {
    const int row = batch.sampled_rows[i];
    while (batch.span[s].start + batch.span[s].count <= row) s++;
    narrowed_.push_back({i, 1, batch.span[s].position + row - batch.span[s].start, batch.span[s].table});
    std::memmove(hidden_.get() + i * width, hidden_.get() + row * width, width * sizeof(float));
    std::memmove(queries_.get() + i * heads, queries_.get() + row * heads, heads * sizeof(uint16_t));
  }
  return {batch.sampled, batch.sampled, batch.sampled, nullptr, narrowed_.data(), nullptr, batch.logits};
}

// Lets the products until the next attention prefetch its first reads, as much as the caches hold meanwhile.
void Model::send_for_kv(int layer, void* pool, const Batch& batch) {
  constexpr size_t MOST = size_t{2} << 20;
  errand_.clear();
  if (layer == config_.layers) return;
  const KvShape shape{config_.layers, config_.kv_heads, config_.head_dim, config_.kv_format};
  const size_t bytes = 2 * shape.heads * shape.share_bytes();
  for (int s = 0; s < batch.spans; s++) {
    const Span& span = batch.span[s];
    if (span.count > 1) continue;  // a chunk computes enough to hide its reads
    for (int block = 0; block <= span.position / BLOCK; block++) {
      if (errand_.total() + bytes > MOST) return;
      errand_.add(shape.share(pool, span.table[block], layer, 0, 0), bytes);
    }
  }
}

void Model::take(const Matrix& matrix, const float* rows, int count, int stride, const float* norm) {
  Timer timer(profile_, ROUND);
  operand_.take(matrix.format, rows, count, matrix.inputs, stride, norm, config_.eps);
}

void Model::embed(const Batch& batch) {
  Timer timer(profile_, EMBED);
  const Matrix& matrix = weights_.embedding.format == Format::none ? weights_.head : weights_.embedding;
  for (int row = 0; row < batch.rows; row++)
    unpack_row(matrix, batch.tokens[row], hidden_.get() + static_cast<size_t>(row) * config_.hidden);
}

// Cosine and sine of every row's position, [rows][head_dim / 2].
void Model::tables(const Batch& batch) {
  Timer timer(profile_, ROTATE);
  const int half = config_.head_dim / 2;
  float* cosine = cosine_.reserve(static_cast<size_t>(batch.rows) * half);
  float* sine = sine_.reserve(static_cast<size_t>(batch.rows) * half);
  for (int s = 0; s < batch.spans; s++) {
    const Span& span = batch.span[s];
    for (int row = 0; row < span.count; row++) {
      const float position = static_cast<float>(span.position + row);
      const size_t at = static_cast<size_t>(span.start + row) * half;
      for (int i = 0; i < half; i++) {
        const float angle = position * inverse_frequencies_[i];
        cosine[at + i] = std::cos(angle) * config_.rope_scale;
        sine[at + i] = std::sin(angle) * config_.rope_scale;
      }
    }
  }
}

// Rotary embedding (arXiv 2104.09864), dimension i with i + dim / 2, after RMSNorm if `norm` is not null.
void Model::rotate(float* head, const float* cosine, const float* sine, const float* norm) const {
  const int dim = config_.head_dim, half = dim / 2;
  if (norm) {
    float squares = 0;
    for (int d = 0; d < dim; d++) squares += head[d] * head[d];
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(dim) + config_.eps);
    for (int d = 0; d < dim; d++) head[d] = head[d] * factor * norm[d];
  }
  for (int i = 0; i < half; i++) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosine[i] - second * sine[i];
    head[half + i] = second * cosine[i] + first * sine[i];
  }
}

void Model::rotate_and_store(int layer, void* pool, const Batch& batch) {
  Timer timer(profile_, ROTATE);
  const int dim = config_.head_dim, heads = config_.heads, kv_heads = config_.kv_heads, half = dim / 2;
  const KvShape shape{config_.layers, kv_heads, dim, config_.kv_format};
  const LayerVectors& vectors = vectors_[layer];
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(dim));  // log2(e): the softmax uses powers of two
  for (int s = 0; s < batch.spans; s++) {
    const Span& span = batch.span[s];
    for (int i = 0; i < span.count; i++) {
      const size_t row = span.start + i;
      const int position = span.position + i;
      const float *cosine = cosine_.get() + row * half, *sine = sine_.get() + row * half;
      float* head = qkv_.get() + row * (heads + 2 * kv_heads) * dim;
      uint16_t* query = queries_.get() + row * heads * dim;
      for (int h = 0; h < heads; h++, head += dim, query += dim) {
        rotate(head, cosine, sine, vectors.of[Q_NORM].get());
        int d = 0;
        for (; d + LANES <= dim; d += LANES) store_bf16(query + d, load(head + d) * scale);
        for (; d < dim; d++) query[d] = to_bf16(head[d] * scale);
      }
      const int64_t block = span.table[position / BLOCK];
      for (int kind = 0; kind < 2; kind++) {
        for (int h = 0; h < kv_heads; h++, head += dim) {
          if (kind == 0) rotate(head, cosine, sine, vectors.of[K_NORM].get());
          store_kv(shape, shape.share(pool, block, layer, kind, h), position % BLOCK, head);
        }
      }
    }
  }
}

// Queries of all rows, and their keys and values into the pool.
void Model::project(int layer, const LayerMatrices& matrices, void* pool, const Batch& batch) {
  const LayerVectors& vectors = vectors_[layer];
  const int width = (config_.heads + 2 * config_.kv_heads) * config_.head_dim;
  take(matrices.slots[QKV], hidden_.get(), batch.rows, config_.hidden, vectors.of[INPUT_NORM].get());
  {
    Timer timer(profile_, QKV_PRODUCT);
    multiply(matrices.slots[QKV], operand_, qkv_.get(), width, vectors.of[QKV_BIAS].get(), false, errand_);
  }
  rotate_and_store(layer, pool, batch);
}

void Model::attention(int layer, const LayerMatrices& matrices, void* pool, const Batch& batch) {
  const LayerVectors& vectors = vectors_[layer];
  const int dim = config_.head_dim, heads = config_.heads, kv_heads = config_.kv_heads, width = heads * dim;
  {
    Timer timer(profile_, ATTEND);
    const KvShape shape{config_.layers, kv_heads, dim, config_.kv_format};
    attend(shape, pool, layer, heads / kv_heads, batch.span, batch.spans, queries_.get(), width, attended_.get(), width);
  }
  take(matrices.slots[OUTPUT], attended_.get(), batch.rows, width, nullptr);
  Timer timer(profile_, OUTPUT_PRODUCT);
  multiply(matrices.slots[OUTPUT], operand_, hidden_.get(), config_.hidden, vectors.of[OUTPUT_BIAS].get(), true,
           errand_);
}

void Model::mlp(int layer, const LayerMatrices& matrices, int rows) {
  const Matrix &gate = matrices.slots[GATE], &up = matrices.slots[UP];
  const float* norm = vectors_[layer].of[MLP_NORM].get();
  take(gate, hidden_.get(), rows, config_.hidden, norm);
  if (gate.format == up.format) {
    Timer timer(profile_, GATE_UP_PRODUCT);
    multiply_gated(gate, up, operand_, gated_.get(), config_.mlp, errand_);
  } else {
    {
      Timer timer(profile_, GATE_UP_PRODUCT);
      multiply_half(gate, operand_, gated_.get(), config_.mlp, true, errand_);
    }
    if (gate.format == Format::bf16 || up.format == Format::bf16)  // else both read the same bytes
      take(up, hidden_.get(), rows, config_.hidden, norm);
    Timer timer(profile_, GATE_UP_PRODUCT);
    multiply_half(up, operand_, gated_.get(), config_.mlp, false, errand_);
  }
  take(matrices.slots[DOWN], gated_.get(), rows, config_.mlp, nullptr);
  Timer timer(profile_, DOWN_PRODUCT);
  multiply(matrices.slots[DOWN], operand_, hidden_.get(), config_.hidden, nullptr, true, errand_);
}

// The sampled rows are at the front by now.
void Model::logits(const Batch& batch) {
  const Matrix& head = weights_.head;
  take(head, hidden_.get(), batch.sampled, config_.hidden, norm_.get());
  Timer timer(profile_, HEAD_PRODUCT);
  multiply(head, operand_, batch.logits, config_.vocabulary, nullptr, false, errand_);
}

}  // namespace baton
