// Weights into panels, and rows out of them.
#include "matrix.h"
#include "simd.h"

namespace baton {
namespace {

uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
float from_f16(uint16_t x) { return _cvtsh_ss(x); }

// One group of one weight row: scale * q + minimum.
struct Group {
  uint16_t scale, minimum;
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

// A GGUF block: a scale, in Q4_1 a minimum, then 32 numbers. The grid is kept exactly. (The minimum of a Q8_0 scale past
// 511 would overflow f16; weights of tens of thousands are no weights.)
Group from_gguf(Source source, const uint8_t* block) {
  Group group;
  std::memcpy(&group.scale, block, 2);
  const float scale = from_f16(group.scale);
  if (source == Source::q8_0) {
    group.minimum = to_f16(-128.0f * scale);
    for (int i = 0; i < GROUP; i++) group.q[i] = static_cast<uint8_t>(block[2 + i] ^ 0x80);
    return group;
  }
  const uint8_t* halves = block + (source == Source::q4_1 ? 4 : 2);
  if (source == Source::q4_1)
    std::memcpy(&group.minimum, block + 2, 2);
  else
    group.minimum = to_f16(-8.0f * scale);
  for (int i = 0; i < GROUP / 2; i++) group.q[i] = halves[i] & 15, group.q[i + 16] = halves[i] >> 4;
  return group;
}

// The nearest points of a grid from `minimum` in steps of `scale`, for `count` numbers; zero's for the rest. Returns the
// sum of squared differences.
float round_to(const float* row, int count, int top, Group& group) {
  const float scale = from_f16(group.scale), minimum = from_f16(group.minimum);
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
  group.minimum = to_f16(-128.0f * from_f16(group.scale));
  round_to(row, count, 255, group);
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
      const float error = round_to(row, count, TOP, group);
      if (error < least_error) least_error = error, best = group;
      if (turn == FITS || error == 0.0f || !fit(row, count, group)) break;
    }
  }
  return best;
}

uint16_t* factors_of(Format format, uint8_t* group) {
  return reinterpret_cast<uint16_t*>(group + group_bytes(format) - 64);
}

// Puts a group into lane `lane` of its panel.
void put(Format format, uint8_t* to, int lane, const Group& group) {
  for (int i = 0; i < GROUP; i++) {
    const int line = i / 4, at = (lane * 4) + i % 4;
    if (format == Format::int8) {
      to[line * 64 + at] = group.q[i];
    } else {
      uint8_t& both = to[line % 4 * 64 + at];
      both = line < 4 ? (both & 0xf0) | group.q[i] : (both & 0x0f) | static_cast<uint8_t>(group.q[i] << 4);
    }
  }
  uint16_t* factors = factors_of(format, to);
  factors[lane] = group.scale, factors[PANEL + lane] = group.minimum;
}

}  // namespace

void pack(Matrix& matrix, int first, int rows, Source source, const void* from, const int32_t* order) {
  const int groups = matrix.groups(), size = group_bytes(matrix.format);
  const size_t row_bytes =
      source == Source::f32 ? matrix.inputs * sizeof(float) : matrix.inputs / GROUP * block_bytes(source);
  for (int i = 0; i < rows; i++) {
    const uint8_t* row = static_cast<const uint8_t*>(from) + static_cast<size_t>(order ? order[i] : i) * row_bytes;
    const int lane = (first + i) % PANEL;
    uint8_t* to = matrix.panel((first + i) / PANEL);
    for (int g = 0; g < groups; g++, to += size) {
      const int count = matrix.inputs - g * GROUP < GROUP ? matrix.inputs - g * GROUP : GROUP;
      const float* numbers = reinterpret_cast<const float*>(row) + g * GROUP;
      if (matrix.format == Format::bf16) {
        uint16_t* pairs = reinterpret_cast<uint16_t*>(to);
        for (int k = 0; k < count; k++) pairs[(k / 2 * PANEL + lane) * 2 + k % 2] = to_bf16(numbers[k]);
      } else if (source == Source::f32) {
        const bool wide = matrix.format == Format::int8;
        put(matrix.format, to, lane, wide ? quantise_int8(numbers, count) : quantise_int4(numbers, count));
      } else {
        put(matrix.format, to, lane, from_gguf(source, row + g * block_bytes(source)));
      }
    }
  }
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const int lane = row % PANEL, size = group_bytes(matrix.format);
  const uint8_t* from = matrix.panel(row / PANEL);
  for (int g = 0; g < matrix.groups(); g++, from += size) {
    const int count = matrix.inputs - g * GROUP < GROUP ? matrix.inputs - g * GROUP : GROUP;
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(from + size - 64);
    const float scale = from_f16(factors[lane]), minimum = from_f16(factors[PANEL + lane]);
    for (int i = 0; i < count; i++) {
      const int line = i / 4, at = lane * 4 + i % 4;
      if (matrix.format == Format::bf16) {
        const uint16_t narrow = reinterpret_cast<const uint16_t*>(from)[(i / 2 * PANEL + lane) * 2 + i % 2];
        const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
        std::memcpy(out + g * GROUP + i, &bits, 4);
      } else if (matrix.format == Format::int8) {
        out[g * GROUP + i] = std::fma(scale, static_cast<float>(from[line * 64 + at]), minimum);
      } else {
        const int q = line < 4 ? from[line * 64 + at] & 15 : from[(line - 4) * 64 + at] >> 4;
        out[g * GROUP + i] = std::fma(scale, static_cast<float>(q), minimum);
      }
    }
  }
}

}  // namespace baton
