// Packs weights into panels, and unpacks rows.
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

// The nearest of the points 0..top of a grid from `minimum`, whose step is 1 / `per_step`.
BATON_INLINE vf nearest(vf x, float per_step, float minimum, float top) {
  const vf q = to_float(round_to_int((x - splat(minimum)) * splat(per_step)));
  return -max(-max(q, vf{}), splat(-top));
}

float per_step(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// Eight bits: symmetric about zero.
Group quantise_int8(const float* row, int count) {
  float most = 0;
  for (int i = 0; i < count; i++) most = std::fmax(most, std::fabs(row[i]));
  Group group;
  group.scale = to_f16(most / 127.0f);
  const float scale = from_f16(group.scale), steps = per_step(scale);
  alignas(64) float x[GROUP] = {};
  std::memcpy(x, row, count * sizeof(float));
  for (int i = 0; i < GROUP; i += LANES) store(x + i, nearest(load(x + i), steps, -INT8_OFFSET * scale, 255.0f));
  for (int i = 0; i < GROUP; i++) group.q[i] = static_cast<uint8_t>(x[i]);
  return group;
}

// A 4-bit group before packing, and the weight of each number's squared error.
struct Fit {
  alignas(64) float x[GROUP], weight[GROUP], q[GROUP];

  // Rounds all to a grid. Returns the weighted sum of squared differences.
  float round_to(float scale, float minimum) {
    const float steps = per_step(scale);
    vf error = {};
    for (int i = 0; i < GROUP; i += LANES) {
      const vf k = nearest(load(x + i), steps, minimum, TOP);
      const vf off = fma(k, splat(scale), splat(minimum)) - load(x + i);
      store(q + i, k);
      error = fma(off * off, load(weight + i), error);
    }
    return sum(error);
  }

  // The line of least weighted squared distance to the points (q, x); false if all q are equal.
  bool line(float& scale, float& minimum) const {
    vf w = {}, wq = {}, wx = {}, wqq = {}, wqx = {};
    for (int i = 0; i < GROUP; i += LANES) {
      const vf by = load(weight + i), k = load(q + i), y = load(x + i);
      w += by, wq = fma(by, k, wq), wx = fma(by, y, wx), wqq = fma(by * k, k, wqq), wqx = fma(by * k, y, wqx);
    }
    const float n = sum(w), k = sum(wq) / n, y = sum(wx) / n, spread = sum(wqq) / n - k * k;
    if (!(spread > 0)) return false;
    scale = (sum(wqx) / n - k * y) / spread, minimum = y - scale * k;
    return scale > 0;
  }

  static constexpr float TOP = 15;
};

// Four bits: the grid of least weighted error among several. Each starts with a number of steps between the group's
// least and greatest number, fewer than 15 (a grid wider than the group) or more (which cuts the greatest off), and is
// then fitted to the rounded numbers.
Group quantise_int4(const float* row, const float* importance, int count) {
  constexpr int FITS = 2;
  Fit fit{};
  for (int i = 0; i < GROUP; i++) fit.x[i] = row[i < count ? i : 0];  // numbers beyond have no weight
  for (int i = 0; i < count; i++) fit.weight[i] = importance ? importance[i] : 1.0f;
  float least = fit.x[0], most = fit.x[0];
  for (int i = 1; i < GROUP; i++) least = std::fmin(least, fit.x[i]), most = std::fmax(most, fit.x[i]);
  Group best{};
  float least_error = INFINITY;
  for (int steps = 13; steps <= 18; steps++) {
    float scale = (most - least) / static_cast<float>(steps), minimum = least;
    for (int turn = 0; turn <= FITS; turn++) {
      Group group;
      group.scale = to_f16(scale), group.minimum = to_f16(minimum);
      const float error = fit.round_to(from_f16(group.scale), from_f16(group.minimum));
      if (error < least_error) {
        least_error = error, best = group;
        for (int i = 0; i < GROUP; i++) best.q[i] = static_cast<uint8_t>(fit.q[i]);
      }
      if (turn == FITS || error == 0.0f || !fit.line(scale, minimum)) break;
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

void pack(Matrix& matrix, int first, int rows, Source source, const void* from, const int32_t* order,
          const float* importance) {
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
        const float* weights = importance ? importance + g * GROUP : nullptr;
        put(matrix, panel, lane, g,
            matrix.format == Format::int8 ? quantise_int8(numbers, count) : quantise_int4(numbers, weights, count));
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
