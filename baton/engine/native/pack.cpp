// Weights into panels, and rows out of them.
#include "matrix.h"
#include "simd.h"

namespace baton {
namespace {

uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
float from_f16(uint16_t x) { return _cvtsh_ss(x); }

// One group of one weight row: scale * q + minimum in int4, scale * (q - 128) in int8.
struct Group {
  uint16_t scale, minimum = 0;
  uint8_t q[GROUP];
};

constexpr size_t QUANTS_Q4_0 = 18, QUANTS_Q4_1 = 20, QUANTS_Q8_0 = 34;  // bytes of a GGUF block of 32

size_t block_bytes(Source source) {
  switch (source) {
    case Source::q4_0:
      return QUANTS_Q4_0;
    case Source::q4_1:
      return QUANTS_Q4_1;
    case Source::q8_0:
      return QUANTS_Q8_0;
    case Source::f32:
      break;
  }
  return GROUP * sizeof(float);
}

// A GGUF block: a scale, in Q4_1 a minimum, then 32 numbers. The grid is kept exactly.
Group from_gguf(Source source, const uint8_t* block) {
  Group group;
  std::memcpy(&group.scale, block, 2);
  if (source == Source::q8_0) {
    for (int i = 0; i < GROUP; i++) group.q[i] = static_cast<uint8_t>(block[2 + i] + INT8_OFFSET);
    return group;
  }
  const uint8_t* halves = block + (source == Source::q4_1 ? 4 : 2);
  if (source == Source::q4_1)
    std::memcpy(&group.minimum, block + 2, 2);
  else
    group.minimum = to_f16(-8.0f * from_f16(group.scale));
  for (int i = 0; i < GROUP / 2; i++) group.q[i] = halves[i] & 15, group.q[i + 16] = halves[i] >> 4;
  return group;
}

// The nearest points of a grid from `minimum` in steps of `scale`, for `count` numbers; zero's for the rest. Returns the
// sum of squared differences.
float round_to(const float* row, int count, int top, float minimum, Group& group) {
  const float scale = from_f16(group.scale);
  float error = 0;
  for (int i = 0; i < GROUP; i++) {
    const float x = i < count ? row[i] : 0.0f;
    const float q = scale > 0 ? std::nearbyint((x - minimum) / scale) : 0.0f;
    const float kept = std::fmin(std::fmax(q, 0.0f), static_cast<float>(top));
    group.q[i] = static_cast<uint8_t>(kept);
    const float off = std::fma(scale, kept, minimum) - x;
    if (i < count) error += off * off;
  }
  return error;
}

// Eight bits: symmetric about zero.
Group quantise_int8(const float* row, int count) {
  float most = 0;
  for (int i = 0; i < count; i++) most = std::fmax(most, std::fabs(row[i]));
  Group group;
  group.scale = to_f16(most / 127.0f);
  round_to(row, count, 255, -INT8_OFFSET * from_f16(group.scale), group);
  return group;
}

// The line through the points (q, x) of least squared distance as a grid; false where all q are one.
bool fit(const float* row, int count, Group& group) {
  float n = static_cast<float>(count), q = 0, x = 0, qq = 0, qx = 0;
  for (int i = 0; i < count; i++) {
    const float k = group.q[i];
    q += k, x += row[i], qq += k * k, qx += k * row[i];
  }
  const float spread = n * qq - q * q;
  if (spread <= 0) return false;
  const float scale = (n * qx - q * x) / spread;
  group.scale = to_f16(scale), group.minimum = to_f16((x - scale * q) / n);
  return scale > 0;
}

// Four bits: the grid of least squared error among some. Each starts with so many steps between the least and the most of
// the group, also one fewer or one more than there are (then the most is cut off), and is fitted to what was rounded to it.
Group quantise_int4(const float* row, int count) {
  constexpr int TOP = 15, FITS = 2;
  float least = row[0], most = row[0];
  for (int i = 1; i < count; i++) least = std::fmin(least, row[i]), most = std::fmax(most, row[i]);
  Group best{};
  float least_error = INFINITY;
  for (int steps = TOP - 1; steps <= TOP + 1; steps++) {
    Group group;
    group.scale = to_f16((most - least) / static_cast<float>(steps)), group.minimum = to_f16(least);
    for (int turn = 0; turn <= FITS; turn++) {
      const float error = round_to(row, count, TOP, from_f16(group.minimum), group);
      if (error < least_error) least_error = error, best = group;
      if (turn == FITS || error == 0.0f || !fit(row, count, group)) break;
    }
  }
  return best;
}

// Puts group `g` of an output into its lane of a panel.
void put(const Matrix& matrix, uint8_t* panel, int lane, int g, const Group& group) {
  uint8_t* to = panel + static_cast<size_t>(g) * number_bytes(matrix.format);
  for (int i = 0; i < GROUP; i++) {
    const int line = i / 4, at = (lane * 4) + i % 4;
    if (matrix.format == Format::int8) {
      to[line * 64 + at] = group.q[i];
    } else {
      uint8_t& both = to[line % 4 * 64 + at];
      both = line < 4 ? (both & 0xf0) | group.q[i] : (both & 0x0f) | static_cast<uint8_t>(group.q[i] << 4);
    }
  }
  uint16_t* scales = reinterpret_cast<uint16_t*>(panel + matrix.factors_at());
  scales[g * PANEL + lane] = group.scale;
  if (matrix.format == Format::int4) scales[(matrix.groups() + g) * PANEL + lane] = group.minimum;
}

}  // namespace

void pack(Matrix& matrix, int first, int rows, Source source, const void* from, const int32_t* order) {
  const int groups = matrix.groups();
  const size_t row_bytes =
      source == Source::f32 ? matrix.inputs * sizeof(float) : matrix.inputs / GROUP * block_bytes(source);
  for (int i = 0; i < rows; i++) {
    const uint8_t* row = static_cast<const uint8_t*>(from) + static_cast<size_t>(order ? order[i] : i) * row_bytes;
    const int lane = (first + i) % PANEL;
    uint8_t* panel = matrix.panel((first + i) / PANEL);
    for (int g = 0; g < groups; g++) {
      const int count = matrix.inputs - g * GROUP < GROUP ? matrix.inputs - g * GROUP : GROUP;
      const float* numbers = reinterpret_cast<const float*>(row) + g * GROUP;
      if (matrix.format == Format::bf16) {
        uint16_t* pairs = reinterpret_cast<uint16_t*>(panel) + g * GROUP * PANEL;
        for (int k = 0; k < count; k++) pairs[(k / 2 * PANEL + lane) * 2 + k % 2] = to_bf16(numbers[k]);
      } else if (source == Source::f32) {
        put(matrix, panel, lane, g,
            matrix.format == Format::int8 ? quantise_int8(numbers, count) : quantise_int4(numbers, count));
      } else {
        put(matrix, panel, lane, g, from_gguf(source, row + g * block_bytes(source)));
      }
    }
  }
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const int lane = row % PANEL, groups = matrix.groups();
  const uint8_t* panel = matrix.panel(row / PANEL);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + matrix.factors_at());
  for (int k = 0; k < matrix.inputs; k++) {
    const int g = k / GROUP, line = k % GROUP / 4, at = lane * 4 + k % 4;
    const uint8_t* numbers = panel + static_cast<size_t>(g) * number_bytes(matrix.format);
    if (matrix.format == Format::bf16) {
      const uint32_t bits = reinterpret_cast<const uint16_t*>(panel)[(k / 2 * PANEL + lane) * 2 + k % 2] << 16;
      std::memcpy(out + k, &bits, 4);
    } else if (matrix.format == Format::int8) {
      out[k] = from_f16(scales[g * PANEL + lane]) * static_cast<float>(numbers[line * 64 + at] - INT8_OFFSET);
    } else {
      const int both = numbers[line % 4 * 64 + at], q = line < 4 ? both & 15 : both >> 4;
      const float minimum = from_f16(scales[(groups + g) * PANEL + lane]);
      out[k] = std::fma(from_f16(scales[g * PANEL + lane]), static_cast<float>(q), minimum);
    }
  }
}

}  // namespace baton
