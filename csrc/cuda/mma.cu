// The fused 4-bit linear on tensor cores: y = x W^T + scaling * xa B^T + bias, codes decoded in registers,
// for about 16 to 256 rows of x (any number works).
//
// W is the 16-row operand of mma.m16n8k16, straight from the packed layout. The order of a contraction is
// free, so k is permuted alike for both operands: of a block of 64, lane t of a row (t = lane % 4) owns the
// 16 contiguous codes 16 t ..., and the mma of step s = 0 ... 3 takes 16 t + 4 s ... + 3 from it, where the
// instruction's layout says 2 t, 2 t + 1, 2 t + 8, 2 t + 9. Four mmas cover the block; their fp32 sums are
// then multiplied by its absmax.
//
// A block of threads makes a tile of 32 WM rows of W by 8 NT rows of x. Its warps are 2 halves of the tile's
// rows by 4 quarters of each stage's 256 columns: every weight is decoded once, by one lane. Stages of packed
// W and x arrive by cp.async; each warp fetches the next stage's absmax into registers (8-bit ones are too
// small for cp.async). The quarters' sums are added in order. A result's sums depend on K alone: not on NT,
// WM, M, N or the device.
#include "linear.h"

using namespace pk;

namespace {

constexpr int THREADS = 256, QUARTERS = 4;
constexpr int BLOCK_K = 64, STAGE_K = QUARTERS * BLOCK_K;  // columns: of a warp, of a stage
constexpr int W_ROW = STAGE_K / 2, X_ROW = STAGE_K * 2;    // bytes of a row in a stage
constexpr int RANKS = 16;                                  // of the low-rank part, at a time in shared memory

// Shared memory of a tile: the stages, and after them in the same place the quarters' sums and a piece of the
// low-rank factors.
template <int NT, int WM>
struct Tile {
  static constexpr int N = 32 * WM, M = 8 * NT;
  static constexpr int W_BYTES = N * W_ROW, STAGE_BYTES = W_BYTES + M * X_ROW;
  static constexpr int STAGES = NT == 1 ? 4 : NT <= 4 ? 3 : 2;
  // floats: 8 lanes of neighbouring n and 4 lanes of every other m hit 32 banks.
  static constexpr int SUM_ROW = N + 4;
  static constexpr int SUMS = QUARTERS * M * SUM_ROW, B_ROW = N + 1;
  static constexpr int END_BYTES = 4 * (SUMS + RANKS * B_ROW + M * RANKS);
  static constexpr int BYTES = STAGES * STAGE_BYTES > END_BYTES ? STAGES * STAGE_BYTES : END_BYTES;
  static_assert(BYTES + 1024 <= 99 << 10, "sm_86 and sm_89 have no more");
};

// Where the 16 bytes number `chunk` of a row lie in it. W: the 4 rows by 2 chunks, x: the 2 rows by 4 chunks,
// that one access serves at once hit 32 banks.
__host__ __device__ constexpr int w_chunk(int row, int chunk) { return chunk ^ (row & 3) << 1; }
__host__ __device__ constexpr int x_chunk(int row, int chunk) { return chunk ^ (row & 1); }

// Starts the copies of a stage: W [N][256] codes, x [M][256]; rows and columns beyond the ends become zeros.
// A thread has one column of 16-byte chunks.
template <int NT, int WM>
__device__ __forceinline__ void copy_stage(const Linear& a, int64_t n0, int64_t m0, int64_t k0,
                                           unsigned char* stage) {
  using T = Tile<NT, WM>;
  constexpr int W_CHUNKS = W_ROW / 16, X_CHUNKS = X_ROW / 16;
  constexpr int W_ROWS = THREADS / W_CHUNKS, X_ROWS = THREADS / X_CHUNKS;  // rows that are copied at once
  const int w_row = threadIdx.x / W_CHUNKS, w_at = threadIdx.x % W_CHUNKS, x_row = threadIdx.x / X_CHUNKS,
            x_at = threadIdx.x % X_CHUNKS;
  const int64_t w_k = k0 + w_at * 32, x_k = k0 + x_at * 8;
  const uint8_t* w_from = a.w.packed + ((n0 + w_row) * a.k + w_k) / 2;
  const uint16_t* x_from = static_cast<const uint16_t*>(a.x) + (m0 + x_row) * a.k + x_k;
#pragma unroll
  for (int row = w_row; row < T::N; row += W_ROWS, w_from += W_ROWS / 2 * a.k)
    cp_async16(stage + row * W_ROW + w_chunk(row, w_at) * 16, w_from, w_k < a.k && n0 + row < a.n);
#pragma unroll
  for (int row = x_row; row < T::M; row += X_ROWS, x_from += X_ROWS * a.k)
    cp_async16(stage + T::W_BYTES + row * X_ROW + x_chunk(row, x_at) * 16, x_from,
               x_k < a.k && m0 + row < a.m);
}

// Absmax of the lane's rows g, g + 8, g + 16 ... of a warp's part, at the block of column k.
template <int WM>
__device__ __forceinline__ void fetch_scales(const Linear& a, int64_t n, int64_t k,
                                             RawScale (&scales)[2 * WM]) {
#pragma unroll
  for (int i = 0; i < 2 * WM; i++) {
    const int64_t row = n + 8 * i < a.n ? n + 8 * i : a.n - 1;
    scales[i] = k < a.k ? fetch_scale(a, (row * a.k + k) >> a.w.shift) : RawScale{0.0f, 0};
  }
}

template <bool BF16>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (BF16) mma_m16n8k16_bf16(c, a, b);
  else mma_m16n8k16_f16(c, a, b);
}

// The lane's codes of one 16-row part as the A operands of steps 0 ... 3; row: of W in the stage, chunk: the
// first of the warp's two.
__device__ __forceinline__ void decode_rows(const unsigned char* w, int row, int chunk, int t,
                                            const Planes& planes, uint32_t (&operands)[4][4]) {
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {  // rows g and g + 8
    const int r = row + 8 * upper;
    const uint2 q =
        *reinterpret_cast<const uint2*>(w + r * W_ROW + w_chunk(r, chunk + t / 2) * 16 + t % 2 * 8);
    const uint32_t words[2] = {q.x, q.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t pairs[4];
      decode8(words[i], planes, pairs);
      operands[2 * i][upper] = pairs[0], operands[2 * i][2 + upper] = pairs[1];
      operands[2 * i + 1][upper] = pairs[2], operands[2 * i + 1][2 + upper] = pairs[3];
    }
  }
}

// sums += absmax * (the warp's 64 columns of its rows of W times those of all rows of x).
template <int NT, int WM, bool BF16>
__device__ __forceinline__ void multiply_block(const unsigned char* stage, int half, int quarter, int lane,
                                               const Planes& planes, const float (&scales)[2 * WM],
                                               float (&sums)[NT][WM][4]) {
  using T = Tile<NT, WM>;
  const int g = lane / 4, t = lane % 4;
  uint32_t w[WM][4][4];  // [part][step][register]
#pragma unroll
  for (int part = 0; part < WM; part++)
    decode_rows(stage, (half * WM + part) * 16 + g, 2 * quarter, t, planes, w[part]);
  constexpr int TOGETHER = NT < 2 ? 1 : 2;  // with WM parts each: independent chains of four mmas
#pragma unroll
  for (int from = 0; from < NT; from += TOGETHER) {
    uint4 x[TOGETHER][2];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int row = (from + i) * 8 + g;
      const unsigned char* x_row = stage + T::W_BYTES + row * X_ROW;
#pragma unroll
      for (int j = 0; j < 2; j++)
        x[i][j] = *reinterpret_cast<const uint4*>(x_row + x_chunk(row, 8 * quarter + 2 * t + j) * 16);
    }
    float c[TOGETHER][WM][4] = {};
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        const uint4& v = x[i][step / 2];
        const uint32_t b[2] = {step % 2 ? v.z : v.x, step % 2 ? v.w : v.y};
#pragma unroll
        for (int part = 0; part < WM; part++) multiply_add<BF16>(c[i][part], w[part][step], b);
      }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int part = 0; part < WM; part++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[from + i][part][e] =
              __fmaf_rn(scales[2 * part + e / 2], c[i][part][e], sums[from + i][part][e]);
  }
}

// Adds the quarters' sums in order, then scaling * xa B^T and the bias, and stores. A thread has one column
// of the tile and every THREADS / N-th row.
template <int NT, int WM>
__device__ __forceinline__ void finish(const Linear& a, int64_t n0, int64_t m0, const float* sums, float* b,
                                       float* xa) {
  using T = Tile<NT, WM>;
  constexpr int STRIDE = THREADS / T::N, COUNT = T::M / STRIDE;
  const int column = threadIdx.x % T::N, first = threadIdx.x / T::N;
  float out[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int at = (first + i * STRIDE) * T::SUM_ROW + column;
    out[i] = sums[at];
#pragma unroll
    for (int q = 1; q < QUARTERS; q++) out[i] += sums[q * T::M * T::SUM_ROW + at];
  }
  for (int r0 = 0; r0 < a.rank; r0 += RANKS) {
    __syncthreads();
    for (int i = threadIdx.x; i < T::N * RANKS; i += THREADS) {
      const int n = i / RANKS, r = i % RANKS;
      b[r * T::B_ROW + n] = n0 + n < a.n && r0 + r < a.rank
                                ? load_value(a.lora_b, a.lora_dtype, (n0 + n) * a.rank + r0 + r)
                                : 0.0f;
    }
    for (int i = threadIdx.x; i < T::M * RANKS; i += THREADS) {
      const int m = i / RANKS, r = i % RANKS;
      xa[i] = m0 + m < a.m && r0 + r < a.rank ? a.scaling * a.xa[(m0 + m) * a.rank + r0 + r] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < RANKS; r++)
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        out[i] = __fmaf_rn(xa[(first + i * STRIDE) * RANKS + r], b[r * T::B_ROW + column], out[i]);
  }
  const int64_t n = n0 + column;
  if (n >= a.n) return;
  const float bias = a.bias ? load_value(a.bias, a.bias_dtype, n) : 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int64_t m = m0 + first + i * STRIDE;
    if (m < a.m) store_value(a.y, a.dtype, m * a.n + n, out[i] + bias);
  }
}

// K is a multiple of 64, a quantization block of at least 64: 64 columns that start at a multiple of 64 have
// one absmax a row.
template <int NT, int WM, bool BF16>
__global__ void __launch_bounds__(THREADS, NT <= 2 ? 2 : 1) mma_kernel(Linear a, unsigned m_tiles) {
  using T = Tile<NT, WM>;
  PK_SHARED(float, absmax_code, [256]);
  unsigned char* shared = dynamic_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = warp % QUARTERS,
            half = warp / QUARTERS;
  // Neighbours share rows of W.
  const int64_t m0 = (int64_t)(blockIdx.x % m_tiles) * T::M, n0 = (int64_t)(blockIdx.x / m_tiles) * T::N;
  // The lane's first row of W.
  const int64_t mine = n0 + half * WM * 16 + lane / 4;
  const int stages = (int)((a.k + STAGE_K - 1) / STAGE_K);

#pragma unroll
  for (int i = 0; i < T::STAGES - 1; i++) {
    if (i < stages) copy_stage<NT, WM>(a, n0, m0, (int64_t)i * STAGE_K, shared + i * T::STAGE_BYTES);
    cp_async_commit();
  }
  RawScale next[2 * WM];
  fetch_scales<WM>(a, mine, quarter * BLOCK_K, next);
  if (!a.w.absmax) absmax_code[threadIdx.x] = a.w.absmax_code[threadIdx.x];
  const Planes planes = load_planes<BF16>(a.w.code);
  float sums[NT][WM][4] = {};
  for (int stage = 0; stage < stages; stage++) {
    cp_async_wait<T::STAGES - 2>();
    // The stage is there for all, and the one before it has been read by all: its place is free.
    __syncthreads();
    const int ahead = stage + T::STAGES - 1;
    if (ahead < stages)
      copy_stage<NT, WM>(a, n0, m0, (int64_t)ahead * STAGE_K, shared + ahead % T::STAGES * T::STAGE_BYTES);
    cp_async_commit();
    const int64_t k = (int64_t)stage * STAGE_K + quarter * BLOCK_K;
    float scales[2 * WM];
#pragma unroll
    for (int i = 0; i < 2 * WM; i++) scales[i] = combine_scale(a, next[i], absmax_code);
    fetch_scales<WM>(a, mine, k + STAGE_K, next);
    if (k < a.k)
      multiply_block<NT, WM, BF16>(shared + stage % T::STAGES * T::STAGE_BYTES, half, quarter, lane, planes,
                                   scales, sums);
  }
  cp_async_wait<0>();
  __syncthreads();

  float* quarters = reinterpret_cast<float*>(shared);  // [QUARTERS][M][SUM_ROW]
#pragma unroll
  for (int i = 0; i < NT; i++)
#pragma unroll
    for (int part = 0; part < WM; part++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = i * 8 + lane % 4 * 2 + e % 2, n = (half * WM + part) * 16 + lane / 4 + e / 2 * 8;
        quarters[(quarter * T::M + m) * T::SUM_ROW + n] = sums[i][part][e];
      }
  __syncthreads();
  finish<NT, WM>(a, n0, m0, quarters, quarters + T::SUMS, quarters + T::SUMS + RANKS * T::B_ROW);
}

template <int NT, int WM>
int launch_tiles(const Linear& a, void* stream) {
  using T = Tile<NT, WM>;
  const int64_t m_tiles = ceil_div(a.m, T::M), blocks = m_tiles * ceil_div(a.n, T::N);
  if (blocks > 0x7fffffff) return PK_ERR_SHAPE;
  const Where where = {dim3((unsigned)blocks), THREADS, T::BYTES, stream};
  return launch(a.dtype == PK_BF16 ? mma_kernel<NT, WM, true> : mma_kernel<NT, WM, false>, where, a,
                (unsigned)m_tiles);
}

// Tiles of 64 rows of W, or of 32 where those would leave processors without one.
template <int NT>
int launch_width(const Linear& a, int processors, void* stream) {
  const bool wide = ceil_div(a.n, 64) * ceil_div(a.m, 8 * NT) >= processors;
  return wide ? launch_tiles<NT, 2>(a, stream) : launch_tiles<NT, 1>(a, stream);
}

}  // namespace

extern "C" int pk_mma_4bit_supported(int dtype, int64_t n, int64_t k, int32_t blocksize, int capability) {
  const bool sizes =
      n > 0 && n <= 0x7fffffff && k > 0 && k <= 0x7fffffff && k % BLOCK_K == 0 && blocksize >= BLOCK_K;
  return sizes && (dtype == PK_BF16 || dtype == PK_F16) && capability >= 80;
}

extern "C" int pk_mma_4bit_cuda(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                                const void* bias, int bias_dtype, const float* xa, void* y, void* stream,
                                int device) {
  Linear a;
  if (const int bad = check_linear(w, lora, x, dtype, m, bias, bias_dtype, xa, y, &a)) return bad;
  if (m == 0 || w->n == 0) return PK_OK;
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  DeviceLimits limits;
  if (const int bad = device_limits(device, &limits)) return bad;
  if (!pk_mma_4bit_supported(dtype, w->n, w->k, w->blocksize, limits.capability)) return PK_ERR_ARCH;
  if (!aligned(w->data, 16) || !aligned(x, 16)) return PK_ERR_ARCH;
  if (m <= 8) return launch_width<1>(a, limits.processors, stream);
  if (m <= 16) return launch_width<2>(a, limits.processors, stream);
  if (m <= 32) return launch_width<4>(a, limits.processors, stream);
  return launch_width<8>(a, limits.processors, stream);
}
