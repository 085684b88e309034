// Online softmax (Milakov and Gimelshein, arXiv 1805.02867) in steps of 64 keys, as in flash attention (Dao et al.,
// arXiv 2205.14135). A long chunk of queries repacks each step once for all its tiles; a decode query reads the pool's
// rows and repacks in registers. Both do the same operations in the same order.
#include "attention.h"

#include <type_traits>
#include <vector>

#include "kv_step.h"

namespace baton {
namespace {

constexpr int TILE = 24;         // query rows that share a step's keys in the first cache
constexpr int MICRO = 6;         // query rows held in registers
constexpr float NEVER = -1e30f;  // the score of an unseen key: finite, so that differences stay numbers; its weight is 0

// The running softmax of a tile's rows: best score, lanes of the sum of weights, weighted values [padded dim]. Pointers
// and positions of the rows' queries beside it.
struct Tile {
  const uint16_t* queries[TILE];
  int positions[TILE];
  float best[TILE];
  vf total[TILE];
  float* values;
  int padded;
};

// Scores of R rows: a chain over pairs along dim for each.
template <int R>
BATON_INLINE void scores_of(const Packed& from, Ahead*, const uint16_t* const* queries, int pairs, vf (&score)[R][VECTORS_OF_KEYS]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++) score[r][v] = vf{};
  for (int p = 0; p < pairs; p++) {
    vi keys[VECTORS_OF_KEYS];
    UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++) keys[v] = load(from.keys + p * STEP + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const vi q = splat_at(queries[r] + 2 * p);
      UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++) score[r][v] = dot_bf16(score[r][v], keys[v], q);
    }
  }
}

template <int R>
BATON_INLINE void scores_of(const Rows& from, Ahead* ahead, const uint16_t* const* queries, int pairs, vf (&score)[R][VECTORS_OF_KEYS]) {
  UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v += 2) {  // two at a time: enough chains to hide the latency
    vf left[R], right[R];
    UNROLL for (int r = 0; r < R; r++) left[r] = right[r] = vf{};
    if (v < from.blocks) {
      for (int p = 0; p < pairs; p += 4) {
        ahead->some();
        vi a[4], b[4];
        four_pairs(from.keys + v * LANES, p, a);
        four_pairs(from.keys + (v + 1) * LANES, p, b);
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int r = 0; r < R; r++) {
          const vi q = splat_at(queries[r] + 2 * (p + i));
          left[r] = dot_bf16(left[r], a[i], q), right[r] = dot_bf16(right[r], b[i], q);
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++) score[r][v] = left[r], score[r][v + 1] = right[r];
  }
}

// Adds a step's weighted values, [d, d + 16 V), to R rows' sums: a chain over pairs of keys for each.
template <int R, int V>
BATON_INLINE void add_values(const Packed& from, Ahead*, const uint16_t (&weights)[R][STEP], int d, int padded, vf (&sum)[R][V]) {
  for (int t = 0; t < STEP / 2; t++) {
    vi values[V];
    UNROLL for (int v = 0; v < V; v++) values[v] = load(from.values + t * padded + d + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const vi w = splat_at(weights[r] + 2 * t);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] = dot_bf16(sum[r][v], values[v], w);
    }
  }
}

template <int R, int V>
BATON_INLINE void add_values(const Rows& from, Ahead* ahead, const uint16_t (&weights)[R][STEP], int d, int, vf (&sum)[R][V]) {
  for (int t = 0; t < from.blocks * BLOCK / 2; t++) {
    if (d == 0) ahead->some();
    vi values[V];
    UNROLL for (int v = 0; v < V; v += 2)
      pairs_at(from.values[2 * t] + d + v * LANES, from.values[2 * t + 1] + d + v * LANES, values[v], values[v + 1]);
    UNROLL for (int r = 0; r < R; r++) {
      const vi w = splat_at(weights[r] + 2 * t);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] = dot_bf16(sum[r][v], values[v], w);
    }
  }
}

template <int R, int V, class From>
BATON_INLINE void update_values(const From& from, Ahead* ahead, const uint16_t (&weights)[R][STEP], const float (&shrink)[R], int first,
                                int d, Tile& tile) {
  float* at = tile.values + first * tile.padded + d;
  vf sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
    sum[r][v] = load(at + r * tile.padded + v * LANES) * shrink[r];
  add_values<R, V>(from, ahead, weights, d, tile.padded, sum);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) store(at + r * tile.padded + v * LANES, sum[r][v]);
}

// Rows [first, first + R) of a tile over the step that begins at position `start`.
template <int R, class From>
void advance(const KvShape& shape, const From& from, Ahead* ahead, int start, int first, Tile& tile) {
  vf score[R][VECTORS_OF_KEYS];
  scores_of<R>(from, ahead, tile.queries + first, shape.dim / 2, score);
  const bool scaled = shape.format == KvFormat::int8;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) uint16_t weights[R][STEP];
  float shrink[R];
  UNROLL for (int r = 0; r < R; r++) {
    const int last = tile.positions[first + r] - start;  // the last key of the step that the row sees
    if (scaled)
      UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++) score[r][v] = score[r][v] * load(from.key_scales + v * LANES);
    if (last < STEP - 1)
      UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++)
        score[r][v] = lane + v * LANES > splat(last) ? splat(NEVER) : score[r][v];
    const float most = largest(max(max(score[r][0], score[r][1]), max(score[r][2], score[r][3])));
    const float before = tile.best[first + r], best = most > before ? most : before;
    tile.best[first + r] = best;
    vf total = {};
    UNROLL for (int v = 0; v < VECTORS_OF_KEYS; v++) {
      vf weight = exp2_of_negative(score[r][v] - best);
      total = total + weight;
      if (scaled) weight = weight * load(from.value_scales + v * LANES);
      store_bf16(weights[r] + v * LANES, weight);
    }
    shrink[r] = exp2_of_negative(splat(before - best))[0];
    tile.total[first + r] = fma(tile.total[first + r], splat(shrink[r]), total);
  }
  int d = 0;
  for (; d + 4 * LANES <= tile.padded; d += 4 * LANES) update_values<R, 4>(from, ahead, weights, shrink, first, d, tile);
  if constexpr (std::is_same_v<From, Rows>) {
    for (; d < tile.padded; d += 2 * LANES) update_values<R, 2>(from, ahead, weights, shrink, first, d, tile);
  } else {
    for (; d < tile.padded; d += LANES) update_values<R, 1>(from, ahead, weights, shrink, first, d, tile);
  }
}

template <class From>
using Advance = void (*)(const KvShape&, const From&, Ahead*, int, int, Tile&);
template <class From>
constexpr Advance<From> ADVANCE[MICRO] = {advance<1, From>, advance<2, From>, advance<3, From>,
                                          advance<4, From>, advance<5, From>, advance<6, From>};

// Steps are repacked in memory if several micro-tiles read them, or if rows are not whole registers.
bool reads_rows(const KvShape& shape, int rows) { return rows <= MICRO && shape.dim % (2 * LANES) == 0; }

// Repacked steps of one head, each made when first needed.
class PackedSteps {
 public:
  PackedSteps(const KvShape& shape, const Head& head, int steps)
      : head_(head), key_size_(static_cast<size_t>(shape.dim / 2) * STEP),
        value_size_(static_cast<size_t>(round_up(shape.dim, LANES)) * STEP / 2) {
    keys().reserve(steps * key_size_), values().reserve(steps * value_size_), scales().reserve(size_t{2} * steps * STEP);
  }
  Packed at(int step) {
    float* scale = scales().get() + size_t{2} * step * STEP;
    const Packed packed{keys().get() + step * key_size_, values().get() + step * value_size_, scale, scale + STEP};
    if (step == made_) {
      Rows rows;
      head_.rows(made_++, rows);
      head_.pack(rows, packed);
    }
    return packed;
  }

 private:
  // Scratch outlives a call: it is large, and growing it in every call would take time.
  static Array<int32_t>& keys() { static thread_local Array<int32_t> memory; return memory; }
  static Array<int32_t>& values() { static thread_local Array<int32_t> memory; return memory; }
  static Array<float>& scales() { static thread_local Array<float> memory; return memory; }

  const Head& head_;
  size_t key_size_, value_size_;
  int made_ = 0;
};

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

namespace {

// The places of one kv head's rows of queries and results: row r is query head r % group of token r / group.
struct Place {
  const Span& span;
  int group, head, dim;
  const uint16_t* queries;
  int query_stride;
  float* out;
  int out_stride;

  size_t at(int row, int stride) const {
    return static_cast<size_t>(span.start + row / group) * stride + (head * group + row % group) * dim;
  }
};

// Starts the softmax of rows [start, start + count); `values` is the tile's scratch.
void begin(const Place& place, int start, int count, float* values, Tile& tile) {
  tile.padded = round_up(place.dim, LANES);
  tile.values = values;
  std::memset(values, 0, static_cast<size_t>(count) * tile.padded * sizeof(float));
  for (int r = 0; r < count; r++) {
    tile.queries[r] = place.queries + place.at(start + r, place.query_stride);
    tile.positions[r] = place.span.position + (start + r) / place.group;
    tile.best[r] = NEVER, tile.total[r] = vf{};
  }
}

void finish(const Place& place, int start, int count, const Tile& tile) {
  for (int r = 0; r < count; r++) {
    float* to = place.out + place.at(start + r, place.out_stride);
    const float total = sum(tile.total[r]);
    for (int d = 0; d < place.dim; d++) to[d] = tile.values[r * tile.padded + d] / total;
  }
}

// A few rows per head: all heads of a step together, since a block has them side by side. `next` is the next span, or
// null.
void attend_few(const KvShape& shape, void* pool, int layer, Place place, const Span* next) {
  static thread_local Array<float> sums;
  static thread_local std::vector<Tile> tiles;
  const int rows = place.span.count * place.group, padded = round_up(shape.dim, LANES);
  tiles.resize(shape.heads);
  float* values = sums.reserve(static_cast<size_t>(shape.heads) * rows * padded);
  for (place.head = 0; place.head < shape.heads; place.head++)
    begin(place, 0, rows, values + static_cast<size_t>(place.head) * rows * padded, tiles[place.head]);
  Ahead ahead(shape, pool, layer);
  const int last = tiles[0].positions[rows - 1] / STEP;
  for (int step = 0; step <= last; step++) {
    // Both products of a head prefetch once per four pairs of dimensions and of keys, up to the last key.
    const int parts = shape.heads * (step < last ? shape.dim / 4 + STEP / 2 : shape.dim / 8 + BLOCK / 2);
    if (step < last)
      ahead.of(place.span, (step + 1) * STEP, parts);
    else if (next)
      ahead.of(*next, 0, parts);
    for (int head = 0; head < shape.heads; head++) {
      Rows now;
      Head(shape, pool, layer, head, place.span).rows(step, now);
      ADVANCE<Rows>[rows - 1](shape, now, &ahead, step * STEP, 0, tiles[head]);
    }
  }
  for (place.head = 0; place.head < shape.heads; place.head++) finish(place, 0, rows, tiles[place.head]);
}

void attend_many(const KvShape& shape, void* pool, int layer, const Place& place) {
  static thread_local Array<float> sums;
  const int rows = place.span.count * place.group;
  const Head head(shape, pool, layer, place.head, place.span);
  PackedSteps packed(shape, head, (place.span.position + place.span.count - 1) / STEP + 1);
  Tile tile;
  float* values = sums.reserve(static_cast<size_t>(TILE) * round_up(shape.dim, LANES));
  for (int start = 0; start < rows; start += TILE) {
    const int count = rows - start < TILE ? rows - start : TILE;
    begin(place, start, count, values, tile);
    for (int step = 0; step <= tile.positions[count - 1] / STEP; step++) {
      const Packed now = packed.at(step);
      for (int r = 0; r < count; r += MICRO) {
        const int height = count - r < MICRO ? count - r : MICRO;
        if (tile.positions[r + height - 1] < step * STEP) continue;
        ADVANCE<Packed>[height - 1](shape, now, nullptr, step * STEP, r, tile);
      }
    }
    finish(place, start, count, tile);
  }
}

}  // namespace

void attend(const KvShape& shape, void* pool, int layer, int group, const Span* spans, int count,
            const uint16_t* queries, int query_stride, float* out, int out_stride) {
  for (int i = 0; i < count; i++) {
    Place place{spans[i], group, 0, shape.dim, queries, query_stride, out, out_stride};
    if (reads_rows(shape, spans[i].count * group)) {
      attend_few(shape, pool, layer, place, i + 1 < count ? &spans[i + 1] : nullptr);
    } else {
      for (; place.head < shape.heads; place.head++) attend_many(shape, pool, layer, place);
    }
  }
}

}  // namespace baton
