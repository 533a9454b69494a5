// One SIMD vocabulary for every CPU level: each ISA's translation unit includes this with its own flags and
// PK_NS. A vector holds VW floats. What the vector extensions of GCC and Clang can say portably is said so;
// the rest is one intrinsic a function.
#pragma once
#include <stdint.h>
#include <string.h>

#include <utility>

#include "../include/peftkern.h"

#if defined(PK_AVX512) && !defined(PK_SIMDE)
#include <immintrin.h>
#elif defined(PK_AVX2)
#include <immintrin.h>
#elif defined(PK_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#endif

namespace PK_NS {

#if defined(PK_AVX512)
constexpr int VW = 16, TILE_ROWS = 12;
#elif defined(PK_AVX2)
constexpr int VW = 8, TILE_ROWS = 6;
#else
constexpr int VW = 4, TILE_ROWS = 6;
#endif
constexpr int LANES = 2 * VW;  // a panel's width: two vectors, so that every loaded broadcast feeds two FMAs

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// f of a value of an operand's type, by which it knows the type.
template <typename F>
static inline void by_dtype(int dtype, F&& f) {
  if (dtype == PK_F32) f(float{});
  else if (dtype == PK_BF16) f(bf16{});
  else f(f16{});
}

static inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf set1(float a) { return a - vf{}; }
static inline vi loadi(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline vf fma(vf a, vf b, vf c) {
#if defined(PK_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PK_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// ---- scalar conversions, round to nearest even
static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) { return bits_to_float((uint32_t)v.bits << 16); }
static inline float to_float(f16 v) {
  uint32_t sign = (uint32_t)(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent's bias from 15 to 127; subnormals come out right because the product is exact.
  return bits_to_float(float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f) | sign);
}
static inline void from_float(float f, float* out) { *out = f; }
static inline void from_float(float f, bf16* out) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) out->bits = (uint16_t)(u >> 16 | 0x40);
  else out->bits = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(float f, f16* out) {
  uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = (uint16_t)(sign | 0x7e00);
    return;
  }
  if (magnitude >= 0x477ff000) {
    out->bits = (uint16_t)(sign | 0x7c00);
    return;
  }
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    out->bits = (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
    return;
  }
  out->bits = (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// ---- vector loads and stores of any activation dtype
static inline vf loadx(const float* p) { return load(p); }
static inline vf loadx(const bf16* p) {
#if defined(PK_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(PK_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vu u;
  for (int i = 0; i < VW; i++) u[i] = (uint32_t)p[i].bits << 16;
  return (vf)u;
#endif
}
static inline vf loadx(const f16* p) {
#if defined(PK_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(PK_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < VW; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void storex(float* p, vf v) { store(p, v); }
static inline vu round_bf16(vf v) {  // bf16 bits in the low half of each lane, NaN kept quiet
  vu u = (vu)v, nan = (vu)(v != v);
  vu r = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return (r & ~nan) | ((u >> 16 | 0x40) & nan);
}
#if defined(PK_AVX512)
// The same, 16 of 16 bits.
static inline __m256i bits_of_bf16(vf v) {
  const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const auto nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
#endif
static inline void storex(bf16* p, vf v) {
#if defined(PK_AVX512)
  _mm256_storeu_si256((__m256i*)p, bits_of_bf16(v));
#elif defined(PK_AVX2)
  const vu r = round_bf16(v);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)r, (__m256i)r), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  const vu r = round_bf16(v);
  for (int i = 0; i < VW; i++) p[i].bits = (uint16_t)r[i];
#endif
}
static inline void storex(f16* p, vf v) {
#if defined(PK_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PK_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VW; i++) from_float(v[i], &p[i]);
#endif
}

// ---- shuffles of two vectors, by a rule known at compile time: lane l of the result is lane RULE(l) of x,
// y. Clang wants the numbers as arguments, GCC before 12 as a vector.
template <int (*RULE)(int), typename V, int... L>
static inline V shuffle_lanes(V x, V y, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, RULE(L)...);
#else
  typedef decltype(x > y) Index;
  return __builtin_shuffle(x, y, Index{RULE(L)...});
#endif
}
template <int (*RULE)(int), typename V>
static inline V shuffle(V x, V y) {
  return shuffle_lanes<RULE>(x, y, std::make_integer_sequence<int, (int)(sizeof(V) / sizeof(x[0]))>{});
}

// The sum of all lanes, halves on halves.
template <int S>
constexpr int other_half(int l) {
  return l ^ S;
}
static inline float sum(vf v) {
#if defined(PK_AVX512)
  v += shuffle<other_half<8>>(v, v);
#endif
#if defined(PK_AVX512) || defined(PK_AVX2)
  v += shuffle<other_half<4>>(v, v);
#endif
  v += shuffle<other_half<2>>(v, v);
  v += shuffle<other_half<1>>(v, v);
  return v[0];
}

// ---- a VW x VW transpose in registers: log2(VW) rounds of two-input shuffles
template <int S>
constexpr int low_lane(int l) {
  return l & S ? VW + l - S : l;
}
template <int S>
constexpr int high_lane(int l) {
  return l & S ? VW + l : l + S;
}
template <int S>
static inline void exchange(vf& a, vf& b) {
  const vf x = a, y = b;
  a = shuffle<low_lane<S>>(x, y);
  b = shuffle<high_lane<S>>(x, y);
}
template <int S>
static inline void transpose_round(vf* r) {
  for (int i = 0; i < VW; i++)
    if (!(i & S)) exchange<S>(r[i], r[i + S]);
}
static inline void transpose(vf* r) {
#if defined(PK_AVX512)
  transpose_round<8>(r);
#endif
#if defined(PK_AVX512) || defined(PK_AVX2)
  transpose_round<4>(r);
#endif
  transpose_round<2>(r);
  transpose_round<1>(r);
}
// The sums of the elements of r[0], ..., r[VW - 1], a transposition's rows added as soon as they may be.
template <int S = VW / 2>
static inline vf sum_each(vf* r) {
  if constexpr (S == 0) return r[0];
  else {
    for (int i = 0; i < S; i++) {
      exchange<S>(r[i], r[i + S]);
      r[i] += r[i + S];
    }
    return sum_each<S / 2>(r);
  }
}

// ---- the 16-entry lookup
struct Table {
#if defined(PK_AVX512)
  vf all;
#elif defined(PK_AVX2)
  vf low, high;
  __m256i plane[4];  // byte j of every code, for the byte shuffle
#else
  float all[16];
#endif
};
static inline Table make_table(const float* code) {
  Table t;
#if defined(PK_AVX512)
  t.all = load(code);
#elif defined(PK_AVX2)
  t.low = load(code);
  t.high = load(code + 8);
  for (int j = 0; j < 4; j++) {
    alignas(16) uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(float_to_bits(code[i]) >> (8 * j));
    t.plane[j] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes));
  }
#else
  memcpy(t.all, code, sizeof t.all);
#endif
  return t;
}
// VW consecutive codes from VW/2 bytes, first element in the high nibble.
static inline vf lookup(const Table& t, const uint8_t* packed) {
#if defined(PK_AVX512)
  long long word;
  memcpy(&word, packed, 8);
  __m512i spread = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                            _mm512_set1_epi64(word));
  __m512i index =
      _mm512_srlv_epi32(spread, _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24));
  return (vf)_mm512_permutexvar_ps(index, (__m512)t.all);  // vpermps reads the low four bits only
#elif defined(PK_AVX2)
  int word;
  memcpy(&word, packed, 4);
  __m256i spread = _mm256_set1_epi32(word);
  __m256i index = _mm256_srlv_epi32(spread, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  __m256i sign = _mm256_sllv_epi32(spread, _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4));
  __m256 low = _mm256_permutevar8x32_ps((__m256)t.low, index),
         high = _mm256_permutevar8x32_ps((__m256)t.high, index);
  return (vf)_mm256_blendv_ps(low, high, (__m256)sign);
#else
  vf v;
  for (int i = 0; i < VW; i += 2) {
    v[i] = t.all[packed[i / 2] >> 4];
    v[i + 1] = t.all[packed[i / 2] & 15];
  }
  return v;
#endif
}

// A group of 64 codes from 32 bytes, as GROUP / VW vectors. AVX2 looks up bytes and interleaves them (29
// instructions against 48 for permutes of floats): its vector t then holds elements 4t ... 4t+3 and 32+4t ...
// 32+4t+3; elsewhere the order is natural.
constexpr int GROUP = 64;
static inline __attribute__((always_inline)) void lookup_group(const Table& t, const uint8_t* packed,
                                                               vf* out) {
#if defined(PK_AVX2)
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)packed), four = _mm256_set1_epi8(15);
  const __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four),
                second = _mm256_and_si256(bytes, four);
  const __m256i halves[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
  for (int h = 0; h < 2; h++) {
    __m256i p0 = _mm256_shuffle_epi8(t.plane[0], halves[h]), p1 = _mm256_shuffle_epi8(t.plane[1], halves[h]);
    __m256i p2 = _mm256_shuffle_epi8(t.plane[2], halves[h]), p3 = _mm256_shuffle_epi8(t.plane[3], halves[h]);
    __m256i a = _mm256_unpacklo_epi8(p0, p1), b = _mm256_unpacklo_epi8(p2, p3);
    __m256i c = _mm256_unpackhi_epi8(p0, p1), d = _mm256_unpackhi_epi8(p2, p3);
    out[4 * h] = (vf)_mm256_unpacklo_epi16(a, b);
    out[4 * h + 1] = (vf)_mm256_unpackhi_epi16(a, b);
    out[4 * h + 2] = (vf)_mm256_unpacklo_epi16(c, d);
    out[4 * h + 3] = (vf)_mm256_unpackhi_epi16(c, d);
  }
#else
  for (int j = 0; j < GROUP / VW; j++) out[j] = lookup(t, packed + j * VW / 2);
#endif
}
// The same in natural order.
static inline __attribute__((always_inline)) void lookup_group_natural(const Table& t, const uint8_t* packed,
                                                                       vf* out) {
  lookup_group(t, packed, out);
#if defined(PK_AVX2)
  vf v[8];
  for (int j = 0; j < 8; j++) v[j] = out[j];
  for (int j = 0; j < 4; j++) {
    out[j] = (vf)_mm256_permute2f128_ps((__m256)v[2 * j], (__m256)v[2 * j + 1], 0x20);
    out[j + 4] = (vf)_mm256_permute2f128_ps((__m256)v[2 * j], (__m256)v[2 * j + 1], 0x31);
  }
#endif
}

}  // namespace PK_NS
