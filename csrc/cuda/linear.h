// What the fused 4-bit linears share: their arguments, a block's absmax fetched ahead of its use, elements of
// any dtype, and the checks of a call.
#pragma once
#include "common.h"
#include "nf4_decode.h"

namespace pk {

// y [m, n] = x [m, k] W^T + scaling * xa B^T + bias, as the kernels take it: by value, all pointers of the
// device.
struct Linear {
  Weight w;            // [n, k]
  const void* x;       // [m, k] of `dtype`
  void* y;             // [m, n] of `dtype`
  const void* bias;    // [n] of `bias_dtype`, or null
  const float* xa;     // [m, rank]
  const void* lora_b;  // [n, rank] of `lora_dtype`
  int64_t m, n, k;
  int rank;  // 0: no low-rank part
  int dtype, bias_dtype, lora_dtype;
  float scaling;
};

__device__ __forceinline__ float load_value(const void* p, int dtype, int64_t i) {
  if (dtype == PK_F32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return dtype == PK_BF16 ? bf16_value(bits) : f16_value(bits);
}

__device__ __forceinline__ void store_value(void* p, int dtype, int64_t i, float value) {
  if (dtype == PK_F32) static_cast<float*>(p)[i] = value;
  else
    static_cast<uint16_t*>(p)[i] =
        (uint16_t)(dtype == PK_BF16 ? pack_bf16x2(value, 0.0f) : pack_f16x2(value, 0.0f));
}

// Four elements from i on; the address is a multiple of their size together.
__device__ __forceinline__ float4 load_values4(const void* p, int dtype, int64_t i) {
  if (dtype == PK_F32) return *reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i);
  const uint16_t h[4] = {(uint16_t)bits.x, (uint16_t)(bits.x >> 16), (uint16_t)bits.y,
                         (uint16_t)(bits.y >> 16)};
  if (dtype == PK_BF16)
    return make_float4(bf16_value(h[0]), bf16_value(h[1]), bf16_value(h[2]), bf16_value(h[3]));
  return make_float4(f16_value(h[0]), f16_value(h[1]), f16_value(h[2]), f16_value(h[3]));
}

// A block's absmax as memory holds it: the loads are issued ahead, and combined where the value is used.
struct RawScale {
  float value;  // the absmax, or the nested absmax
  int q;        // its 8-bit code where nested
};

__device__ __forceinline__ RawScale fetch_scale(const Linear& a, int64_t block) {
  if (a.w.absmax) return {a.w.absmax[block], 0};
  return {a.w.nested_absmax[block >> a.w.nested_shift], a.w.absmax_8bit[block]};
}

// absmax_code may be a copy in shared memory.
__device__ __forceinline__ float combine_scale(const Linear& a, const RawScale& raw,
                                               const float* absmax_code) {
  return a.w.absmax ? raw.value : denested(absmax_code[raw.q], raw.value, *a.w.absmax_offset);
}

// The checks of both fused linears; fills `a` where the status is PK_OK.
inline int check_linear(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                        const void* bias, int bias_dtype, const float* xa, void* y, Linear* a) {
  if (const int bad = check_4bit_weight(w)) return bad;
  const int64_t rank = lora ? lora->r : 0;
  if (m < 0 || bad_rank(rank)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype) || (bias && bad_dtype(bias_dtype)) || (rank && bad_dtype(lora->dtype)))
    return PK_ERR_DTYPE;
  if (m && w->n && (!x || !y || (rank && (!xa || !lora->lora_b)))) return PK_ERR_NULL;
  *a = {view_of(*w),
        x,
        y,
        bias,
        xa,
        rank ? lora->lora_b : nullptr,
        m,
        w->n,
        w->k,
        (int)rank,
        dtype,
        bias_dtype,
        rank ? lora->dtype : 0,
        rank ? lora->scaling : 0.0f};
  return PK_OK;
}

// What a launch depends on; `device` < 0: the current one.
struct DeviceLimits {
  int processors, shared_bytes;  // shared_bytes: the most that a block may ask for
  int capability;                // 10 major + minor
};

inline int device_limits(int device, DeviceLimits* limits) {
  int major = 0, minor = 0;
  if (device < 0)
    if (const int bad = checked(cudaGetDevice(&device))) return bad;
  if (const int bad =
          checked(cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device)))
    return bad;
  if (const int bad = checked(
          cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)))
    return bad;
  if (const int bad = checked(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)))
    return bad;
  if (const int bad = checked(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)))
    return bad;
  limits->capability = 10 * major + minor;
  return PK_OK;
}

}  // namespace pk
