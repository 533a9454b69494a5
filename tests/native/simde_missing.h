// The AVX-512 intrinsics that the kernels use and Debian's SIMDe 0.7.4 lacks, by their documented meaning, one lane at a time; and a fused
// multiply-add that rounds once, as the hardware does (SIMDe's rounds twice). Test only: given to the compiler with -include, before
// csrc/cpu/simd.h. A newer SIMDe defines the missing ones as macros, which are then left alone.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/simde-f16.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

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
