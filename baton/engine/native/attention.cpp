// Online softmax (Milakov and Gimelshein, arXiv 1805.02867) in steps of 64 keys, flash-attention fashion (Dao et al.,
// arXiv 2205.14135): keys and values of a step are repacked once into pairs of bf16, then every tile of queries reads
// them from the cache.
#include "attention.h"

#include "memory.h"
#include "simd.h"

namespace baton {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

constexpr int STEP = 64;             // keys of one softmax step, aligned to absolute positions
constexpr int VECTORS = STEP / LANES;
constexpr int TILE = 24;             // query rows that share a step's keys while these are in the first cache
constexpr int MICRO = 6;             // query rows held in registers
constexpr float NEVER = -1e30f;      // the score of a key that is not seen: finite, so that differences stay numbers

// One step's keys as [dim / 2][64 keys] pairs along dim and its values as [32][padded dim] pairs along keys. In int8,
// both are the stored integers, exact in bf16, and `key_scales`, `value_scales` [64] what they are multiplied by.
struct Packed {
  int32_t *keys, *values;
  float *key_scales, *value_scales;
};

// [16 tokens][pairs] of 32 bits as [pairs][64 keys]: columns [column, column + 16) of `to`.
void transpose(const int32_t* const (&rows)[LANES], int pairs, int32_t* to) {
  int p = 0;
#if defined(__AVX512F__)
  for (; p + LANES <= pairs; p += LANES) {
    // Each register takes four tokens' quarters of four pairs, so that only the 4 x 4 transposition within is left.
    for (int quarter = 0; quarter < 4; quarter++) {
      __m512i x[4];
      UNROLL for (int t = 0; t < 4; t++) {
        auto at = [&](int token) __attribute__((always_inline)) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[token] + p + 4 * quarter));
        };
        x[t] = _mm512_castsi128_si512(at(t));
        x[t] = _mm512_inserti32x4(x[t], at(4 + t), 1);
        x[t] = _mm512_inserti32x4(x[t], at(8 + t), 2);
        x[t] = _mm512_inserti32x4(x[t], at(12 + t), 3);
      }
      const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
      const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
      int32_t* line = to + (p + 4 * quarter) * STEP;
      _mm512_storeu_si512(line, _mm512_unpacklo_epi64(a, c));
      _mm512_storeu_si512(line + STEP, _mm512_unpackhi_epi64(a, c));
      _mm512_storeu_si512(line + 2 * STEP, _mm512_unpacklo_epi64(b, d));
      _mm512_storeu_si512(line + 3 * STEP, _mm512_unpackhi_epi64(b, d));
    }
  }
#endif
  for (; p < pairs; p++)
    for (int t = 0; t < LANES; t++) to[p * STEP + t] = rows[t][p];
}

// Two rows of bf16 as pairs (first low, second high): [padded dim].
void interleave(const uint16_t* first, const uint16_t* second, int dim, int32_t* to) {
  int d = 0;
  for (; d + LANES <= dim; d += LANES) store(to + d, load_u16(first + d) | (load_u16(second + d) << 16));
  for (; d < dim; d++) to[d] = first[d] | (second[d] << 16);
}

// A share's integers as bf16, which holds them exactly: [16][dim].
void widen(const uint8_t* share, int dim, uint16_t* to) {
  const int8_t* from = reinterpret_cast<const int8_t*>(share);
  for (int i = 0; i < BLOCK * dim; i += LANES) store_bf16(to + i, to_float(load_bytes(from + i)));
}

class Head {
 public:
  Head(const KvShape& shape, void* pool, int layer, int head, const Span& span)
      : shape_(shape), pool_(pool), layer_(layer), head_(head), span_(span), padded_(round_up(shape.dim, LANES)) {}

  // Packs positions [64 step, 64 step + 64), as far as the sequence goes; what lies beyond becomes zero.
  void pack(int step, const Packed& to) const {
    static thread_local Array<uint16_t> wide;
    uint16_t* buffer = wide.reserve(2 * BLOCK * shape_.dim + LANES);
    const int end = span_.position + span_.count, dim = shape_.dim;
    for (int b = 0; b < STEP / BLOCK; b++) {
      const int first = step * STEP + b * BLOCK;
      const int held = end - first < 0 ? 0 : end - first < BLOCK ? end - first : BLOCK;
      if (!held) {
        clear(b, to);
        continue;
      }
      const int64_t block = span_.table[first / BLOCK];
      const uint8_t* keys = shape_.share(pool_, block, layer_, 0, head_);
      const uint8_t* values = shape_.share(pool_, block, layer_, 1, head_);
      prefetch(first + STEP, end);
      if (shape_.format == KvFormat::int8) {
        std::memcpy(to.key_scales + b * BLOCK, keys + BLOCK * dim, BLOCK * sizeof(float));
        std::memcpy(to.value_scales + b * BLOCK, values + BLOCK * dim, BLOCK * sizeof(float));
        for (int t = held; t < BLOCK; t++) to.key_scales[b * BLOCK + t] = to.value_scales[b * BLOCK + t] = 0;
        widen(keys, dim, buffer), widen(values, dim, buffer + BLOCK * dim);
        keys = reinterpret_cast<uint8_t*>(buffer), values = reinterpret_cast<uint8_t*>(buffer + BLOCK * dim);
      }
      pack_block(reinterpret_cast<const uint16_t*>(keys), reinterpret_cast<const uint16_t*>(values), held, b, to);
    }
  }

 private:
  static constexpr int MOST_DIM = 512;

  void pack_block(const uint16_t* keys, const uint16_t* values, int held, int b, const Packed& to) const {
    alignas(64) static const uint16_t nothing[MOST_DIM] = {};
    const int dim = shape_.dim;
    const int32_t* rows[LANES];
    for (int t = 0; t < BLOCK; t++)
      rows[t] = reinterpret_cast<const int32_t*>(t < held ? keys + t * dim : nothing);
    transpose(rows, dim / 2, to.keys + b * BLOCK);
    for (int t = 0; t < BLOCK; t += 2)
      interleave(t < held ? values + t * dim : nothing, t + 1 < held ? values + (t + 1) * dim : nothing, dim,
                 to.values + (b * BLOCK + t) / 2 * padded_);
  }

  void clear(int b, const Packed& to) const {
    for (int p = 0; p < shape_.dim / 2; p++) std::memset(to.keys + p * STEP + b * BLOCK, 0, BLOCK * sizeof(int32_t));
    std::memset(to.values + b * BLOCK / 2 * padded_, 0, BLOCK / 2 * padded_ * sizeof(int32_t));
    if (shape_.format == KvFormat::int8) {
      std::memset(to.key_scales + b * BLOCK, 0, BLOCK * sizeof(float));
      std::memset(to.value_scales + b * BLOCK, 0, BLOCK * sizeof(float));
    }
  }

  // Blocks lie anywhere: the processor can't guess the next one.
  void prefetch(int position, int end) const {
    if (position >= end) return;
    const int64_t block = span_.table[position / BLOCK];
    for (int kind = 0; kind < 2; kind++) {
      const uint8_t* share = shape_.share(pool_, block, layer_, kind, head_);
      for (size_t i = 0; i < shape_.share_bytes(); i += 64) __builtin_prefetch(share + i);
    }
  }

  const KvShape& shape_;
  void* pool_;
  int layer_, head_;
  const Span& span_;
  int padded_;
};

// The running softmax of a tile's rows: best score, lanes of the sum of weights, weighted values [padded dim].
struct State {
  float best[TILE];
  vf total[TILE];
  float* values;
};

// R rows from `first` of the tile over one step.
template <int R>
void advance(const KvShape& shape, const Packed& packed, const uint16_t* const* queries, const int* positions,
             int first_key, int padded, int first, State& state) {
  vf score[R][VECTORS];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < VECTORS; v++) score[r][v] = vf{};
  for (int p = 0; p < shape.dim / 2; p++) {
    vi keys[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) keys[v] = load(packed.keys + p * STEP + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const vi q = splat_at(queries[first + r] + 2 * p);
      UNROLL for (int v = 0; v < VECTORS; v++) score[r][v] = dot_bf16(score[r][v], keys[v], q);
    }
  }
  const bool scaled = shape.format == KvFormat::int8;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) uint16_t weights[R][STEP];
  float shrink[R];
  UNROLL for (int r = 0; r < R; r++) {
    const int last = positions[first + r] - first_key;  // the last key of the step that the row sees
    if (scaled)
      UNROLL for (int v = 0; v < VECTORS; v++) score[r][v] = score[r][v] * load(packed.key_scales + v * LANES);
    if (last < STEP - 1)
      UNROLL for (int v = 0; v < VECTORS; v++)
        score[r][v] = lane + v * LANES > splat(last) ? splat(NEVER) : score[r][v];
    const float most = largest(max(max(score[r][0], score[r][1]), max(score[r][2], score[r][3])));
    const float before = state.best[first + r], best = most > before ? most : before;
    state.best[first + r] = best;
    vf total = {};
    UNROLL for (int v = 0; v < VECTORS; v++) {
      vf weight = exp2_of_negative(score[r][v] - best);
      weight = score[r][v] == splat(NEVER) ? vf{} : weight;
      total = total + weight;
      if (scaled) weight = weight * load(packed.value_scales + v * LANES);
      store_bf16(weights[r] + v * LANES, weight);
    }
    shrink[r] = exp2_of_negative(splat(before - best))[0];
    state.total[first + r] = fma(state.total[first + r], splat(shrink[r]), total);
  }
  for (int d = 0; d < padded; d += 4 * LANES) {
    vf sum[R][4];
    const int width = padded - d < 4 * LANES ? (padded - d) / LANES : 4;
    if (width == 4) {
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 4; v++)
        sum[r][v] = load(state.values + (first + r) * padded + d + v * LANES) * shrink[r];
      for (int t = 0; t < STEP / 2; t++) {
        vi values[4];
        UNROLL for (int v = 0; v < 4; v++) values[v] = load(packed.values + t * padded + d + v * LANES);
        UNROLL for (int r = 0; r < R; r++) {
          const vi w = splat_at(weights[r] + 2 * t);
          UNROLL for (int v = 0; v < 4; v++) sum[r][v] = dot_bf16(sum[r][v], values[v], w);
        }
      }
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 4; v++)
        store(state.values + (first + r) * padded + d + v * LANES, sum[r][v]);
      continue;
    }
    for (int v = 0; v < width; v++) {  // dims that don't fill four registers
      vf few[R];
      UNROLL for (int r = 0; r < R; r++) few[r] = load(state.values + (first + r) * padded + d + v * LANES) * shrink[r];
      for (int t = 0; t < STEP / 2; t++) {
        const vi value = load(packed.values + t * padded + d + v * LANES);
        UNROLL for (int r = 0; r < R; r++) few[r] = dot_bf16(few[r], value, splat_at(weights[r] + 2 * t));
      }
      UNROLL for (int r = 0; r < R; r++) store(state.values + (first + r) * padded + d + v * LANES, few[r]);
    }
  }
}

using Advance = void (*)(const KvShape&, const Packed&, const uint16_t* const*, const int*, int, int, int, State&);
constexpr Advance ADVANCE[MICRO] = {advance<1>, advance<2>, advance<3>, advance<4>, advance<5>, advance<6>};

}  // namespace

void store_kv(const KvShape& shape, uint8_t* share, int offset, const float* from) {
  const int dim = shape.dim;
  if (shape.format == KvFormat::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(share) + offset * dim;
    int d = 0;
    for (; d + LANES <= dim; d += LANES) store_bf16(to + d, load(from + d));
    for (; d < dim; d++) to[d] = to_bf16(from[d]);
    return;
  }
  float most = 0;
  for (int d = 0; d < dim; d++) most = std::fmax(most, std::fabs(from[d]));
  const float factor = most > 0 ? 127.0f / most : 0.0f, scale = most / 127.0f;
  int8_t* to = reinterpret_cast<int8_t*>(share) + offset * dim;
  for (int d = 0; d < dim; d++) to[d] = static_cast<int8_t>(std::nearbyint(from[d] * factor));
  std::memcpy(share + BLOCK * dim + offset * sizeof(float), &scale, sizeof scale);
}

void attend(const KvShape& shape, void* pool, int layer, int head, int group, const Span& span,
            const uint16_t* queries, int query_stride, float* out, int out_stride) {
  static thread_local Array<int32_t> keys, values;
  static thread_local Array<float> scales, sums;
  const int dim = shape.dim, padded = round_up(dim, LANES), rows = span.count * group;
  const int steps = (span.position + span.count - 1) / STEP + 1;
  const int slots = rows <= TILE ? 1 : steps;  // a single tile needs a step's pack only once
  const size_t key_size = static_cast<size_t>(dim / 2) * STEP, value_size = static_cast<size_t>(padded) * STEP / 2;
  keys.reserve(slots * key_size), values.reserve(slots * value_size), scales.reserve(size_t{2} * slots * STEP);
  auto packed_at = [&](int step) {
    const int slot = slots == 1 ? 0 : step;
    float* scale = scales.get() + size_t{2} * slot * STEP;
    return Packed{keys.get() + slot * key_size, values.get() + slot * value_size, scale, scale + STEP};
  };
  const Head from(shape, pool, layer, head, span);
  State state;
  state.values = sums.reserve(static_cast<size_t>(TILE) * padded);
  int packed = 0;
  for (int start = 0; start < rows; start += TILE) {
    const int count = rows - start < TILE ? rows - start : TILE;
    const uint16_t* query[TILE];
    int position[TILE];
    for (int r = 0; r < count; r++) {
      const int token = (start + r) / group;
      query[r] = queries + static_cast<size_t>(span.start + token) * query_stride +
                 (head * group + (start + r) % group) * dim;
      position[r] = span.position + token;
      state.best[r] = NEVER, state.total[r] = vf{};
    }
    std::memset(state.values, 0, static_cast<size_t>(TILE) * padded * sizeof(float));
    for (int step = 0; step <= position[count - 1] / STEP; step++) {
      const Packed now = packed_at(step);
      if (step >= packed || slots == 1) from.pack(step, now), packed = step + 1;
      for (int r = 0; r < count; r += MICRO) {
        const int height = count - r < MICRO ? count - r : MICRO;
        if (position[r + height - 1] < step * STEP) continue;
        ADVANCE[height - 1](shape, now, query, position, step * STEP, padded, r, state);
      }
    }
    for (int r = 0; r < count; r++) {
      const int token = (start + r) / group;
      float* to = out + static_cast<size_t>(span.start + token) * out_stride + (head * group + (start + r) % group) * dim;
      const float total = sum(state.total[r]);
      for (int d = 0; d < dim; d++) to[d] = state.values[r * padded + d] / total;
    }
  }
}

}  // namespace baton
