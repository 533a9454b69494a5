// The AVX-512 intrinsics that the kernels use and Debian's SIMDe 0.7.4 lacks, by their documented meaning, one lane at a time; and a fused
// multiply-add that rounds once, as the hardware does (SIMDe's rounds twice). Test only: given to the compiler with -include, before
// csrc/cpu/simd.h. A newer SIMDe defines the missing ones as macros, which are then left alone.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/simde-f16.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

#ifndef _mm512_maskz_loadu_epi8
static inline __m512i _mm512_maskz_loadu_epi8(uint64_t mask, const void* p) {
  uint8_t out[64];
  for (int i = 0; i < 64; i++) out[i] = mask >> i & 1 ? ((const uint8_t*)p)[i] : 0;
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm256_maskz_loadu_epi16
static inline __m256i _mm256_maskz_loadu_epi16(uint16_t mask, const void* p) {
  uint16_t out[16];
  for (int i = 0; i < 16; i++) out[i] = mask >> i & 1 ? ((const uint16_t*)p)[i] : 0;
  __m256i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_cvtepu16_epi32
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  uint16_t in[16];
  uint32_t out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = in[i];
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_cvtepu8_epi32
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  uint8_t in[16];
  uint32_t out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = in[i];
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_cvtepi32_epi16  // truncates
static inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  uint32_t in[16];
  uint16_t out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = (uint16_t)in[i];
  __m256i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_cvtph_ps
static inline __m512 _mm512_cvtph_ps(__m256i a) {
  uint16_t in[16];
  float out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = simde_float16_to_float32(simde_uint16_as_float16(in[i]));
  __m512 r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_cvtps_ph  // to nearest even, whatever the mode: the kernels ask for no other
static inline __m256i pk_cvtps_ph(__m512 a) {
  float in[16];
  uint16_t out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = simde_float16_as_uint16(simde_float16_from_float32(in[i]));
  __m256i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#define _mm512_cvtps_ph(a, rounding) pk_cvtps_ph(a)
#endif

#ifndef _mm_maskz_loadu_epi8  // reads no byte that the mask leaves out
static inline __m128i _mm_maskz_loadu_epi8(uint16_t mask, const void* from) {
  uint8_t out[16] = {0};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) out[i] = ((const uint8_t*)from)[i];
  __m128i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_mask_storeu_ps  // writes no lane that the mask leaves out
static inline void _mm512_mask_storeu_ps(void* to, uint16_t mask, __m512 a) {
  float in[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy((char*)to + 4 * i, in + i, 4);
}
#endif

#ifndef _mm512_i32gather_ps  // of floats, scale 4: the kernels ask for no other
static inline __m512 pk_gather(__m512i indices, const float* from) {
  int32_t in[16];
  float out[16];
  memcpy(in, &indices, sizeof in);
  for (int i = 0; i < 16; i++) out[i] = from[in[i]];
  __m512 r;
  memcpy(&r, out, sizeof out);
  return r;
}
#define _mm512_i32gather_ps(indices, from, scale) pk_gather(indices, from)
#endif

#ifndef _mm512_rcp14_ps  // as far off as its documentation allows: the inverse cut off behind 14 bits
static inline __m512 _mm512_rcp14_ps(__m512 a) {
  float v[16];
  memcpy(v, &a, sizeof v);
  for (int i = 0; i < 16; i++) {
    v[i] = 1.0f / v[i];
    uint32_t bits;
    memcpy(&bits, &v[i], sizeof bits);
    bits &= ~0x1ffu;
    memcpy(&v[i], &bits, sizeof bits);
  }
  __m512 r;
  memcpy(&r, v, sizeof r);
  return r;
}
#endif

#ifndef _mm512_fpclass_ps_mask  // whether numbers are subnormal: the kernels ask for nothing else
static inline uint16_t pk_subnormal_mask(__m512 a) {
  uint32_t in[16];
  uint16_t mask = 0;
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; i++) mask |= (uint16_t)((in[i] & 0x7fffffff && !(in[i] & 0x7f800000)) << i);
  return mask;
}
#define _mm512_fpclass_ps_mask(a, classes) pk_subnormal_mask(a)
#endif

#ifndef _mm512_maskz_loadu_epi32  // reads no lane that the mask leaves out
static inline __m512i _mm512_maskz_loadu_epi32(uint16_t mask, const void* from) {
  uint32_t out[16] = {0};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(out + i, (const char*)from + 4 * i, 4);
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#undef _mm512_fmadd_ps
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {  // in double the product is exact and the sum's error far below a float's
  float x[16], y[16], z[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  memcpy(z, &c, sizeof z);
  for (int i = 0; i < 16; i++) z[i] = (float)((double)x[i] * y[i] + z[i]);
  __m512 r;
  memcpy(&r, z, sizeof z);
  return r;
}

#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0
#endif

#ifndef _mm512_maskz_loadu_epi16  // reads no lane that the mask leaves out
static inline __m512i _mm512_maskz_loadu_epi16(uint32_t mask, const void* from) {
  uint16_t out[32] = {0};
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) memcpy(out + i, (const char*)from + 2 * i, 2);
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#endif

#ifndef _mm512_mask_storeu_epi16  // writes no lane that the mask leaves out
static inline void _mm512_mask_storeu_epi16(void* to, uint32_t mask, __m512i a) {
  uint16_t in[32];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) memcpy((char*)to + 2 * i, in + i, 2);
}
#endif

// ---- bf16: two numbers a 32-bit lane; to nearest even, and what is below 2^-126 is zero, on either side
static inline float pk_bf16_value(uint16_t bits) {
  uint32_t u = (uint32_t)bits << 16;
  if (!(u & 0x7f800000)) u &= 0x80000000;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t pk_bf16_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (!(u & 0x7f800000)) return (uint16_t)(u >> 16 & 0x8000);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
// sum + the products of two pairs, one after the other, in fp32.
static inline float pk_add_pairs(float sum, const uint16_t* a, const uint16_t* b) {
  for (int i = 0; i < 2; i++) sum += pk_bf16_value(a[i]) * pk_bf16_value(b[i]);
  return sum;
}

#define __m512bh __m512i
#undef _mm512_cvtne2ps_pbh
static inline __m512i pk_cvtne2ps_pbh(__m512 high, __m512 low) {
  float in[32];
  uint16_t out[32];
  memcpy(in, &low, 64);
  memcpy(in + 16, &high, 64);
  for (int i = 0; i < 32; i++) out[i] = pk_bf16_bits(in[i]);
  __m512i r;
  memcpy(&r, out, sizeof out);
  return r;
}
#define _mm512_cvtne2ps_pbh(a, b) pk_cvtne2ps_pbh(a, b)

#undef _mm512_dpbf16_ps
static inline __m512 pk_dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
  float sums[16];
  uint16_t x[32], y[32];
  memcpy(sums, &sum, sizeof sums);
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; i++) sums[i] = pk_add_pairs(sums[i], x + 2 * i, y + 2 * i);
  memcpy(&sum, sums, sizeof sums);
  return sum;
}
#define _mm512_dpbf16_ps(sum, a, b) pk_dpbf16_ps(sum, a, b)

// ---- AMX: eight tiles of 16 rows of 64 bytes a thread, whatever is configured
static thread_local uint16_t pk_tiles[8][16][32];
static inline void pk_tile_load(int tile, const void* from, long stride) {
  for (int i = 0; i < 16; i++) memcpy(pk_tiles[tile][i], (const char*)from + i * stride, 64);
}
static inline void pk_tile_store(int tile, void* to, long stride) {
  for (int i = 0; i < 16; i++) memcpy((char*)to + i * stride, pk_tiles[tile][i], 64);
}
static inline void pk_tile_product(int c, int a, int b) {
  float sums[16][16];
  memcpy(sums, pk_tiles[c], sizeof sums);
  for (int i = 0; i < 16; i++)
    for (int pair = 0; pair < 16; pair++)
      for (int j = 0; j < 16; j++) sums[i][j] = pk_add_pairs(sums[i][j], &pk_tiles[a][i][2 * pair], &pk_tiles[b][pair][2 * j]);
  memcpy(pk_tiles[c], sums, sizeof sums);
}
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(pk_tiles[tile], 0, sizeof pk_tiles[tile])
#define _tile_loadd(tile, from, stride) pk_tile_load(tile, from, stride)
#define _tile_stored(tile, to, stride) pk_tile_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) pk_tile_product(c, a, b)
