// Prepares rows for a product: normalises, rounds to bf16 or to bytes with a scale per group, interleaves.
#include "matrix.h"
#include "simd.h"

namespace baton {
namespace {

// RMSNorm (arXiv 1910.07467) of `inputs` numbers; to[inputs, padded) stays unchanged.
void normalise(const float* from, const float* weights, float eps, int inputs, float* to) {
  vf squares = {};
  int i = 0;
  for (; i + LANES <= inputs; i += LANES) squares = fma(load(from + i), load(from + i), squares);
  float total = sum(squares);
  for (int j = i; j < inputs; j++) total += from[j] * from[j];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(inputs) + eps);
  for (i = 0; i + LANES <= inputs; i += LANES) store(to + i, load(from + i) * factor * load(weights + i));
  for (; i < inputs; i++) to[i] = from[i] * factor * weights[i];
}

// One row as pairs of bf16, `height` pairs apart.
void to_pairs(const float* row, int inputs, int height, uint16_t* to) {
  alignas(64) uint16_t narrow[LANES];
  for (int i = 0; i < inputs; i += LANES) {
    store_bf16(narrow, load(row + i));
    for (int j = 0; j < LANES; j += 2, to += 2 * height) std::memcpy(to, narrow + j, 4);
  }
}

// One row as signed bytes, four together and `height` such fours apart, with the factors of its groups. The scale is
// the group's largest magnitude over 127.
void to_bytes(const float* row, int groups, int height, int8_t* to, float* scales, float* sums, int32_t* offsets) {
  const vi magnitude = splat(INT32_MAX);
  alignas(64) int8_t narrow[GROUP];
  for (int g = 0; g < groups; g++, row += GROUP, scales += height, sums += height, offsets += height) {
    const vf x = load(row), y = load(row + LANES);
    const float most = largest(max(as_float(as_int(x) & magnitude), as_float(as_int(y) & magnitude)));
    const float factor = most > 0 ? 127.0f / most : 0.0f;
    const vi p = round_to_int(x * factor), q = round_to_int(y * factor);
    store_bytes(narrow, p);
    store_bytes(narrow + LANES, q);
    for (int j = 0; j < GROUP; j += 4, to += 4 * height) std::memcpy(to, narrow + j, 4);
    const vi both = p + q;
#if defined(__AVX512F__)
    const int total = _mm512_reduce_add_epi32(raw(both));
#else
    int total = 0;
    for (int i = 0; i < LANES; i++) total += both[i];
#endif
    *scales = most / 127.0f;
    *sums = *scales * static_cast<float>(total);
    *offsets = -INT8_OFFSET * total;
  }
}

}  // namespace

void Operand::take(Format format, const float* from, int count, int inputs, int stride, const float* weights,
                   float eps) {
  rows = count, groups = (inputs + GROUP - 1) / GROUP;
  const size_t padded = static_cast<size_t>(groups) * GROUP, total = padded * count;
  static thread_local Array<float> buffer;
  float* line = buffer.reserve(padded);
  std::memset(line + inputs, 0, (padded - inputs) * sizeof(float));
  if (format == Format::bf16) {
    pairs.reserve(total);
  } else {
    bytes.reserve(total), scales.reserve(total / GROUP), sums.reserve(total / GROUP), offsets.reserve(total / GROUP);
  }
  height = tile_height(format, count);
  for (int row = 0; row < count; row++, from += stride) {
    const int first = row / height * height, at = row - first;
    const int tall = count - first < height ? count - first : height;
    if (weights)
      normalise(from, weights, eps, inputs, line);
    else
      std::memcpy(line, from, inputs * sizeof(float));
    if (format == Format::bf16)
      to_pairs(line, static_cast<int>(padded), tall, pairs.get() + first * padded + 2 * at);
    else
      to_bytes(line, groups, tall, bytes.get() + first * padded + 4 * at, scales.get() + first * groups + at,
               sums.get() + first * groups + at, offsets.get() + first * groups + at);
  }
}

}  // namespace baton
