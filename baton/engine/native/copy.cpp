// Copies blocks between pools with stores that bypass the cache: the reader is a process on another core, and such a
// store neither reads the line that it overwrites nor evicts the kernels' data.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t LINE = 64;
constexpr size_t STRIDE = 4 * LINE;
constexpr size_t AHEAD = 16 * LINE;  // prefetch distance; a prefetch past the end does nothing

// 4 lines, the target aligned to a line.
inline void stream(char* to, const char* from) {
  for (size_t at = 0; at < STRIDE; at += LINE) _mm_prefetch(from + AHEAD + at, _MM_HINT_NTA);
#ifdef __AVX512F__
  const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + LINE);
  const __m512i c = _mm512_loadu_si512(from + 2 * LINE), d = _mm512_loadu_si512(from + 3 * LINE);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + LINE), b);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * LINE), c);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 3 * LINE), d);
#else
  for (size_t at = 0; at < STRIDE; at += LINE) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + 32), high);
  }
#endif
}

void copy(char* to, const char* from, size_t bytes) {
  const size_t head = -reinterpret_cast<uintptr_t>(to) % LINE;
  if (bytes < head + STRIDE) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  size_t done = head;
  for (; done + STRIDE <= bytes; done += STRIDE) stream(to + done, from + done);
  std::memcpy(to + done, from + done, bytes - done);
}

}  // namespace

extern "C" {

// Block `sources[i]` of `from` becomes block `targets[i]` of `to`, for `count` blocks of `bytes` each.
void baton_copy_blocks(char* to, const char* from, const int64_t* targets, const int64_t* sources, int64_t count,
                       int64_t bytes) {
  for (int64_t i = 0; i < count; i++) copy(to + targets[i] * bytes, from + sources[i] * bytes, bytes);
  _mm_sfence();  // streamed stores are visible before any later store of this thread
}

}  // extern "C"
