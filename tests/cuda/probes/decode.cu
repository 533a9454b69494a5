// What nf4_decode.h and philox.h compute, one call each, for tests/cuda/test_decode.py.
#include "../philox.h"
#include "common.h"
#include "nf4_decode.h"

using namespace pk;

namespace {

__global__ void table_kernel(const float* code, const uint32_t* words, float* out, int count) {
  const PairTable table = {reinterpret_cast<float2*>(dynamic_shared())};
  table.fill(code);
  __syncthreads();
  const uint32_t copy = PairTable::copy_of(threadIdx.x % 32);
  for (int i = threadIdx.x; i < 4 * count; i += blockDim.x) {
    const float2 pair = table.lookup(words[i / 4], i % 4, copy);
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}

}  // namespace

extern "C" {
// words [count] -> out [count][8], the 16-bit codes in the order of decode8.
PK_API void probe_decode8(const float* code, int bf16_codes, const uint32_t* words, int64_t count,
                          uint32_t* out) {
  const Planes planes = bf16_codes ? load_planes<true>(code) : load_planes<false>(code);
  for (int64_t i = 0; i < count; i++) {
    uint32_t pairs[4];
    decode8(words[i], planes, pairs);
    for (int j = 0; j < 4; j++) out[4 * i + j] = pairs[j];
  }
}
// words [count] -> out [count][8], fp32.
PK_API int probe_table(const float* code, const uint32_t* words, float* out, int count) {
  return launch(table_kernel, {dim3(1), 64, PairTable::BYTES, nullptr}, code, words, out, count);
}
// The byte of shared memory that a lane reads for a byte of codes.
PK_API int probe_table_address(int byte, int lane) {
  return (byte * PairTable::COPIES + lane % PairTable::COPIES) * (int)sizeof(float2);
}
PK_API void probe_dropout(uint32_t threshold, int64_t seed, int64_t m, int64_t k, float* mask) {
  const Dropout dropout = make_dropout(threshold, (uint64_t)seed);
  for (int64_t row = 0; row < m; row++)
    for (int64_t group = 0; group < (k + 7) / 8; group++) {
      float values[8] = {1, 1, 1, 1, 1, 1, 1, 1};
      apply_mask(dropout, (uint32_t)group, (uint32_t)row, values);
      for (int i = 0; i < 8 && 8 * group + i < k; i++) mask[row * k + 8 * group + i] = values[i];
    }
}
}
