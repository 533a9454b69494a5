// PTX instructions, one wrapper each, and what stands in for one on an architecture without it. The
// emulator's follow the PTX ISA's text.
#pragma once
#include "launch.h"

namespace pk {

// Result byte i is byte `selector nibble i` of {high, low} (0-3 low's, 4-7 high's). Bit 3 of a nibble would
// replicate the sign: leave it 0.
__host__ __device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
#endif
}

// fp32 -> bf16, nearest even, NaN to 0x7fff as the instruction: sm_75, which has none, and the host.
__host__ __device__ __forceinline__ uint32_t round_bf16(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

// {high, low} as two 16-bit numbers in one register, each rounded to nearest even.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return round_bf16(__float_as_uint(low)) | round_bf16(__float_as_uint(high)) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
#if defined(PK_CUDA_EMULATION)
  return pk_emulated::half_bits(low) | (uint32_t)pk_emulated::half_bits(high) << 16;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  uint16_t l, h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
  return l | (uint32_t)h << 16;
#endif
}

// The exact fp32 value of 16-bit bits.
__device__ __forceinline__ float bf16_value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
__device__ __forceinline__ float f16_value(uint16_t bits) {
#if defined(PK_CUDA_EMULATION)
  return pk_emulated::half_value(bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

// 16 bytes, 16-byte aligned, that no thread writes during the kernel and that are read once: past the
// first-level cache.
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address) {
#if defined(PK_CUDA_EMULATION)
  return pk_emulated::load16(address);
#else
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#endif
}

// 16 bytes global -> shared, both 16-byte aligned, past the registers; zeros where !valid (the source is then
// not read). sm_75: at once.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
#if defined(PK_CUDA_EMULATION)
  pk_emulated::copy_async16(shared, global, valid);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared), bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(PK_CUDA_EMULATION)
  pk_emulated::copy_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the NEWEST last groups of this thread are under way. Other threads' copies need a
// barrier after it.
template <int NEWEST>
__device__ __forceinline__ void cp_async_wait() {
#if defined(PK_CUDA_EMULATION)
  pk_emulated::copy_async_wait(NEWEST);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

// c [16, 8] fp32 += a [16, 16] b [16, 8]. With g = lane / 4, t = lane % 4, halves low first:
//   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..);  b[0] rows 2t.. of column
//   g, b[1] rows 2t + 8..; c[0], c[1] (g, 2t..)  c[2], c[3] (g + 8, 2t..).
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#if defined(PK_CUDA_EMULATION)
  pk_emulated::multiply_accumulate(c, a, b, false);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 has half the depth: its fragments are the two halves of these
  for (int half = 0; half < 2; half++)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// sm_75 has no bf16 products: a launcher must refuse them there; a kernel that gets here all the same traps.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#if defined(PK_CUDA_EMULATION)
  pk_emulated::multiply_accumulate(c, a, b, true);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)c, (void)a, (void)b;
  asm volatile("trap;");
#endif
}

}  // namespace pk
