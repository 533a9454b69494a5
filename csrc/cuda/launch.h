// How kernels are launched and share memory: the one place with nvcc's own syntax, so that a .cu also
// compiles as plain C++, emulated.
#pragma once
#include <stdint.h>

#include "../include/peftkern_cuda.h"
#if defined(PK_CUDA_EMULATION)
#include "cuda_on_cpu.h"  // tests/cuda/emulation
#else
#include <cuda_runtime.h>
#endif

// PK_SHARED(float, tile, [4][32]); declares shared memory of a block. The emulator knows only this form, and
// fills it with NaN.
#if defined(PK_CUDA_EMULATION)
#define PK_SHARED(type, name, dims) \
  static char name##_identity;      \
  type(&name) dims =                \
      *reinterpret_cast<type(*) dims>(pk_emulated::shared_array(&name##_identity, sizeof(type dims)))
#else
#define PK_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#endif

namespace pk {

// The launch's dynamic shared memory, 16-byte aligned. One pointer a kernel: types are laid out by the
// caller.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(PK_CUDA_EMULATION)
  return pk_emulated::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char pk_dynamic_shared_memory[];
  return pk_dynamic_shared_memory;
#endif
}

// The text of this thread's last failed runtime call, for pk_cuda_error_text().
inline thread_local const char* last_error_text = "no error";

inline int checked(cudaError_t error) {
  if (error == cudaSuccess) return PK_OK;
  last_error_text = cudaGetErrorString(error);
  return PK_ERR_CUDA;
}

// Makes `device` current for a call and puts the caller's back. Device < 0 leaves the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device < 0) return;
    status_ = checked(cudaGetDevice(&before_));
    if (status_ != PK_OK || before_ == device) return;
    status_ = checked(cudaSetDevice(device));
    changed_ = status_ == PK_OK;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return status_; }

 private:
  int before_ = 0, status_ = PK_OK;
  bool changed_ = false;
};

struct Where {
  dim3 grid;
  unsigned threads;     // of a block
  size_t shared_bytes;  // dynamic
  void* stream;
};

// kernel<<<grid, threads, shared_bytes, stream>>>(args...), PK_OK or PK_ERR_CUDA. Queues, allocates nothing,
// can be captured into a graph.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), const Where& where, Args... args) {
  // A block gets 48 KiB of static and dynamic shared memory together on every architecture; more is an opt-in
  // per kernel. Kernels have up to 4 KiB of static arrays.
  constexpr size_t WITHOUT_ASKING = 44 << 10;
  if (where.shared_bytes > WITHOUT_ASKING) {
    const int bytes = (int)where.shared_bytes;
    const cudaError_t error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // the error is reported here, and must not surface in the framework's next call
      return checked(error);
    }
  }
#if defined(PK_CUDA_EMULATION)
  pk_emulated::launch(where.grid, where.threads, where.shared_bytes, (const void*)kernel,
                      [=] { kernel(static_cast<Params>(args)...); });
#else
  kernel<<<where.grid, where.threads, where.shared_bytes, static_cast<cudaStream_t>(where.stream)>>>(
      static_cast<Params>(args)...);
#endif
  return checked(cudaGetLastError());
}

}  // namespace pk
