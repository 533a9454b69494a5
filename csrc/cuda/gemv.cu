// The fused 4-bit linear for few rows (decode): y = x W^T + scaling * xa B^T + bias straight from the packed
// weight, codes and products in fp32.
//
// A lane takes 32 codes of a row (16 bytes, one quantization block), a warp 1024 columns of ROWS rows a step,
// and fetches the next step's bytes before it multiplies. The lookup table is filled once a block, so blocks
// stay and walk over the tiles of rows. A block's sum is scaled by its absmax once. Sums are fixed: 32
// products in a chain, lane by lane, a butterfly over the lanes, then the warps that share a row in order. No
// atomics.
#include "linear.h"
#include "reduce.h"

using namespace pk;

namespace {

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int LANE_CODES = 32, STEP = 32 * LANE_CODES;  // columns of a lane, of a warp
constexpr int MAX_SPLIT = 16, MAX_VALUES = 16;          // warps that share a row; sums of a warp
constexpr int FIXED_SHARED = PairTable::BYTES + 256 * 4 + 2 * WARPS * MAX_VALUES * 4;

struct Plan {
  int split;  // warps that share a row, a power of two
  int chunk;  // columns of x in shared memory at a time, a multiple of STEP * split
  int tiles;  // of WARPS / split * ROWS rows
};

// 32 codes of each of ROWS rows, as fetched.
template <int ROWS>
struct Fetched {
  uint4 packed[ROWS];
  RawScale scale[ROWS];
};

template <int ROWS>
__device__ __forceinline__ Fetched<ROWS> fetch(const Linear& a, int64_t n0, int64_t column) {
  Fetched<ROWS> f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    f.packed[r] = make_uint4(0, 0, 0, 0);
    f.scale[r] = {0.0f, 0};
    if (column >= a.k || n0 >= a.n) continue;
    // A row beyond the end repeats the last: its sum is not stored.
    const int64_t at = (n0 + r < a.n ? n0 + r : a.n - 1) * a.k + column;
    f.packed[r] = ld_global_nc_v4(a.w.packed + at / 2);
    f.scale[r] = fetch_scale(a, at >> a.w.shift);
  }
  return f;
}

// Where a lane's float4 number j of a step lies: exclusive-or spreads the 8 lanes that a 16-byte access
// serves at once over all banks.
__device__ __forceinline__ int swizzled(int lane, int j) {
  return lane * (LANE_CODES / 4) + (j ^ (lane & 7));
}

// x[m0 ... m0 + TOKENS)[first ... first + chunk) -> shared fp32, zeros beyond the ends.
template <int TOKENS>
__device__ void stage_x(const Linear& a, int64_t m0, int64_t first, int chunk, float4* x) {
  for (int i = threadIdx.x; i < chunk / 4; i += THREADS) {
    const int to = i / (STEP / 4) * (STEP / 4) + swizzled(i % (STEP / 4) / 8, i % 8);
    const int64_t column = first + 4 * i;
#pragma unroll(TOKENS < 8 ? TOKENS : 2)
    for (int t = 0; t < TOKENS; t++) {
      const bool valid = m0 + t < a.m && column < a.k;
      x[t * chunk / 4 + to] =
          valid ? load_values4(a.x, a.dtype, (m0 + t) * a.k + column) : make_float4(0, 0, 0, 0);
    }
  }
}

// totals[r * TOKENS + t] += absmax * sum of the lane's 32 codes of row r times x of token t; x: this step's,
// TOKENS of them `stride` float4 apart.
template <int TOKENS, int ROWS>
__device__ __forceinline__ void multiply(const Linear& a, const Fetched<ROWS>& f, const PairTable& table,
                                         const float* absmax_code, const float4* x, int stride, int lane,
                                         uint32_t copy, float (&totals)[ROWS * TOKENS]) {
  float sums[ROWS * TOKENS] = {};
#pragma unroll
  for (int j = 0; j < LANE_CODES / 4; j++) {  // two bytes, four codes
    float2 w[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint32_t words[4] = {f.packed[r].x, f.packed[r].y, f.packed[r].z, f.packed[r].w};
      w[r][0] = table.lookup(words[j / 2], j % 2 * 2, copy);
      w[r][1] = table.lookup(words[j / 2], j % 2 * 2 + 1, copy);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float4 v = x[t * stride + swizzled(lane, j)];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float& sum = sums[r * TOKENS + t];
        sum = __fmaf_rn(w[r][0].x, v.x, sum);
        sum = __fmaf_rn(w[r][0].y, v.y, sum);
        sum = __fmaf_rn(w[r][1].x, v.z, sum);
        sum = __fmaf_rn(w[r][1].y, v.w, sum);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float scale = combine_scale(a, f.scale[r], absmax_code);
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      totals[r * TOKENS + t] = __fmaf_rn(scale, sums[r * TOKENS + t], totals[r * TOKENS + t]);
  }
}

// totals += scaling * xa B^T, the ranks shared out over the lanes of the warps that share the rows.
template <int TOKENS, int ROWS>
__device__ __forceinline__ void add_low_rank(const Linear& a, int64_t n0, int64_t m0, int part, int parts,
                                             float (&totals)[ROWS * TOKENS]) {
  for (int i = part; i < a.rank; i += parts) {
    float xa[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) xa[t] = a.scaling * a.xa[(m0 + t < a.m ? m0 + t : a.m - 1) * a.rank + i];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float b = load_value(a.lora_b, a.lora_dtype, (n0 + r < a.n ? n0 + r : a.n - 1) * a.rank + i);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) totals[r * TOKENS + t] = __fmaf_rn(xa[t], b, totals[r * TOKENS + t]);
    }
  }
}

__device__ __forceinline__ void store_output(const Linear& a, int64_t m, int64_t n, float value) {
  if (a.bias) value += load_value(a.bias, a.bias_dtype, n);
  store_value(a.y, a.dtype, m * a.n + n, value);
}

// K is a multiple of 32, so that a lane's codes lie in one block and, packed, at a multiple of 16 bytes.
template <int TOKENS, int ROWS>
__global__ void __launch_bounds__(THREADS, 1) gemv_kernel(Linear a, Plan plan) {
  constexpr int VALUES = TOKENS * ROWS;
  constexpr bool AHEAD = TOKENS < 8;  // eight rows of x are bound by arithmetic: the registers go to sums
  static_assert(VALUES <= MAX_VALUES && (VALUES & (VALUES - 1)) == 0, "a warp's sums");
  unsigned char* shared = dynamic_shared();
  const PairTable table = {reinterpret_cast<float2*>(shared)};
  float* absmax_code = reinterpret_cast<float*>(shared + PairTable::BYTES);  // [256]
  float* partial = absmax_code + 256;                                        // [2][WARPS][MAX_VALUES]
  float4* x = reinterpret_cast<float4*>(shared + FIXED_SHARED);              // [TOKENS][chunk / 4]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % plan.split,
            slot = warp / plan.split;
  const int slots = WARPS / plan.split;
  const int64_t m0 = (int64_t)blockIdx.y * TOKENS;
  const int steps = (int)((a.k + STEP - 1) / STEP), chunk_steps = plan.chunk / STEP;

  Fetched<ROWS> next;
  if (AHEAD)
    next =
        fetch<ROWS>(a, ((int64_t)blockIdx.x * slots + slot) * ROWS, (int64_t)part * STEP + lane * LANE_CODES);
  table.fill(a.w.code);
  if (!a.w.absmax && threadIdx.x < 256) absmax_code[threadIdx.x] = a.w.absmax_code[threadIdx.x];
  const uint32_t copy = PairTable::copy_of(lane);
  int parity = 0;
  for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x, parity ^= 1) {
    const int64_t n0 = ((int64_t)tile * slots + slot) * ROWS;
    float totals[VALUES] = {};
    for (int first = 0; first < steps; first += chunk_steps) {
      if (tile == (int)blockIdx.x || chunk_steps < steps) {
        __syncthreads();  // the chunk before has been used
        stage_x<TOKENS>(a, m0, (int64_t)first * STEP, plan.chunk, x);
        __syncthreads();
      }
      for (int step = first + part; step < first + chunk_steps && step < steps; step += plan.split) {
        const bool last = step + plan.split >= steps;
        const Fetched<ROWS> now = AHEAD ? next : fetch<ROWS>(a, n0, (int64_t)step * STEP + lane * LANE_CODES);
        if (AHEAD) {
          const int64_t next_n0 = last ? n0 + (int64_t)gridDim.x * slots * ROWS : n0;
          next =
              fetch<ROWS>(a, next_n0, (int64_t)(last ? part : step + plan.split) * STEP + lane * LANE_CODES);
        }
        multiply<TOKENS, ROWS>(a, now, table, absmax_code, x + (step - first) * (STEP / 4), plan.chunk / 4,
                               lane, copy, totals);
      }
    }
    add_low_rank<TOKENS, ROWS>(a, n0, m0, part * 32 + lane, plan.split * 32, totals);
    const float sum = reduce(totals, lane);
    // Two sets: a tile's sums are read while the next one's are written.
    float* mine = partial + parity * WARPS * MAX_VALUES;
    if (lane % (32 / VALUES) == 0) mine[warp * MAX_VALUES + lane * VALUES / 32] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < slots * VALUES; i += THREADS) {
      const int value = i % VALUES, from = i / VALUES;
      const int64_t n = ((int64_t)tile * slots + from) * ROWS + value / TOKENS, m = m0 + value % TOKENS;
      float total = 0;
      for (int w = 0; w < plan.split; w++) total += mine[(from * plan.split + w) * MAX_VALUES + value];
      if (n < a.n && m < a.m) store_output(a, m, n, total);
    }
  }
}

// Any K, any alignment: a warp a row, a code at a time.
constexpr int GENERAL_TOKENS = 4, GENERAL_WARPS = 8;

__global__ void __launch_bounds__(32 * GENERAL_WARPS) general_kernel(Linear a) {
  const int lane = threadIdx.x % 32;
  const int64_t n = (int64_t)blockIdx.x * GENERAL_WARPS + threadIdx.x / 32,
                m0 = (int64_t)blockIdx.y * GENERAL_TOKENS;
  if (n >= a.n) return;
  float totals[GENERAL_TOKENS] = {};
  for (int64_t k = lane; k < a.k; k += 32) {
    const int64_t at = n * a.k + k;
    const float w = __fmul_rn(a.w.code[nibble(a.w.packed, at)], absmax_of(a.w, at >> a.w.shift));
#pragma unroll
    for (int t = 0; t < GENERAL_TOKENS; t++)
      if (m0 + t < a.m) totals[t] = __fmaf_rn(w, load_value(a.x, a.dtype, (m0 + t) * a.k + k), totals[t]);
  }
  add_low_rank<GENERAL_TOKENS, 1>(a, n, m0, lane, 32, totals);
  const float sum = reduce(totals, lane);
  const int64_t m = m0 + lane * GENERAL_TOKENS / 32;
  if (lane % (32 / GENERAL_TOKENS) == 0 && m < a.m) store_output(a, m, n, sum);
}

int launch_general(const Linear& a, void* stream) {
  const int64_t blocks = ceil_div(a.n, GENERAL_WARPS);
  if (blocks > 0x7fffffff) return PK_ERR_SHAPE;
  return launch(
      general_kernel,
      {dim3((unsigned)blocks, (unsigned)ceil_div(a.m, GENERAL_TOKENS)), 32 * GENERAL_WARPS, 0, stream}, a);
}

int power_below(int64_t v, int limit) {
  int power = 1;
  while (2 * power <= v && 2 * power <= limit) power *= 2;
  return power;
}

// As many warps share a row as it has steps and the piece of x in shared memory has: the sums' order depends
// on K, TOKENS and the device's shared memory, not on N, M or the number of processors.
template <int TOKENS>
int launch_gemv(const Linear& a, int processors, int shared_limit, void* stream) {
  // Rows a warp; more of them spare reading x, fewer make more tiles for a small layer.
  constexpr int MANY = TOKENS <= 2 ? 4 : 2;
  const int64_t steps = ceil_div(a.k, STEP), fit = (shared_limit - FIXED_SHARED) / (TOKENS * STEP * 4);
  if (fit < 1) return PK_ERR_ARCH;
  Plan plan;
  plan.split = power_below(steps < fit ? steps : fit, MAX_SPLIT);
  const int64_t whole = ceil_div(steps, plan.split) * plan.split, piece = fit / plan.split * plan.split;
  plan.chunk = (int)((whole < piece ? whole : piece) * STEP);
  const int slots = WARPS / plan.split;
  const bool many = ceil_div(a.n, slots * MANY) >= processors;
  plan.tiles = (int)ceil_div(a.n, slots * (many ? MANY : 1));
  const Where where = {
      dim3((unsigned)(plan.tiles < processors ? plan.tiles : processors), (unsigned)ceil_div(a.m, TOKENS)),
      THREADS, (size_t)(FIXED_SHARED + TOKENS * plan.chunk * 4), stream};
  return many ? launch(gemv_kernel<TOKENS, MANY>, where, a, plan)
              : launch(gemv_kernel<TOKENS, 1>, where, a, plan);
}

}  // namespace

extern "C" int pk_gemv_4bit_cuda(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                                 const void* bias, int bias_dtype, const float* xa, void* y, void* stream,
                                 int device) {
  Linear a;
  if (const int bad = check_linear(w, lora, x, dtype, m, bias, bias_dtype, xa, y, &a)) return bad;
  if (m > 64 || w->k > 0x7fffffff || w->n > 0x7fffffff) return PK_ERR_SHAPE;
  if (m == 0 || w->n == 0) return PK_OK;
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  if (w->k % LANE_CODES || !aligned(w->data, 16) || !aligned(x, 16)) return launch_general(a, stream);
  DeviceLimits limits;
  if (const int bad = device_limits(device, &limits)) return bad;
  // What every architecture from sm_80 on has: the same sums on all of them.
  constexpr int LARGEST = 99 << 10;
  const int processors = limits.processors,
            shared_limit = limits.shared_bytes < LARGEST ? limits.shared_bytes : LARGEST;
  if (m == 1) return launch_gemv<1>(a, processors, shared_limit, stream);
  if (m == 2) return launch_gemv<2>(a, processors, shared_limit, stream);
  // sm_75 has no room for eight rows of x.
  const bool eight = m > 4 && shared_limit >= FIXED_SHARED + 8 * STEP * 4;
  return eight ? launch_gemv<8>(a, processors, shared_limit, stream)
               : launch_gemv<4>(a, processors, shared_limit, stream);
}
