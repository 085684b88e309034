// A step of 64 keys and values of the pool, in the two forms that attention reads: repacked, for many rows of queries,
// or as rows in place, for a few.
#pragma once

#include "attention.h"
#include "memory.h"
#include "simd.h"

namespace baton {

#define UNROLL _Pragma("GCC unroll 16")

constexpr int STEP = 64;  // keys of one softmax step, aligned to absolute positions
constexpr int VECTORS_OF_KEYS = STEP / LANES;
constexpr int MOST_DIM = 512;

// Keys as [dim / 2][64] pairs along dim; values as [32][padded dim] pairs along keys. In int8, both are the stored
// integers, exact in bf16, to be multiplied by the scales [64].
struct Packed {
  int32_t *keys, *values;
  float *key_scales, *value_scales;
};

// Rows of keys and values [dim]; absent ones are zeros. `blocks` counts the blocks with any rows.
struct Rows {
  const uint16_t *keys[STEP], *values[STEP];
  float key_scales[STEP], value_scales[STEP];
  int blocks;
};

// Prefetches the next step's reads, little by little. All heads' keys and values of a block's layer are contiguous, but
// blocks are scattered, so that the processor can't predict the next one. Prefetching all at once would stall the
// computation. Into the second cache only: blocks are whole pages apart and would evict each other from the first.
class Ahead {
 public:
  Ahead(const KvShape& shape, void* pool, int layer) : shape_(shape), pool_(pool), layer_(layer) {}

  // Spreads the step of `span` that begins at position `start` over `parts` calls of `some`.
  void of(const Span& span, int start, int parts);
  void some() {
    if (piece_ >= pieces_) return;
    for (int i = 0; i < per_part_; i++) __builtin_prefetch(at_ + 64 * i, 0, 2);
    at_ += 64 * per_part_;
    if (at_ >= end_) next();
  }

 private:
  void next();

  const KvShape& shape_;
  void* pool_;
  int layer_, per_part_ = 0, piece_ = 0, pieces_ = 0;
  const int64_t* table_ = nullptr;
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

// Sixteen pairs (first low, second high) of two rows.
BATON_INLINE vi pairs_at(const uint16_t* first, const uint16_t* second) {
  return load_u16(first) | (load_u16(second) << 16);
}

// Thirty-two pairs of two rows.
BATON_INLINE void pairs_at(const uint16_t* first, const uint16_t* second, vi& low, vi& high) {
#if defined(__AVX512BW__)
  alignas(64) static const uint16_t ORDER[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
  };
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  low = reinterpret_cast<vi>(_mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER[0]), b));
  high = reinterpret_cast<vi>(_mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER[1]), b));
#else
  low = pairs_at(first, second), high = pairs_at(first + LANES, second + LANES);
#endif
}

// Pairs p..p+3 along dim of sixteen rows of keys, a register of rows each.
BATON_INLINE void four_pairs(const uint16_t* const* rows, int p, vi (&to)[4]) {
#if defined(__AVX512F__)
  // Each register takes the quarters of every fourth row, so that only 4 x 4 transpositions within them are left.
  __m512i x[4];
  UNROLL for (int t = 0; t < 4; t++) {
    auto at = [&](int row) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 2 * p));
    };
    x[t] = _mm512_castsi128_si512(at(t));
    x[t] = _mm512_inserti32x4(x[t], at(4 + t), 1);
    x[t] = _mm512_inserti32x4(x[t], at(8 + t), 2);
    x[t] = _mm512_inserti32x4(x[t], at(12 + t), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  to[0] = reinterpret_cast<vi>(_mm512_unpacklo_epi64(a, c));
  to[1] = reinterpret_cast<vi>(_mm512_unpackhi_epi64(a, c));
  to[2] = reinterpret_cast<vi>(_mm512_unpacklo_epi64(b, d));
  to[3] = reinterpret_cast<vi>(_mm512_unpackhi_epi64(b, d));
#else
  int32_t lanes[4][LANES];
  for (int t = 0; t < LANES; t++)
    for (int i = 0; i < 4; i++) std::memcpy(&lanes[i][t], rows[t] + 2 * (p + i), 4);
  UNROLL for (int i = 0; i < 4; i++) to[i] = load(lanes[i]);
#endif
}

// One kv head of one layer of one sequence in the pool.
class Head {
 public:
  Head(const KvShape& shape, void* pool, int layer, int head, const Span& span)
      : shape_(shape), pool_(pool), layer_(layer), head_(head), span_(span) {}

  // The rows at positions [64 step, 64 step + 64), up to the sequence's end, valid until the next call: in the pool
  // itself, or the widened integers of an 8-bit pool.
  void rows(int step, Rows& to) const;

  // The same, repacked.
  void pack(const Rows& from, const Packed& to) const;

 private:
  const KvShape& shape_;
  void* pool_;
  int layer_, head_;
  const Span& span_;
};

}  // namespace baton
