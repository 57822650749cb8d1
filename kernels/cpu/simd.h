// Vectors of the width that the instruction set of this translation unit has, in GCC/Clang vector extensions:
// one source, compiled once an instruction set. Only what the extensions cannot say is spelled out per set.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ZO_BYTES 64
#elif defined(__AVX2__)
#define ZO_BYTES 32
#else
#define ZO_BYTES 16
#endif

#define ZO_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = ZO_BYTES / 4;  // 32-bit lanes
constexpr int PAIRS = ZO_BYTES / 8;  // 64-bit lanes

typedef float vf __attribute__((vector_size(ZO_BYTES)));
typedef int32_t vi __attribute__((vector_size(ZO_BYTES)));
typedef uint32_t vu __attribute__((vector_size(ZO_BYTES)));
typedef uint64_t vq __attribute__((vector_size(ZO_BYTES)));
typedef uint16_t vh __attribute__((vector_size(ZO_BYTES / 2)));
typedef int16_t vs __attribute__((vector_size(ZO_BYTES / 2)));
typedef int8_t vb __attribute__((vector_size(ZO_BYTES / 4)));

template <class V, class S> ZO_INLINE V splat(S x) { return V{} + x; }
template <class V> ZO_INLINE V load(const void *p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> ZO_INLINE void store(void *p, V v) { memcpy(p, &v, sizeof v); }
// A store; PAST the caches if they would lose it before it is read, p then a multiple of sizeof v.
template <bool PAST, class V> ZO_INLINE void write(void *p, V v) {
#if defined(__SSE2__)
  if constexpr (PAST) {
#if defined(__AVX512F__)
    if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i *)p, (__m512i)v);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i *)p, (__m256i)v);
#endif
    if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i *)p, (__m128i)v);
  }
#endif
  store(p, v);
}
ZO_INLINE vf as_f(vu x) { return (vf)x; }
ZO_INLINE vu as_u(vf x) { return (vu)x; }
ZO_INLINE vu select(vi mask, vu a, vu b) { return mask ? a : b; }  // a comparison's mask

// 0, 1, 2, ... in 32-bit lanes.
ZO_INLINE vu iota() {
  vu v{};
  for (int i = 0; i < LANES; i++) v[i] = (uint32_t)i;
  return v;
}

// Low 32 bits of each 64-bit lane times a 32-bit constant, all 64 bits of the product.
ZO_INLINE vq mul32(vq a, uint32_t m) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

ZO_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// a[0], b[0], a[1], b[1] of each 128 bits (low) and a[2], b[2], a[3], b[3] (high).
ZO_INLINE void interleave(vu a, vu b, vu &low, vu &high) {
#if defined(__AVX512F__)
  low = (vu)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
  high = (vu)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  low = (vu)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  high = (vu)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
#else
  low = vu{a[0], b[0], a[1], b[1]};
  high = vu{a[2], b[2], a[3], b[3]};
#endif
}

// The same for the 64-bit halves of each 128 bits.
ZO_INLINE void interleave64(vq a, vq b, vq &low, vq &high) {
#if defined(__AVX512F__)
  low = (vq)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  high = (vq)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  low = (vq)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  high = (vq)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  low = vq{a[0], b[0]};
  high = vq{a[1], b[1]};
#endif
}

// Correctly rounded uint32 -> float32: both halves are exact, the sum rounds once.
ZO_INLINE vf to_float(vu x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)x);
#else
  return __builtin_convertvector((vi)(x >> 16), vf) * 65536.0f + __builtin_convertvector((vi)(x & 0xffffu), vf);
#endif
}
ZO_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// 16 or 8 bits in 32-bit lanes, and the low bits of the lanes back. GCC takes many instructions for most conversions.
#if defined(__AVX512F__)
ZO_INLINE vu widen(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
ZO_INLINE vi widen(vs x) { return (vi)_mm512_cvtepi16_epi32((__m256i)x); }
ZO_INLINE vi widen(vb x) { return (vi)_mm512_cvtepi8_epi32((__m128i)x); }
ZO_INLINE void narrow(vu x, vh &low) { low = (vh)_mm512_cvtepi32_epi16((__m512i)x); }
ZO_INLINE void narrow(vu x, vb &low) { low = (vb)_mm512_cvtepi32_epi8((__m512i)x); }
#else
ZO_INLINE void narrow(vu x, vh &low) { low = __builtin_convertvector(x, vh); }
#if defined(__AVX2__)
ZO_INLINE vu widen(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
ZO_INLINE vi widen(vs x) { return (vi)_mm256_cvtepi16_epi32((__m128i)x); }
ZO_INLINE vi widen(vb x) { return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x)); }
ZO_INLINE void narrow(vu x, vb &low) {
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400));
  low = (vb)_mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
#else
ZO_INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
ZO_INLINE vi widen(vs x) { return __builtin_convertvector(x, vi); }
#if defined(__SSE2__)
ZO_INLINE vi widen(vb x) {
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128((int)x), _mm_cvtsi32_si128((int)x));
  return (vi)_mm_unpacklo_epi16(twice, twice) >> 24;
}
ZO_INLINE void narrow(vu x, vb &low) {
  const __m128i bytes = (__m128i)(x & 0xffu), words = _mm_packs_epi32(bytes, bytes);
  low = (vb)_mm_cvtsi128_si32(_mm_packus_epi16(words, words));
}
#else
ZO_INLINE vi widen(vb x) { return __builtin_convertvector(x, vi); }
ZO_INLINE void narrow(vu x, vb &low) { low = __builtin_convertvector(x, vb); }
#endif
#endif
#endif
template <class V> ZO_INLINE V narrow(vu x) { V low; narrow(x, low); return low; }

// The high 16 bits of each lane.
ZO_INLINE vh high_halves(vu x) {
#if defined(__AVX512BW__)
  return (vh)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)(iota() * 0x40004u + 0x30001u), (__m512i)x));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i high = (__m256i)(x >> 16);
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  return narrow<vh>(x >> 16);
#endif
}

// The high 16 bits rounded to nearest even, in their place.
ZO_INLINE vu nearest_high(vu x) {
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(0x10000));
  const vu up = x + 0x7fffu;
  return (vu)_mm512_mask_sub_epi32((__m512i)up, odd, (__m512i)up, _mm512_set1_epi32(-1));
#else
  return x + 0x7fffu + ((x >> 16) & 1u);
#endif
}

// Whether |x| <= limit in every lane (false for NaN).
ZO_INLINE bool all_within(vf x, float limit) {
  const vu magnitude = as_u(x) & 0x7fffffffu;
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)magnitude, _mm512_set1_ps(limit), _CMP_NLE_UQ) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)magnitude, _mm256_set1_ps(limit), _CMP_NLE_UQ)) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)magnitude, _mm_set1_ps(limit))) == 0;
#else
  for (int i = 0; i < LANES; i++)
    if (!(as_f(magnitude)[i] <= limit)) return false;
  return true;
#endif
}

}  // namespace
