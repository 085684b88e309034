// The matrix products. One kernel per format, instantiated for every height of a tile; a tile's height changes which
// rows are worked on together, never the order of any sum.
#include <array>
#include <type_traits>
#include <utility>

#include "matrix.h"
#include "simd.h"

namespace baton {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// Where a panel's lines come from: int4 unpacked on the way, or bytes.
struct Nibbles {
  static constexpr size_t STRIDE = 256 + 64;

  static __attribute__((always_inline)) inline void lines(const uint8_t* group, int j, vi& low, vi& high) {
    const vi both = load(reinterpret_cast<const int32_t*>(group) + j * LANES);
    low = both & 0x0f0f0f0f;
    high = (both >> 4) & 0x0f0f0f0f;
  }
  static __attribute__((always_inline)) inline const uint16_t* factors(const uint8_t* group) { return reinterpret_cast<const uint16_t*>(group + 256); }
};

struct Bytes {
  static constexpr size_t STRIDE = 512 + 64;

  static __attribute__((always_inline)) inline void lines(const uint8_t* group, int j, vi& low, vi& high) {
    low = load(reinterpret_cast<const int32_t*>(group) + j * LANES);
    high = load(reinterpret_cast<const int32_t*>(group) + (4 + j) * LANES);
  }
  static __attribute__((always_inline)) inline const uint16_t* factors(const uint8_t* group) { return reinterpret_cast<const uint16_t*>(group + 512); }
};

// Panels worked on together: enough independent chains to hide an instruction's latency, few enough for the registers.
constexpr int panels_at_once(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

// acc[r][p] = sum over groups of row scale * weight scale * exact integer sum, + weight minimum * row sum.
template <class From, int R, int P>
BATON_INLINE void integer_tile(const uint8_t* const* panels, const int8_t* bytes, const float* scales,
                               const float* sums, int groups, vf (&acc)[R][P]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = vf{};
  for (int g = 0; g < groups; g++) {
    vi part[R][P];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) part[r][p] = vi{};
    UNROLL for (int j = 0; j < 4; j++) {
      vi low[P], high[P];
      UNROLL for (int p = 0; p < P; p++) From::lines(panels[p] + g * From::STRIDE, j, low[p], high[p]);
      UNROLL for (int r = 0; r < R; r++) {
        const vi a = splat_at(bytes + (j * R + r) * 4);
        UNROLL for (int p = 0; p < P; p++) part[r][p] = dot_bytes(part[r][p], low[p], a);
      }
      UNROLL for (int r = 0; r < R; r++) {
        const vi a = splat_at(bytes + ((4 + j) * R + r) * 4);
        UNROLL for (int p = 0; p < P; p++) part[r][p] = dot_bytes(part[r][p], high[p], a);
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      const uint16_t* factors = From::factors(panels[p] + g * From::STRIDE);
      const vf scale = load_f16(factors), minimum = load_f16(factors + PANEL);
      UNROLL for (int r = 0; r < R; r++) {
        acc[r][p] = fma(to_float(part[r][p]), scale * splat(scales[r]), acc[r][p]);
        acc[r][p] = fma(minimum, splat(sums[r]), acc[r][p]);
      }
    }
    bytes += GROUP * R, scales += R, sums += R;
  }
}

template <int R, int P>
BATON_INLINE void bf16_tile(const uint8_t* const* panels, const uint16_t* pairs, int groups, vf (&acc)[R][P]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = vf{};
  const int count = groups * GROUP / 2;
  for (int k = 0; k < count; k++) {
    vi b[P];
    UNROLL for (int p = 0; p < P; p++) b[p] = load(reinterpret_cast<const int32_t*>(panels[p]) + k * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const vi a = splat_at(pairs + (k * R + r) * 2);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = dot_bf16(acc[r][p], b[p], a);
    }
  }
}

struct Pairs {};  // bf16: nothing to unpack

template <class From>
constexpr int panels_for(int rows) {
  if constexpr (std::is_same_v<From, Pairs>) return rows <= 6 ? 4 : 2;
  return panels_at_once(rows);
}

// What one tile of rows reads.
struct TileRows {
  const uint16_t* pairs;
  const int8_t* bytes;
  const float *scales, *sums;
};

TileRows tile_rows(const Operand& rows, int first) {
  const size_t inputs = static_cast<size_t>(rows.groups) * GROUP;
  return {rows.pairs.get() + first * inputs, rows.bytes.get() + first * inputs,
          rows.scales.get() + static_cast<size_t>(first) * rows.groups,
          rows.sums.get() + static_cast<size_t>(first) * rows.groups};
}

template <class From, int R, int P>
BATON_INLINE void any_tile(const uint8_t* const* panels, const TileRows& a, int groups, vf (&acc)[R][P]) {
  if constexpr (std::is_same_v<From, Pairs>)
    bf16_tile<R, P>(panels, a.pairs, groups, acc);
  else
    integer_tile<From, R, P>(panels, a.bytes, a.scales, a.sums, groups, acc);
}

// The products of a tile of R rows with P panels, at tile[panel][row][lane].
template <class From, int R, int P>
void product(const uint8_t* const* panels, const TileRows& a, int groups, float* tile) {
  vf acc[R][P];
  any_tile<From, R, P>(panels, a, groups, acc);
  UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) store(tile + (p * ROWS + r) * LANES, acc[r][p]);
}

using Product = void (*)(const uint8_t* const*, const TileRows&, int, float*);
constexpr int MOST_PANELS = 4;

// Per height of a tile: the kernel for as many panels as suit it, how many these are, and the kernel for one panel.
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

// An int4 panel with its bytes spread out, for many tiles to read.
void widen(const uint8_t* from, int groups, uint8_t* to) {
  for (int g = 0; g < groups; g++, from += Nibbles::STRIDE, to += Bytes::STRIDE) {
    for (int j = 0; j < 4; j++) {
      vi low, high;
      Nibbles::lines(from, j, low, high);
      store(reinterpret_cast<int32_t*>(to) + j * LANES, low);
      store(reinterpret_cast<int32_t*>(to) + (4 + j) * LANES, high);
    }
    std::memcpy(to + 512, from + 256, 64);
  }
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

constexpr int WIDEN_FROM = 4;  // tiles from which widening once costs less than unpacking for each of them

// Calls emit(first row, rows, first panel, panels, tile of each matrix) for every tile of the product.
template <class From, int MATRICES, class Emit>
void for_tiles(const Matrix* const (&matrices)[MATRICES], const Operand& rows, Emit emit) {
  alignas(64) static thread_local float tiles[MATRICES][MOST_PANELS * ROWS * LANES];
  static thread_local Array<uint8_t> wide[MATRICES];
  const int height = rows.height, groups = rows.groups, panels = matrices[0]->panels();
  const int together = KERNELS<From>[height - 1].width;
  const bool widens = std::is_same_v<From, Nibbles> && rows.rows >= WIDEN_FROM * ROWS;
  const size_t wide_bytes = static_cast<size_t>(groups) * Bytes::STRIDE;
  for (int panel = 0; panel < panels; panel += together) {
    const int count = panels - panel < together ? panels - panel : together;
    Panels from[MATRICES];
    for (int m = 0; m < MATRICES; m++) {
      from[m] = {matrices[m]->panel(panel), matrices[m]->panel_bytes(), count};
      if (!widens) continue;
      uint8_t* to = wide[m].reserve(wide_bytes * MOST_PANELS);
      for (int p = 0; p < count; p++) widen(matrices[m]->panel(panel + p), groups, to + p * wide_bytes);
      from[m] = {to, wide_bytes, count};
    }
    for (int first = 0; first < rows.rows; first += height) {
      const int now = rows.rows - first < height ? rows.rows - first : height;
      const TileRows a = tile_rows(rows, first);
      for (int m = 0; m < MATRICES; m++) {
        if (widens)
          product_of<Bytes>(from[m], now, a, groups, tiles[m]);
        else
          product_of<From>(from[m], now, a, groups, tiles[m]);
      }
      emit(first, now, panel, count, tiles);
    }
  }
}

template <int MATRICES, class Emit>
void for_format(const Matrix* const (&matrices)[MATRICES], const Operand& rows, Emit emit) {
  switch (matrices[0]->format) {
    case Format::bf16:
      return for_tiles<Pairs>(matrices, rows, emit);
    case Format::int8:
      return for_tiles<Bytes>(matrices, rows, emit);
    case Format::int4:
      return for_tiles<Nibbles>(matrices, rows, emit);
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

void multiply(const Matrix& matrix, const Operand& rows, float* out, int stride, const float* bias, bool accumulate) {
  const Matrix* const matrices[1] = {&matrix};
  for_format(matrices, rows, [&](int first, int count, int panel, int width, const auto& tiles) {
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

void multiply_gated(const Matrix& gate, const Matrix& up, const Operand& rows, float* out, int stride) {
  const Matrix* const matrices[2] = {&gate, &up};
  for_format(matrices, rows, [&](int first, int count, int panel, int width, const auto& tiles) {
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
