// xa = drop(x) A^T, fp32 [m, r]: the low-rank part's first product, for the fused linears of few rows. Bound
// by latency for one row, then by reading x.
#include "../philox.h"
#include "linear.h"
#include "reduce.h"

using namespace pk;

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, RANKS = 8;  // of A a block

struct Xa {
  const void* x;        // [m, k] of `dtype`
  const void* lora_a;   // [r, k] of `lora_dtype`
  const int64_t* seed;  // [1], or null: no dropout
  float* xa;            // [m, r]
  int64_t m, k;
  int r, dtype, lora_dtype;
  uint32_t threshold;  // of the dropout
  float scale;         // its 1 / (1 - p)
  bool whole;          // rows are made of whole, aligned groups of 8
};

// Columns 8 * group ... 8 * group + 7 of a row, zeros beyond its end.
__device__ __forceinline__ void load_group(const void* p, int dtype, int64_t row, int64_t k, int64_t group,
                                           bool whole, float (&out)[8]) {
  const int64_t at = row * k + 8 * group;
  if (whole) {
    const float4 a = load_values4(p, dtype, at), b = load_values4(p, dtype, at + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z,
    out[7] = b.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = 8 * group + i < k ? load_value(p, dtype, at + i) : 0.0f;
}

// Block: TOKENS rows of x by RANKS rows of A; its threads share out the groups of 8 columns, one Philox
// counter each.
template <int TOKENS>
__global__ void __launch_bounds__(THREADS) xa_kernel(Xa a) {
  constexpr int VALUES = TOKENS * RANKS;
  PK_SHARED(float, partial, [WARPS][VALUES]);
  const int rank_blocks = (a.r + RANKS - 1) / RANKS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r0 = blockIdx.x % rank_blocks * RANKS;
  const int64_t m0 = (int64_t)(blockIdx.x / rank_blocks) * TOKENS, groups = (a.k + 7) / 8;
  const Dropout dropout = {a.threshold, a.scale, a.seed ? (uint64_t)*a.seed : 0};
  float sums[VALUES] = {};
  for (int64_t group = threadIdx.x; group < groups; group += THREADS) {
    float x[TOKENS][8];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      // A row beyond the end repeats the last: its sums are not stored.
      const int64_t row = m0 + t < a.m ? m0 + t : a.m - 1;
      load_group(a.x, a.dtype, row, a.k, group, a.whole, x[t]);
      if (a.seed) apply_mask(dropout, (uint32_t)group, (uint32_t)row, x[t]);
    }
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      float w[8];
      load_group(a.lora_a, a.lora_dtype, r0 + r < a.r ? r0 + r : a.r - 1, a.k, group, a.whole, w);
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int i = 0; i < 8; i++) sums[t * RANKS + r] = __fmaf_rn(x[t][i], w[i], sums[t * RANKS + r]);
    }
  }
  const float sum = reduce(sums, lane);
  if (lane % (32 / VALUES) == 0) partial[warp][lane * VALUES / 32] = sum;
  __syncthreads();
  for (int i = threadIdx.x; i < VALUES; i += THREADS) {
    const int64_t row = m0 + i / RANKS;
    const int rank = r0 + i % RANKS;
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += partial[w][i];
    if (row < a.m && rank < a.r) a.xa[row * a.r + rank] = total;
  }
}

template <int TOKENS>
int launch_xa(const Xa& a, void* stream) {
  const int64_t blocks = ceil_div(a.m, TOKENS) * ceil_div(a.r, RANKS);
  if (blocks > 0x7fffffff) return PK_ERR_SHAPE;
  return launch(xa_kernel<TOKENS>, {dim3((unsigned)blocks), THREADS, 0, stream}, a);
}

}  // namespace

extern "C" int pk_xa_cuda(const pk_lora* lora, const int64_t* seed, const void* x, int dtype, int64_t m,
                          int64_t k, float* xa, void* stream, int device) {
  if (!lora) return PK_ERR_NULL;
  if (m < 0 || k < 1 || bad_rank(lora->r) || lora->dropout_threshold > EVERY_DRAW) return PK_ERR_SHAPE;
  if (m == 0 || lora->r == 0) return PK_OK;
  if (!x || !xa || !lora->lora_a || (lora->dropout_threshold && !seed)) return PK_ERR_NULL;
  if (bad_dtype(dtype) || bad_dtype(lora->dtype)) return PK_ERR_DTYPE;
  if (m > 0xffffffffll || k > 8ll * 0xffffffffll) return PK_ERR_SHAPE;  // the mask's counters have 32 bits
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  const bool whole = k % 8 == 0 && aligned(x, 16) && aligned(lora->lora_a, 16);
  const uint32_t threshold = lora->dropout_threshold;
  const Xa a = {x,           lora->lora_a, threshold ? seed : nullptr,       xa,   m, k, (int)lora->r, dtype,
                lora->dtype, threshold,    make_dropout(threshold, 0).scale, whole};
  return m == 1 ? launch_xa<1>(a, stream) : launch_xa<4>(a, stream);
}
