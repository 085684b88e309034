// The interface to Python, by ctypes. The Python side checks shapes. Calls return 0, or 1 when memory ran out.
#include <new>

#include "model.h"

using namespace baton;

namespace {

template <class Do>
int guarded(Do body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

Matrix& matrix_of(Model& model, int layer, int slot) {
  if (layer >= 0) return model.weights().layers[layer].slots[slot];
  return slot == 0 ? model.weights().head : model.weights().embedding;
}

Array<float>& vector_of(Model& model, int layer, int slot) {
  return layer >= 0 ? model.vectors(layer).of[slot] : model.norm();
}

}  // namespace

extern "C" {

// A model without weights; null when memory ran out.
Model* baton_open(const Config* config, const float* inverse_frequencies) {
  Model* model = nullptr;
  guarded([&] { model = new Model(*config, inverse_frequencies); });
  return model;
}

void baton_close(Model* model) { delete model; }

// Allocates a matrix. Layer -1 is outside the layers: slot 0 the head, slot 1 the embedding.
int baton_shape(Model* model, int layer, int slot, int format, int outputs, int inputs) {
  return guarded([&] {
    Arena& memory = model->weights().memory;
    matrix_of(*model, layer, slot).shape(static_cast<Format>(format), outputs, inputs, memory);
  });
}

int baton_pack(Model* model, int layer, int slot, int first, int rows, int source, const void* from,
               const int32_t* order, const float* importance) {
  return guarded([&] {
    pack(matrix_of(*model, layer, slot), first, rows, static_cast<Source>(source), from, order, importance);
  });
}

// Row `row` of a matrix as numbers [inputs].
void baton_row(Model* model, int layer, int slot, int row, float* out) {
  unpack_row(matrix_of(*model, layer, slot), row, out);
}

// Sets a vector. Layer -1 is the final norm.
int baton_vector(Model* model, int layer, int slot, const float* from, int count) {
  return guarded([&] { std::memcpy(vector_of(*model, layer, slot).reserve(count), from, count * sizeof(float)); });
}

int baton_step(Model* model, void* pool, const Batch* batch) {
  return guarded([&] { model->step(pool, *batch); });
}

int64_t baton_bytes(Model* model) {
  int64_t total = 0;
  model->weights().each([&](const Matrix& matrix) { total += matrix.bytes(); });
  return total;
}

// A checksum of all packed matrices: FNV-1a by 8 bytes, continued from matrix to matrix.
uint64_t baton_checksum(Model* model) {
  uint64_t sum = 0xcbf29ce484222325;
  model->weights().each([&](const Matrix& matrix) {
    const size_t bytes = matrix.bytes();
    for (size_t at = 0; at < bytes; at += sizeof sum) {
      uint64_t word;
      std::memcpy(&word, matrix.data + at, sizeof word);
      sum = (sum ^ word) * 0x100000001b3;
      sum ^= sum >> 32;  // carries the word's high bits to lower ones
    }
  });
  return sum;
}

// Reads a byte of every page of the weights and of `count` blocks of a pool, `bytes` each. A peer may be writing the
// blocks: the values read do not matter.
void baton_touch(Model* model, const uint8_t* pool, const int64_t* blocks, int64_t count, int64_t bytes) {
  constexpr int64_t PAGE = 4096;
  const auto touch = [](const volatile uint8_t* from, int64_t size) {
    for (int64_t at = 0; at < size; at += PAGE) from[at];
  };
  model->weights().each([&](const Matrix& matrix) { touch(matrix.data, matrix.bytes()); });
  for (int64_t i = 0; i < count; i++) touch(pool + blocks[i] * bytes, bytes);
}

// Starts or stops timing; copies the seconds of each part so far, [PARTS], and clears them.
void baton_profile(Model* model, int on, double* seconds) {
  Profile& profile = model->profile();
  std::memcpy(seconds, profile.seconds, sizeof profile.seconds);
  profile = Profile{};
  profile.on = on;
}

}  // extern "C"
