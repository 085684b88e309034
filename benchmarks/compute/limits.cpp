// The hardware's limits on one core, as one line of JSON: memory read in GB/s, and giga-operations per second of the
// dot-product instructions that the kernels use (a multiply-add is two).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simd.h"

using namespace baton;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Do>
double best_of(int runs, Do body) {
  double best = 1e9;
  for (int i = 0; i < runs; i++) {
    const double start = now();
    body();
    const double took = now() - start;
    best = took < best ? took : best;
  }
  return best;
}

double read_gb_s() {
  const size_t bytes = size_t{384} << 20;
  char* memory = static_cast<char*>(std::aligned_alloc(4096, bytes));
  std::memset(memory, 1, bytes);
  vi all[4] = {};
  const double seconds = best_of(5, [&] {
    for (size_t i = 0; i < bytes; i += 256)
      for (int j = 0; j < 4; j++) all[j] ^= load(reinterpret_cast<int32_t*>(memory + i + 64 * j));
    for (vi& x : all) asm volatile("" : "+m"(x));
  });
  std::free(memory);
  return bytes / seconds / 1e9;
}

constexpr long COUNT = 4'000'000;
constexpr int CHAINS = 12;

// Keeps a chain in its register: hides its value from the compiler without taking its address.
template <class T>
BATON_INLINE void opaque(T& chain) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(chain));
#else
  asm volatile("" : "+m"(chain));  // two registers, which no constraint names
#endif
}

// The chains are locals of the timed body: captured chains would be in memory, and each step would wait for it.
template <class T, class Step>
double giga_ops(int per_step, Step step) {
  const double seconds = best_of(5, [step] {
    T chain[CHAINS] = {};
    for (long i = 0; i < COUNT / CHAINS; i++) {
#pragma GCC unroll 12
      for (int j = 0; j < CHAINS; j++) {
        chain[j] = step(chain[j]);
        opaque(chain[j]);
      }
    }
  });
  return COUNT / seconds * per_step / 1e9;
}

}  // namespace

int main() {
  vi one = splat(0x3f803f80), bytes = splat(0x01010101);
  opaque(one), opaque(bytes);
  const double bf16 = giga_ops<vf>(64, [one](vf x) { return dot_bf16(x, one, one); });
  const double int8 = giga_ops<vi>(128, [bytes](vi x) { return dot_bytes(x, bytes, bytes); });
  std::printf("{\"read_gb_s\": %.1f, \"bf16_gop_s\": %.0f, \"int8_gop_s\": %.0f}\n", read_gb_s(), bf16, int8);
}
