// Sixteen lanes of 32 bits: one AVX-512 register, or two of AVX2.
//
// Every floating-point operation that a result depends on is explicit (fma included; the build forbids contraction), so
// that an element gets the same bits from every instance of a kernel.
#pragma once

// GCC 12 warns about its own inlined headers (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cmath>
#include <cstdint>
#include <cstring>

#define BATON_INLINE static inline __attribute__((always_inline))

namespace baton {

constexpr int LANES = 16;

typedef float vf __attribute__((vector_size(64), may_alias));
typedef int32_t vi __attribute__((vector_size(64), may_alias));
typedef float vf_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi_u __attribute__((vector_size(64), aligned(4), may_alias));

typedef uint16_t bf16;

BATON_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
BATON_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
BATON_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_u*>(p); }
BATON_INLINE void store(int32_t* p, vi x) { *reinterpret_cast<vi_u*>(p) = x; }
BATON_INLINE vf splat(float x) { return x - vf{}; }  // x + 0 would not be x for -0, so it would be computed
BATON_INLINE vi splat(int32_t x) { return vi{} + x; }
BATON_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
BATON_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
BATON_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// Four bytes, or a pair of bf16, in every lane.
BATON_INLINE vi splat_at(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return splat(x);
}

#if defined(__AVX512F__)

BATON_INLINE __m512i raw(vi x) { return reinterpret_cast<__m512i>(x); }

BATON_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
BATON_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
BATON_INLINE vi round_to_int(vf x) { return reinterpret_cast<vi>(_mm512_cvtps_epi32(x)); }
BATON_INLINE vf load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BATON_INLINE vi load_u16(const uint16_t* p) {
  return reinterpret_cast<vi>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
// The low byte of every lane.
BATON_INLINE void store_bytes(int8_t* p, vi x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(raw(x)));
}
BATON_INLINE vi load_bytes(const int8_t* p) {
  return reinterpret_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
BATON_INLINE void store_u16(uint16_t* p, vi x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(raw(x)));
}

#else

struct Halves {
  __m256 low, high;
};
BATON_INLINE Halves split(vf x) {
  Halves h;
  std::memcpy(&h, &x, 64);
  return h;
}
BATON_INLINE vf join(__m256 low, __m256 high) {
  vf x;
  std::memcpy(&x, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&x) + 32, &high, 32);
  return x;
}
BATON_INLINE vi join(__m256i low, __m256i high) {
  return as_int(join(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)));
}
BATON_INLINE __m256i low_of(vi x) { return _mm256_castps_si256(split(as_float(x)).low); }
BATON_INLINE __m256i high_of(vi x) { return _mm256_castps_si256(split(as_float(x)).high); }

BATON_INLINE vf fma(vf a, vf b, vf c) {
  Halves x = split(a), y = split(b), z = split(c);
  return join(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
BATON_INLINE vf max(vf a, vf b) {
  Halves x = split(a), y = split(b);
  return join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
BATON_INLINE vi round_to_int(vf x) {
  Halves h = split(x);
  return join(_mm256_cvtps_epi32(h.low), _mm256_cvtps_epi32(h.high));
}
BATON_INLINE vf load_f16(const uint16_t* p) {
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return join(_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1)));
}
BATON_INLINE vi load_u16(const uint16_t* p) {
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return join(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1)));
}
BATON_INLINE void store_bytes(int8_t* p, vi x) {
  for (int i = 0; i < LANES; i++) p[i] = static_cast<int8_t>(x[i]);
}
BATON_INLINE vi load_bytes(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return join(_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
}
BATON_INLINE void store_u16(uint16_t* p, vi x) {
  for (int i = 0; i < LANES; i++) p[i] = static_cast<uint16_t>(x[i]);
}

#endif

// bf16 to float is a shift.
BATON_INLINE vf load_bf16(const bf16* p) { return as_float(load_u16(p) << 16); }

// The nearest bf16, ties to even, in the low half of each lane.
BATON_INLINE vi to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vi>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))));
#else
  vi bits = as_int(x);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
#endif
}
BATON_INLINE void store_bf16(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  store_u16(p, to_bf16(x));
#endif
}
BATON_INLINE void store_bf16(bf16* p, vf x, vf y) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
#else
  store_bf16(p, x), store_bf16(p + LANES, y);
#endif
}
BATON_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// acc + a.low * b.low + a.high * b.high per lane, a and b pairs of bf16.
BATON_INLINE vf dot_bf16(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const vi high = splat(static_cast<int32_t>(0xffff0000u));
  acc = fma(as_float(a & high), as_float(b & high), acc);
  return fma(as_float(a << 16), as_float(b << 16), acc);
#endif
}

// acc + the four products of unsigned bytes of u and signed bytes of s, per lane; exact.
BATON_INLINE vi dot_bytes(vi acc, vi u, vi s) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vi>(_mm512_dpbusd_epi32(raw(acc), raw(u), raw(s)));
#elif defined(__AVX512BW__)
  const __m512i even = _mm512_madd_epi16(
      _mm512_and_si512(raw(u), _mm512_set1_epi16(0xff)), _mm512_srai_epi16(_mm512_slli_epi16(raw(s), 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(raw(u), 8), _mm512_srai_epi16(raw(s), 8));
  return acc + reinterpret_cast<vi>(even) + reinterpret_cast<vi>(odd);
#else
  auto half = [](__m256i u8, __m256i s8) __attribute__((always_inline)) {
    const __m256i even = _mm256_madd_epi16(
        _mm256_and_si256(u8, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8)));
  };
  return acc + join(half(low_of(u), low_of(s)), half(high_of(u), high_of(s)));
#endif
}

BATON_INLINE float sum(vf x) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The largest lane: exact, so its order is free.
BATON_INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  Halves h = split(x);
  __m256 a = _mm256_max_ps(h.low, h.high);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
#endif
}

// 2^x for x <= 0, to a few ulp, exactly 1 for 0: a polynomial of the fraction, times 2^n by the exponent's bits.
// Subnormal results may be 0.
BATON_INLINE vf exp2_of_negative(vf x) {
#if defined(__AVX512DQ__)
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
#else
  x = max(x, splat(-127.0f));
  vi n = round_to_int(x);
  n = n + (to_float(n) > x);  // a true comparison is -1
  const vf f = x - to_float(n);
#endif
  vf p = splat(1.86718290e-03f);
  p = fma(p, f, splat(9.01668798e-03f));
  p = fma(p, f, splat(5.58004454e-02f));
  p = fma(p, f, splat(2.40164161e-01f));
  p = fma(p, f, splat(6.93151355e-01f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512DQ__)
  return _mm512_scalef_ps(p, x);
#else
  return p * as_float((n + 127) << 23);
#endif
}

// x / (1 + e^-x), by e^-|x| so that nothing overflows.
BATON_INLINE vf silu(vf x) {
  const vf e = exp2_of_negative(as_float(as_int(x) | splat(INT32_MIN)) * 1.44269504f);
  const vf top = x < splat(0.0f) ? e : splat(1.0f);
  return x * top / (e + 1.0f);
}

}  // namespace baton
