// Weight matrices, packed for the kernels, and the rows that are multiplied with them.
//
// A matrix of n outputs and k inputs lies in panels of 16 outputs, so that a vector register holds one output per lane
// and no sum ever crosses lanes: each output is one chain over k in rising order, whatever the number of rows. k is
// padded with zeros to whole groups of 32.
//
//   bf16   panel: [k/2][16 outputs][2]
//   int8   panel: [k/32][8][16 outputs][4] bytes, [k/32][16] scales f16                          8.5 bits a weight
//   int4   panel: [k/32][4][16 outputs][4] bytes, [k/32][16] scales f16, [k/32][16] minima f16   5 bits a weight
//
// A weight is scale * (q - 128) in int8 and scale * q + minimum in int4, with q unsigned; GGUF's Q4_0, Q4_1 and Q8_0
// fit in without rounding. In int4, the low half of line j's bytes holds inputs 4j..4j+3 of the group and the high half
// inputs 16+4j...
#pragma once

#include "memory.h"

namespace baton {

constexpr int PANEL = 16;
constexpr int GROUP = 32;
constexpr int INT8_OFFSET = 128;  // added to int8 numbers in storage
constexpr int ROWS = 12;  // most rows of one tile

enum class Format : int32_t { none = 0, bf16 = 1, int8 = 2, int4 = 3 };

// Rows of one tile for a product of `rows` rows: tiles of even height (16 rows of bytes are two tiles of 8), within the
// registers of the format's kernels.
constexpr int tile_height(Format format, int rows) {
  const int most = format == Format::bf16 ? ROWS / 2 : ROWS, tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

// Bytes of a group's numbers in a panel, and of one kind of its factors (scales or minima).
constexpr int number_bytes(Format format) {
  return GROUP * PANEL * (format == Format::bf16 ? 4 : format == Format::int8 ? 2 : 1) / 2;
}
constexpr int FACTOR_BYTES = PANEL * 2;
constexpr int factor_kinds(Format format) { return format == Format::bf16 ? 0 : format == Format::int8 ? 1 : 2; }

struct Matrix {
  Format format = Format::none;
  int outputs = 0, inputs = 0;
  uint8_t* data = nullptr;  // the arena's

  void shape(Format kind, int n, int k, Arena& arena) {
    format = kind, outputs = n, inputs = k;
    data = arena.take(bytes());
  }
  int groups() const { return (inputs + GROUP - 1) / GROUP; }
  int panels() const { return (outputs + PANEL - 1) / PANEL; }
  size_t factors_at() const { return static_cast<size_t>(groups()) * number_bytes(format); }  // within a panel
  size_t panel_bytes() const {
    const size_t bytes = factors_at() + static_cast<size_t>(groups()) * factor_kinds(format) * FACTOR_BYTES;
    return (bytes + 63) / 64 * 64;
  }
  size_t bytes() const { return panels() * panel_bytes(); }
  uint8_t* panel(int index) { return data + index * panel_bytes(); }
  const uint8_t* panel(int index) const { return data + index * panel_bytes(); }
};

// Rows in the form that a format's kernel reads: tiles of `height` rows (the last may be shorter), interleaved by row
// so that broadcasts read consecutive memory: bf16 [k/2][tile rows][2]; bytes [k/4][tile rows][4] with, per group of
// 32, [k/32][tile rows] each: a scale, the sum of the group's numbers (for int4), and the correction for the offset of
// int8 weights, -128 times the sum of the bytes.
struct Operand {
  int rows = 0, groups = 0, height = 0;
  Array<uint16_t> pairs;
  Array<int8_t> bytes;
  Array<float> scales, sums;
  Array<int32_t> offsets;

  // Takes `count` rows of `inputs` numbers, `stride` apart. With `weights`, each is first normalised: RMSNorm.
  void take(Format format, const float* from, int count, int inputs, int stride, const float* weights, float eps);
};

// Writes the product, plus `bias` if not null, to out [rows, outputs], `stride` apart, or adds it, accumulating.
// Prefetches for the errand meanwhile.
void multiply(const Matrix& matrix, const Operand& rows, float* out, int stride, const float* bias, bool accumulate,
              Errand& errand);

// Writes silu(gate product) * up product to out, of two matrices of one shape and format.
void multiply_gated(const Matrix& gate, const Matrix& up, const Operand& rows, float* out, int stride, Errand& errand);

// The same for matrices of two formats, in two calls: the gate writes silu(product) to out, then the other multiplies
// out by its product.
void multiply_half(const Matrix& matrix, const Operand& rows, float* out, int stride, bool is_gate, Errand& errand);

// A weight row as numbers: out [inputs].
void unpack_row(const Matrix& matrix, int row, float* out);

// The format of unpacked weights.
enum class Source : int32_t { f32 = 0, q4_0 = 1, q4_1 = 2, q8_0 = 3 };

// Packs `rows` rows from `from` into rows [first, first + rows) of a shaped matrix; source row of the i-th is order[i],
// or i. GGUF sources must go to the format that holds them exactly: q4_* to int4, q8_0 to int8.
// From floats to int4, `importance` [inputs] weighs each input's squared error; null weighs all alike.
void pack(Matrix& matrix, int first, int rows, Source source, const void* from, const int32_t* order,
          const float* importance);

}  // namespace baton
