// Quantization: the absmax of each block, then for each element the number of thresholds below it; one pass
// over the weight.
#include "common.h"

namespace pk {
namespace {

constexpr int PER_THREAD = 8;  // elements: 16 bytes of a 16-bit weight, one 4-byte store of codes
constexpr int MAX_THREADS = 4096 / PER_THREAD;

// The larger of a running absmax and |v|; a NaN does not count.
__device__ __forceinline__ float larger(float best, float v) { return fabsf(v) > best ? fabsf(v) : best; }

template <int LANES>
__device__ __forceinline__ float warp_max(float v, int lanes = LANES) {
#pragma unroll
  for (int by = LANES / 2; by; by >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, v, by);
    if (by < lanes && other > v) v = other;
  }
  return v;
}

// Codes in ascending order, and the thresholds between them.
struct Codebook {
  float sorted[16], thresholds[16];  // 15 thresholds
  int index[16];                     // rank -> code index
};

__device__ __forceinline__ void make_codebook(const float* code, Codebook& book) {
  const int i = threadIdx.x;
  if (i < 16) {
    const int place = sorted_place(code, i);
    book.sorted[place] = code[i];
    book.index[place] = i;
  }
  __syncthreads();
  if (i < 15) book.thresholds[i] = threshold_between(book.sorted[i], book.sorted[i + 1]);
  __syncthreads();
}

__device__ __forceinline__ uint32_t code_of(const Codebook& book, float v) {
  return v != v ? 0u : (uint32_t)book.index[rank_of(book.thresholds, v)];
}

// PER_THREAD elements, those past `count` zero, widened to fp32.
template <typename T>
__device__ __forceinline__ void load_elements(const T* w, int64_t count, bool vectors,
                                              float (&v)[PER_THREAD]) {
  alignas(16) T raw[PER_THREAD];
  if (vectors && count >= PER_THREAD) {
#pragma unroll
    for (int i = 0; i < (int)sizeof raw / 16; i++) {
      reinterpret_cast<uint4*>(raw)[i] = ld_global_nc_v4(reinterpret_cast<const uint4*>(w) + i);
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) v[i] = to_float(raw[i]);
  } else {
    for (int i = 0; i < PER_THREAD; i++) v[i] = i < count ? to_float(w[i]) : 0.0f;
  }
}

// A block of threads takes PER_THREAD * blockDim.x elements, whole quantization blocks. Those of more than
// 256 elements span warps.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS)
    quantize_4bit_kernel(const T* __restrict__ w, int64_t numel, int shift, bool vectors,
                         const float* __restrict__ code, uint8_t* __restrict__ packed,
                         float* __restrict__ absmax) {
  PK_SHARED(Codebook, books, [1]);
  PK_SHARED(float, warp_best, [MAX_THREADS / 32]);
  Codebook& book = books[0];
  make_codebook(code, book);
  const int64_t first = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD, count = numel - first;
  float v[PER_THREAD];
  load_elements(w + first, count, vectors, v);
  float best = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) best = larger(best, v[i]);
  const int lanes = (1 << shift) / PER_THREAD;  // of a quantization block: 4 ... 512
  best = warp_max<32>(best, lanes);
  if (lanes > 32) {
    if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
    __syncthreads();
    const int warps = lanes / 32, from = threadIdx.x / lanes * warps;
    for (int i = 0; i < warps; i++) best = larger(best, warp_best[from + i]);
  }
  if (count <= 0) return;
  if (threadIdx.x % lanes == 0) absmax[first >> shift] = best;
  const float inverse = inverse_of(best);
  uint32_t word = 0;  // byte i: elements 2 i (high nibble) and 2 i + 1
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) word |= code_of(book, __fmul_rn(v[i], inverse)) << code_shift(i);
  uint8_t* to = packed + (first >> 1);
  if (vectors && count >= PER_THREAD) {
    *reinterpret_cast<uint32_t*>(to) = word;
  } else {
    for (int byte = 0; byte < PER_THREAD / 2; byte++)
      if (2 * byte < count) to[byte] = (uint8_t)(word >> 8 * byte);
  }
}

constexpr int ABSMAX_THREADS = 256;

// A block of threads takes one block of the absmax, of any size: first its largest, then the codes; the
// second read hits the cache.
__global__ void __launch_bounds__(ABSMAX_THREADS)
    quantize_absmax_kernel(const float* __restrict__ absmax, int64_t count, int shift,
                           const float* __restrict__ code, uint8_t* __restrict__ out,
                           float* __restrict__ nested) {
  PK_SHARED(float, thresholds, [ABSMAX_CODES]);  // 255 of them
  PK_SHARED(float, warp_best, [ABSMAX_THREADS / 32]);
  const int t = threadIdx.x;
  if (t < 255) thresholds[t] = threshold_between(code[t], code[t + 1]);
  const int64_t size = (int64_t)1 << shift, start = blockIdx.x * size,
                stop = start + size < count ? start + size : count;
  float best = 0;
  for (int64_t i = start + t; i < stop; i += ABSMAX_THREADS) best = larger(best, absmax[i]);
  best = warp_max<32>(best);
  if (t % 32 == 0) warp_best[t / 32] = best;
  __syncthreads();
  for (int i = 0; i < ABSMAX_THREADS / 32; i++) best = larger(best, warp_best[i]);
  if (t == 0) nested[blockIdx.x] = best;
  const float inverse = inverse_of(best);
  for (int64_t i = start + t; i < stop; i += ABSMAX_THREADS)
    out[i] = (uint8_t)rank_of(thresholds, __fmul_rn(absmax[i], inverse));
}

template <typename T>
int quantize_as(const void* w, int64_t numel, int shift, const float* code, uint8_t* packed, float* absmax,
                void* stream) {
  const int64_t threads = (1 << shift) / PER_THREAD > 256 ? (1 << shift) / PER_THREAD : 256;
  const int64_t blocks = ceil_div(numel, threads * PER_THREAD);
  if (blocks > 0x7fffffff) return PK_ERR_SHAPE;
  const bool vectors = aligned(w, 16) && aligned(packed, 4);
  const Where where = {dim3((unsigned)blocks), (unsigned)threads, 0, stream};
  return launch(quantize_4bit_kernel<T>, where, static_cast<const T*>(w), numel, shift, vectors, code, packed,
                absmax);
}

}  // namespace
}  // namespace pk

extern "C" int pk_quantize_4bit_cuda(const void* w, int dtype, int64_t numel, int32_t blocksize,
                                     const float* code, uint8_t* packed, float* absmax, void* stream,
                                     int device) {
  using namespace pk;
  if (const int bad = check_quantize(w, dtype, numel, blocksize, code, packed, absmax)) return bad;
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  const auto quantize = dtype == PK_F32    ? quantize_as<float>
                        : dtype == PK_BF16 ? quantize_as<bf16>
                                           : quantize_as<f16>;
  return quantize(w, numel, log2_of(blocksize), code, packed, absmax, stream);
}

extern "C" int pk_quantize_absmax_cuda(const float* absmax, int64_t count, int32_t blocksize,
                                       const float* code, uint8_t* absmax_8bit, float* nested_absmax,
                                       void* stream, int device) {
  using namespace pk;
  if (const int bad = check_quantize_absmax(absmax, count, blocksize, code, absmax_8bit, nested_absmax))
    return bad;
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  const int shift = log2_of(blocksize);
  const int64_t blocks = ceil_div(count, blocksize);
  if (blocks > 0x7fffffff) return PK_ERR_SHAPE;
  return launch(quantize_absmax_kernel, {dim3((unsigned)blocks), ABSMAX_THREADS, 0, stream}, absmax, count,
                shift, code, absmax_8bit, nested_absmax);
}
