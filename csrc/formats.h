// The one C++ home of the 4-bit formats, for the host and for GPUs: where a code lies in its byte, what a
// block's absmax is, and how elements become codes. docs/nf4-format.md is the specification. The table of 16
// codes (NF4, FP4) and that of a nested absmax's 256 are arguments everywhere.
//
// Products and sums are rounded one by one, as bitsandbytes does: the host's code is compiled with
// -ffp-contract=off, the device's says so by intrinsics.
#pragma once
#include "host_device.h"
#include "include/peftkern.h"

namespace pk {

constexpr int64_t LEAST_BLOCK = 32, MOST_BLOCK = 4096;      // elements that share an absmax
constexpr int64_t LEAST_NESTED = 1, MOST_NESTED = 1 << 30;  // absmax that share a nested one
constexpr int CODES = 16, ABSMAX_CODES = 256;

// ---- codes in memory

// The shift of element i's code in its byte, or in a little-endian word of eight: the first of a byte is in
// the high nibble.
PK_HOST_DEVICE int code_shift(int i) { return 4 * (i ^ 1); }

PK_HOST_DEVICE uint8_t pack_codes(int first, int second) {
  return (uint8_t)(first << code_shift(0) | second << code_shift(1));
}

// Element i's code.
PK_HOST_DEVICE int nibble(const uint8_t* packed, int64_t i) {
  return i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
}

// ---- absmax

PK_HOST_DEVICE int log2_of(int32_t power) {
#if defined(__CUDA_ARCH__)
  return __ffs(power) - 1;
#else
  return __builtin_ctz((unsigned)power);
#endif
}

// What no thread writes while a kernel runs.
template <typename T>
PK_HOST_DEVICE T read_only(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}

// One product, one sum, each rounded by itself.
PK_HOST_DEVICE float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PK_HOST_DEVICE float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// A nested absmax's fp32 value: `code` is the entry of its table of 256, `nested` the absmax of its block.
PK_HOST_DEVICE float denested(float code, float nested, float offset) {
  return plus(times(code, nested), offset);
}

// A 4-bit weight as kernels take it, by value.
struct Weight {
  const uint8_t* packed;  // [(n*k+1)/2]
  const float* code;      // [16]
  const float* absmax;    // [blocks], or null where nested:
  const uint8_t* absmax_8bit;
  const float* absmax_code;    // [256]
  const float* nested_absmax;  // [blocks >> nested_shift]
  const float* absmax_offset;  // [1]
  int shift, nested_shift;     // log2 of the block sizes
};
PK_HOST_DEVICE int nested_shift_of(const Weight& w) { return w.nested_shift; }
PK_HOST_DEVICE int nested_shift_of(const pk_weight& w) { return log2_of(w.nested_blocksize); }

// The fp32 absmax of a block of a Weight or a pk_weight.
template <typename AnyWeight>
PK_HOST_DEVICE float absmax_of(const AnyWeight& w, int64_t block) {
  if (w.absmax) return read_only(w.absmax + block);
  const float scaled = times(read_only(w.absmax_code + read_only(w.absmax_8bit + block)),
                             read_only(w.nested_absmax + (block >> nested_shift_of(w))));
  // Read last: as an argument of denested it costs GPUs a register.
  return plus(scaled, read_only(w.absmax_offset));
}

// ---- quantization

// What a block's elements are multiplied by before their code is looked up; 0 for a block of zeros.
PK_HOST_DEVICE float inverse_of(float absmax) {
#if defined(__CUDA_ARCH__)
  return absmax > 0 ? __fdiv_rn(1.0f, absmax) : 0.0f;
#else
  return absmax > 0 ? 1.0f / absmax : 0.0f;
#endif
}

// Where two neighbouring codes meet: an element above takes the upper one, a tie the lower.
PK_HOST_DEVICE float threshold_between(float lower, float upper) { return times(plus(lower, upper), 0.5f); }

// The place of code number i among the 16 in ascending order; stable, so that of equal codes (FP4's 0 and -0)
// the lower number comes first.
PK_HOST_DEVICE int sorted_place(const float* code, int i) {
  int place = 0;
  for (int j = 0; j < CODES; j++) place += code[j] < code[i] || (code[j] == code[i] && j < i);
  return place;
}

// How many of ENTRIES - 1 ascending thresholds lie below v, by halving; 0 for NaN. ENTRIES is a power of two.
template <int ENTRIES>
PK_HOST_DEVICE int rank_of(const float (&thresholds)[ENTRIES], float v) {
  int rank = 0;
  PK_UNROLL
  for (int step = ENTRIES / 2; step; step >>= 1)
    if (v > thresholds[rank + step - 1]) rank += step;
  return rank;
}

}  // namespace pk
