// Small kernels whose results are known, and some with a fault, for tests/cuda/test_emulation.py.
#include "ptx.h"

using namespace pk;

namespace {

__global__ void sum_kernel(const float* in, float* out, bool with_barrier) {
  PK_SHARED(float, sums, [32]);
  float v = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int by = 16; by; by >>= 1) v += __shfl_down_sync(0xffffffffu, v, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  if (with_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += sums[w];
    out[blockIdx.x] = total;
  }
}

// Each thread hands its value to the next through shared memory, `rounds` times; the second barrier guards the overwriting.
__global__ void ring_kernel(const float* in, float* out, int rounds, bool second_barrier) {
  float* slots = (float*)dynamic_shared();
  float v = in[threadIdx.x];
  for (int i = 0; i < rounds; i++) {
    slots[threadIdx.x] = v;
    __syncthreads();
    v = slots[(threadIdx.x + 1) % blockDim.x];
    if (second_barrier) __syncthreads();
  }
  out[threadIdx.x] = v;
}

__global__ void divergent_kernel(int fault) {
  if (fault == 0 && threadIdx.x < 40) __syncthreads();  // the others return
  if (fault == 1) {                                     // two different barriers
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (fault == 2 && threadIdx.x != 5) __shfl_sync(0xffffffffu, 1, 0), __syncthreads();
  if (fault == 2 && threadIdx.x == 5) __syncthreads();
  if (fault == 3) __syncwarp(0x0000fffeu);
}

__global__ void shuffle_kernel(const int* in, int* out) {
  const int v = in[threadIdx.x], all = blockDim.x, t = threadIdx.x;
  out[t] = __shfl_sync(0xffffffffu, v, 7);
  out[all + t] = __shfl_xor_sync(0xffffffffu, v, 5);
  out[2 * all + t] = __shfl_down_sync(0xffffffffu, v, 3, 8);
  out[3 * all + t] = __shfl_up_sync(0xffffffffu, v, 2);
  out[4 * all + t] = __shfl_sync(0xffffffffu, v, 1, 4);
  out[5 * all + t] = (int)__ballot_sync(0xffffffffu, v & 1);
  out[6 * all + t] = (int)(__shfl_xor_sync(0xffffffffu, (double)v, 1));
}

// a [16, 16], b [8, 16] (column-major k x n), c [16, 8], fragments filled from memory.
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* c, bool bf16) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto pair = [](const uint16_t* p) { return p[0] | (uint32_t)p[1] << 16; };
  const uint16_t *upper = a + g * 16 + 2 * t, *lower = a + (g + 8) * 16 + 2 * t;
  const uint32_t fa[4] = {pair(upper), pair(lower), pair(upper + 8), pair(lower + 8)};
  const uint32_t fb[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
  float fc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  if (bf16) mma_m16n8k16_bf16(fc, fa, fb);
  else mma_m16n8k16_f16(fc, fa, fb);
  c[g * 8 + 2 * t] = fc[0], c[g * 8 + 2 * t + 1] = fc[1], c[(g + 8) * 8 + 2 * t] = fc[2], c[(g + 8) * 8 + 2 * t + 1] = fc[3];
}

// c [16, 8] = a [16, 16] b [16, 8], all row-major in memory, through cp.async and mma.
__global__ void pipeline_kernel(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  uint16_t* tile = (uint16_t*)dynamic_shared();  // [32][16]: rows of a, then rows of b with 8 used
  const int lane = threadIdx.x;
  cp_async16(tile + lane / 2 * 16 + lane % 2 * 8, a + lane / 2 * 16 + lane % 2 * 8);
  cp_async_commit();
  if (lane < 16) cp_async16(tile + (16 + lane) * 16, b + lane * 8, fault != 3 || lane < 8);
  cp_async_commit();
  if (fault == 1) cp_async_wait<1>();
  else cp_async_wait<0>();
  __syncwarp();
  const int g = lane / 4, t = lane % 4;
  const auto pair = [&](int row, int column) { return *(const uint32_t*)(tile + row * 16 + column); };
  const auto down = [&](int row) { return tile[row * 16 + g] | (uint32_t)tile[(row + 1) * 16 + g] << 16; };
  const uint32_t fa[4] = {pair(g, 2 * t), pair(g + 8, 2 * t), pair(g, 2 * t + 8), pair(g + 8, 2 * t + 8)};
  const uint32_t fb[2] = {down(16 + 2 * t), down(16 + 2 * t + 8)};
  float fc[4] = {0, 0, 0, 0};
  mma_m16n8k16_bf16(fc, fa, fb);
  c[g * 8 + 2 * t] = fc[0], c[g * 8 + 2 * t + 1] = fc[1], c[(g + 8) * 8 + 2 * t] = fc[2], c[(g + 8) * 8 + 2 * t + 1] = fc[3];
  if (fault == 1) cp_async_wait<0>();
}

__global__ void misaligned_kernel(const unsigned char* in, uint4* out, bool stores) {
  if (stores) *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(out) + 8) = make_uint4(0, 0, 0, 0);
  else *out = ld_global_nc_v4(in + 8);
}

__global__ void pack_kernel(const float* in, uint32_t* out, int pairs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  out[2 * i] = pack_bf16x2(in[2 * i], in[2 * i + 1]);
  out[2 * i + 1] = pack_f16x2(in[2 * i], in[2 * i + 1]);
}

}  // namespace

extern "C" {
PK_API const char* pk_cuda_error_text(void) { return last_error_text; }
PK_API int selftest_sum(const float* in, float* out, int blocks, int barrier) {
  return launch(sum_kernel, {dim3(blocks), 128, 0, nullptr}, in, out, barrier != 0);
}
PK_API int selftest_ring(const float* in, float* out, int threads, int rounds, int barrier, int64_t bytes) {
  return launch(ring_kernel, {dim3(1), (unsigned)threads, (size_t)bytes, nullptr}, in, out, rounds, barrier != 0);
}
PK_API int selftest_divergent(int fault) { return launch(divergent_kernel, {dim3(1), 64, 0, nullptr}, fault); }
PK_API int selftest_shuffle(const int* in, int* out) { return launch(shuffle_kernel, {dim3(1), 64, 0, nullptr}, in, out); }
PK_API int selftest_mma(const uint16_t* a, const uint16_t* b, float* c, int bf16) {
  return launch(mma_kernel, {dim3(1), 32, 0, nullptr}, a, b, c, bf16 != 0);
}
PK_API int selftest_pipeline(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  return launch(pipeline_kernel, {dim3(1), 32, 1024, nullptr}, a, b, c, fault);
}
PK_API int selftest_misaligned(const unsigned char* in, uint4* out, int stores) {
  return launch(misaligned_kernel, {dim3(1), 1, 0, nullptr}, in, out, stores != 0);
}
PK_API int selftest_pack(const float* in, uint32_t* out, int pairs) {
  return launch(pack_kernel, {dim3((pairs + 127) / 128), 128, 0, nullptr}, in, out, pairs);
}
PK_API uint32_t selftest_prmt(uint32_t low, uint32_t high, uint32_t selector) { return prmt(low, high, selector); }
}
