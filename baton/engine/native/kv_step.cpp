#include "kv_step.h"

namespace baton {
namespace {

alignas(64) const uint16_t NOTHING[MOST_DIM] = {};

// A share's integers as bf16, which holds them exactly: [16][dim].
void widen(const uint8_t* share, int dim, uint16_t* to) {
  const int8_t* from = reinterpret_cast<const int8_t*>(share);
  int i = 0;
  for (; i + 2 * LANES <= BLOCK * dim; i += 2 * LANES)
    store_bf16(to + i, to_float(load_bytes(from + i)), to_float(load_bytes(from + i + LANES)));
  for (; i < BLOCK * dim; i += LANES) store_bf16(to + i, to_float(load_bytes(from + i)));
}

}  // namespace

void Ahead::of(const Span& span, int start, int parts) {
  const int held = span.position + span.count - start, blocks = (held + BLOCK - 1) / BLOCK;
  table_ = span.table + start / BLOCK;
  piece_ = -1, pieces_ = blocks < STEP / BLOCK ? blocks : STEP / BLOCK;
  const size_t lines = pieces_ * (2 * shape_.heads * shape_.share_bytes() / 64 + 1);
  per_part_ = static_cast<int>((lines + parts - 1) / parts);
  next();
}

void Ahead::next() {
  if (++piece_ >= pieces_) return;
  at_ = shape_.share(pool_, table_[piece_], layer_, 0, 0);
  end_ = at_ + 2 * shape_.heads * shape_.share_bytes();
}

void Head::rows(int step, Rows& to) const {
  static thread_local Array<uint16_t> wide;
  const int end = span_.position + span_.count, dim = shape_.dim;
  const bool narrow = shape_.format == KvFormat::int8;
  uint16_t* buffer = narrow ? wide.reserve(2 * STEP * dim) : nullptr;
  to.blocks = 0;
  for (int b = 0; b < STEP / BLOCK; b++) {
    const int first = step * STEP + b * BLOCK, at = b * BLOCK;
    const int held = end - first < 0 ? 0 : end - first < BLOCK ? end - first : BLOCK;
    for (int t = held; t < BLOCK; t++) {
      to.keys[at + t] = to.values[at + t] = NOTHING;
      to.key_scales[at + t] = to.value_scales[at + t] = 0;
    }
    if (!held) continue;
    to.blocks = b + 1;
    const int64_t block = span_.table[first / BLOCK];
    const uint8_t* shares[2] = {shape_.share(pool_, block, layer_, 0, head_), shape_.share(pool_, block, layer_, 1, head_)};
    const uint16_t* rows[2] = {reinterpret_cast<const uint16_t*>(shares[0]), reinterpret_cast<const uint16_t*>(shares[1])};
    if (narrow) {
      std::memcpy(to.key_scales + at, shares[0] + BLOCK * dim, held * sizeof(float));
      std::memcpy(to.value_scales + at, shares[1] + BLOCK * dim, held * sizeof(float));
      for (int kind = 0; kind < 2; kind++) {
        uint16_t* own = buffer + (2 * b + kind) * BLOCK * dim;
        widen(shares[kind], dim, own);
        rows[kind] = own;
      }
    }
    for (int t = 0; t < held; t++) to.keys[at + t] = rows[0] + t * dim, to.values[at + t] = rows[1] + t * dim;
  }
}

void Head::pack(const Rows& from, const Packed& to) const {
  const int pairs = shape_.dim / 2, dim = shape_.dim, padded = round_up(dim, LANES);
  for (int v = 0; v < VECTORS_OF_KEYS; v++) {
    int32_t* keys = to.keys + v * LANES;
    int p = 0;
    for (; p + 4 <= pairs; p += 4) {
      vi four[4];
      four_pairs(from.keys + v * LANES, p, four);
      UNROLL for (int i = 0; i < 4; i++) store(keys + (p + i) * STEP, four[i]);
    }
    for (; p < pairs; p++)
      for (int t = 0; t < LANES; t++) std::memcpy(keys + p * STEP + t, from.keys[v * LANES + t] + 2 * p, 4);
  }
  for (int t = 0; t < STEP; t += 2) {
    const uint16_t *first = from.values[t], *second = from.values[t + 1];
    int32_t* values = to.values + t / 2 * padded;
    int d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
      vi low, high;
      pairs_at(first + d, second + d, low, high);
      store(values + d, low), store(values + d + LANES, high);
    }
    for (; d < dim; d++) values[d] = first[d] | (second[d] << 16);
  }
  if (shape_.format == KvFormat::int8) {
    std::memcpy(to.key_scales, from.key_scales, sizeof from.key_scales);
    std::memcpy(to.value_scales, from.value_scales, sizeof from.value_scales);
  }
}

}  // namespace baton
