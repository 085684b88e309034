// The matrix products. One kernel per format, instantiated for every height of a tile; the height decides which rows
// are computed together, never the order of a sum.
#include <array>
#include <type_traits>
#include <utility>

#include "matrix.h"
#include "simd.h"

namespace baton {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// Sources of a group's lines: int4 unpacked on the fly, or bytes. Widened are int4 unpacked to bytes before.
struct Nibbles {
  static constexpr int NUMBERS = number_bytes(Format::int4);
  static constexpr bool MINIMA = true;

  static __attribute__((always_inline)) inline void lines(const uint8_t* group, int j, vi& low, vi& high) {
    const vi both = load(reinterpret_cast<const int32_t*>(group) + j * LANES);
    low = both & 0x0f0f0f0f;
    high = (both >> 4) & 0x0f0f0f0f;
  }
};

template <bool M>
struct Spread {
  static constexpr int NUMBERS = number_bytes(Format::int8);
  static constexpr bool MINIMA = M;

  static __attribute__((always_inline)) inline void lines(const uint8_t* group, int j, vi& low, vi& high) {
    low = load(reinterpret_cast<const int32_t*>(group) + j * LANES);
    high = load(reinterpret_cast<const int32_t*>(group) + (4 + j) * LANES);
  }
};
using Bytes = Spread<false>;
using Widened = Spread<true>;

// The reads of one tile of rows. `ahead` bytes are the distance to prefetch weights, those of the next panels, into the
// second cache; 0 for all but the first tile, which find them there. `errand` is also prefetched, `errand_step` bytes a
// group; without one it is NOWHERE.
struct TileRows {
  const uint16_t* pairs;
  const int8_t* bytes;
  const float *scales, *sums;
  const int32_t* offsets;
  size_t ahead;
  const uint8_t* errand;
  size_t errand_step;
};

alignas(64) const uint8_t NOWHERE[64] = {};  // a prefetch of it costs nothing

BATON_INLINE void fetch(const uint8_t* from) { __builtin_prefetch(from, 0, 2); }

// Panels computed together: enough independent chains to hide an instruction's latency, few enough for the registers.
constexpr int panels_at_once(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

// acc[r][p] = sum over groups of row scale * weight scale * exact integer sum, + weight minimum * row sum.
template <class From, int R, int P>
BATON_INLINE void integer_tile(const uint8_t* const* panels, TileRows a, int groups, vf (&acc)[R][P]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = vf{};
  const size_t factors = static_cast<size_t>(groups) * From::NUMBERS, minima = factors + groups * FACTOR_BYTES;
  for (int g = 0; g < groups; g++) {
    UNROLL for (int line = 0; line < 3; line++) fetch(a.errand + a.errand_step / 3 * line);
    vi part[R][P];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
      part[r][p] = From::MINIMA ? vi{} : splat_at(a.offsets + r);
    UNROLL for (int j = 0; j < 4; j++) {
      vi low[P], high[P];
      UNROLL for (int p = 0; p < P; p++) {
        const uint8_t* group = panels[p] + g * From::NUMBERS;
        From::lines(group, j, low[p], high[p]);
        fetch(group + a.ahead + j * 64);
        if (From::NUMBERS > 256) fetch(group + a.ahead + (4 + j) * 64);
      }
      UNROLL for (int r = 0; r < R; r++) {
        const vi x = splat_at(a.bytes + (j * R + r) * 4);
        UNROLL for (int p = 0; p < P; p++) part[r][p] = dot_bytes(part[r][p], low[p], x);
      }
      UNROLL for (int r = 0; r < R; r++) {
        const vi x = splat_at(a.bytes + ((4 + j) * R + r) * 4);
        UNROLL for (int p = 0; p < P; p++) part[r][p] = dot_bytes(part[r][p], high[p], x);
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      const uint8_t* at = panels[p] + g * FACTOR_BYTES;
      const vf scale = load_f16(reinterpret_cast<const uint16_t*>(at + factors));
      fetch(at + factors + a.ahead);
      UNROLL for (int r = 0; r < R; r++)
        acc[r][p] = fma(to_float(part[r][p]), scale * splat(a.scales[r]), acc[r][p]);
      if constexpr (From::MINIMA) {
        const vf minimum = load_f16(reinterpret_cast<const uint16_t*>(at + minima));
        fetch(at + minima + a.ahead);
        UNROLL for (int r = 0; r < R; r++) acc[r][p] = fma(minimum, splat(a.sums[r]), acc[r][p]);
      }
    }
    a.errand += a.errand_step, a.bytes += GROUP * R, a.scales += R, a.sums += R, a.offsets += R;
  }
}

template <int R, int P>
BATON_INLINE void bf16_tile(const uint8_t* const* panels, const TileRows& a, int groups, vf (&acc)[R][P]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = vf{};
  const int count = groups * GROUP / 2;
  for (int k = 0; k < count; k++) {
    if (k % 4 == 0) fetch(a.errand + k / 4 * (a.errand_step / 4));
    vi b[P];
    UNROLL for (int p = 0; p < P; p++) {
      b[p] = load(reinterpret_cast<const int32_t*>(panels[p]) + k * LANES);
      fetch(panels[p] + k * 64 + a.ahead);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const vi x = splat_at(a.pairs + (k * R + r) * 2);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = dot_bf16(acc[r][p], b[p], x);
    }
  }
}

struct Pairs {};  // bf16: nothing to unpack

template <class From>
constexpr int panels_for(int rows) {
  if constexpr (std::is_same_v<From, Pairs>) return rows <= 6 ? 4 : 2;
  return panels_at_once(rows);
}

TileRows tile_rows(const Operand& rows, int first, size_t ahead, const uint8_t* errand) {
  const size_t inputs = static_cast<size_t>(rows.groups) * GROUP, factors = static_cast<size_t>(first) * rows.groups;
  return {rows.pairs.get() + first * inputs, rows.bytes.get() + first * inputs, rows.scales.get() + factors,
          rows.sums.get() + factors, rows.offsets.get() + factors, ahead,
          errand ? errand : NOWHERE, errand ? Errand::STEP : 0};
}

// The products of a tile of R rows with P panels, at tile[panel][row][lane].
template <class From, int R, int P>
void product(const uint8_t* const* panels, const TileRows& a, int groups, float* tile) {
  vf acc[R][P];
  if constexpr (std::is_same_v<From, Pairs>)
    bf16_tile<R, P>(panels, a, groups, acc);
  else
    integer_tile<From, R, P>(panels, a, groups, acc);
  UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) store(tile + (p * ROWS + r) * LANES, acc[r][p]);
}

using Product = void (*)(const uint8_t* const*, const TileRows&, int, float*);
constexpr int MOST_PANELS = 4;

// Per height of a tile: the kernel for its best number of panels, that number, and the kernel for one panel.
struct Kernel {
  Product several;
  int width;
  Product single;
};
template <class From, int... I>
constexpr std::array<Kernel, ROWS> kernels_of(std::integer_sequence<int, I...>) {
  return {Kernel{product<From, I + 1, panels_for<From>(I + 1)>, panels_for<From>(I + 1), product<From, I + 1, 1>}...};
}
template <class From>
constexpr std::array<Kernel, ROWS> KERNELS = kernels_of<From>(std::make_integer_sequence<int, ROWS>{});

// Unpacks an int4 panel to bytes, for many tiles to read; prefetches `ahead`.
void widen(const uint8_t* from, int groups, size_t ahead, uint8_t* to) {
  for (int g = 0; g < groups; g++, from += Nibbles::NUMBERS, to += Widened::NUMBERS) {
    for (int j = 0; j < 4; j++) {
      vi low, high;
      Nibbles::lines(from, j, low, high);
      fetch(from + ahead + j * 64);
      store(reinterpret_cast<int32_t*>(to) + j * LANES, low);
      store(reinterpret_cast<int32_t*>(to) + (4 + j) * LANES, high);
    }
  }
  std::memcpy(to, from, static_cast<size_t>(groups) * 2 * FACTOR_BYTES);
}

// Panels side by side in memory, each `bytes` long.
struct Panels {
  const uint8_t* first;
  size_t bytes;
  int count;
};

template <class From>
void product_of(const Panels& panels, int height, const TileRows& a, int groups, float* tile) {
  const Kernel& kernel = KERNELS<From>[height - 1];
  for (int start = 0; start < panels.count;) {
    const bool fits = panels.count - start >= kernel.width;
    const uint8_t* from[MOST_PANELS];
    for (int p = 0; p < (fits ? kernel.width : 1); p++) from[p] = panels.first + (start + p) * panels.bytes;
    (fits ? kernel.several : kernel.single)(from, a, groups, tile + start * ROWS * LANES);
    start += fits ? kernel.width : 1;
  }
}

constexpr int WIDEN_FROM = 4;  // with as many tiles, widening once costs less than unpacking for each

// Calls emit(first row, rows, first panel, panels, tile of each matrix) for every tile of the product.
template <class From, int MATRICES, class Emit>
void for_tiles(const Matrix* const (&matrices)[MATRICES], const Operand& rows, Errand& errand, Emit emit) {
  alignas(64) static thread_local float tiles[MATRICES][MOST_PANELS * ROWS * LANES];
  static thread_local Array<uint8_t> wide[MATRICES];
  const int height = rows.height, groups = rows.groups, panels = matrices[0]->panels();
  const int together = KERNELS<From>[height - 1].width;
  const bool widens = std::is_same_v<From, Nibbles> && rows.rows >= WIDEN_FROM * ROWS;
  const size_t bytes = matrices[0]->panel_bytes(), ahead = bytes * together;
  const size_t wide_bytes = static_cast<size_t>(groups) * (Widened::NUMBERS + 2 * FACTOR_BYTES);
  for (int panel = 0; panel < panels; panel += together) {
    const int count = panels - panel < together ? panels - panel : together;
    Panels from[MATRICES];
    for (int m = 0; m < MATRICES; m++) {
      from[m] = {matrices[m]->panel(panel), bytes, count};
      if (!widens) continue;
      uint8_t* to = wide[m].reserve(wide_bytes * MOST_PANELS);
      for (int p = 0; p < count; p++) widen(matrices[m]->panel(panel + p), groups, ahead, to + p * wide_bytes);
      from[m] = {to, wide_bytes, count};
    }
    for (int first = 0; first < rows.rows; first += height) {
      const int now = rows.rows - first < height ? rows.rows - first : height;
      for (int m = 0; m < MATRICES; m++) {
        const size_t asked = first == 0 && !widens ? ahead : 0;
        const bool is_last = first + now == rows.rows;  // the first tile prefetches weights
        const TileRows a = tile_rows(rows, first, asked, is_last ? errand.next(groups * Errand::STEP) : nullptr);
        if (widens)
          product_of<Widened>(from[m], now, a, groups, tiles[m]);
        else
          product_of<From>(from[m], now, a, groups, tiles[m]);
      }
      emit(first, now, panel, count, tiles);
    }
  }
}

template <int MATRICES, class Emit>
void for_format(const Matrix* const (&matrices)[MATRICES], const Operand& rows, Errand& errand, Emit emit) {
  switch (matrices[0]->format) {
    case Format::bf16:
      return for_tiles<Pairs>(matrices, rows, errand, emit);
    case Format::int8:
      return for_tiles<Bytes>(matrices, rows, errand, emit);
    case Format::int4:
      return for_tiles<Nibbles>(matrices, rows, errand, emit);
    case Format::none:
      return;
  }
}

// Stores the first `count` lanes.
BATON_INLINE void store_some(float* to, vf x, int count) {
  if (count >= LANES) return store(to, x);
  float lanes[LANES];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(float));
}
BATON_INLINE vf load_some(const float* from, int count) {
  if (count >= LANES) return load(from);
  float lanes[LANES] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}

}  // namespace

void multiply(const Matrix& matrix, const Operand& rows, float* out, int stride, const float* bias, bool accumulate,
              Errand& errand) {
  const Matrix* const matrices[1] = {&matrix};
  for_format(matrices, rows, errand, [&](int first, int count, int panel, int width, const auto& tiles) {
    for (int p = 0; p < width; p++) {
      const int column = (panel + p) * PANEL, columns = matrix.outputs - column;
      const vf added = bias ? load_some(bias + column, columns) : vf{};
      for (int r = 0; r < count; r++) {
        float* to = out + static_cast<size_t>(first + r) * stride + column;
        vf x = load(tiles[0] + (p * ROWS + r) * LANES) + added;
        if (accumulate) x = load_some(to, columns) + x;
        store_some(to, x, columns);
      }
    }
  });
}

void multiply_half(const Matrix& matrix, const Operand& rows, float* out, int stride, bool is_gate, Errand& errand) {
  const Matrix* const matrices[1] = {&matrix};
  for_format(matrices, rows, errand, [&](int first, int count, int panel, int width, const auto& tiles) {
    for (int p = 0; p < width; p++) {
      const int column = (panel + p) * PANEL, columns = matrix.outputs - column;
      for (int r = 0; r < count; r++) {
        float* to = out + static_cast<size_t>(first + r) * stride + column;
        const vf x = load(tiles[0] + (p * ROWS + r) * LANES);
        store_some(to, is_gate ? silu(x) : load_some(to, columns) * x, columns);
      }
    }
  });
}

void multiply_gated(const Matrix& gate, const Matrix& up, const Operand& rows, float* out, int stride, Errand& errand) {
  const Matrix* const matrices[2] = {&gate, &up};
  for_format(matrices, rows, errand, [&](int first, int count, int panel, int width, const auto& tiles) {
    for (int p = 0; p < width; p++) {
      const int column = (panel + p) * PANEL, columns = gate.outputs - column;
      for (int r = 0; r < count; r++) {
        const int at = (p * ROWS + r) * LANES;
        const vf x = silu(load(tiles[0] + at)) * load(tiles[1] + at);
        store_some(out + static_cast<size_t>(first + r) * stride + column, x, columns);
      }
    }
  });
}

}  // namespace baton
