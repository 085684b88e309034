// Attention of one layer over the block pool: causal, grouped queries, keys read once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baton {

constexpr int BLOCK = 16;  // tokens of a pool block

enum class KvFormat : int32_t { bf16 = 0, int8 = 1 };

// The shape of the pool, [block][layer][key|value][head][token][dim]. In int8, the 16 tokens of a head are followed by
// their scales, f32 [16].
struct KvShape {
  int layers, heads, dim;
  KvFormat format;

  size_t share_bytes() const {  // 16 tokens of one head
    return format == KvFormat::bf16 ? size_t{BLOCK} * dim * 2 : size_t{BLOCK} * (dim + 4);
  }
  uint8_t* share(void* pool, int64_t block, int layer, int kind, int head) const {
    const size_t index = ((static_cast<size_t>(block) * layers + layer) * 2 + kind) * heads + head;
    return static_cast<uint8_t*>(pool) + index * share_bytes();
  }
};

// One sequence's part of a step: rows [start, start + count), at positions from `position` on; `table` are its blocks.
struct Span {
  int start, count, position;
  const int64_t* table;
};

// Stores one token's key or value of one head, `from` [dim], at `offset` of a share.
void store_kv(const KvShape& shape, uint8_t* share, int offset, const float* from);

// For each row of `count` spans and each query head, `group` of them to a kv head: out = softmax(q . k) v over all
// positions up to the row's own. `queries` are bf16, already times log2(e) / sqrt(dim): [row][query head][dim]; out is
// f32 [row][query head][dim]; strides are in elements per row. Every row takes its keys in the same steps of 64
// positions, so that its bits do not depend on the rest of the batch.
void attend(const KvShape& shape, void* pool, int layer, int group, const Span* spans, int count,
            const uint16_t* queries, int query_stride, float* out, int out_stride);

}  // namespace baton
