// Dequantization in one launch, nested absmax included: T(fp32(code) * fp32(absmax)), one rounding, bit for
// bit on every path.
#include "common.h"
#include "nf4_decode.h"

namespace pk {
namespace {

constexpr int THREADS = 256;

// A window [rows, cols] of the flattened weight: row i's elements are start + i * k ..., and go to out + i *
// ld_out.
struct Window {
  int64_t start, k, rows, cols, ld_out;
  uint32_t groups;  // of a row: what one thread or one pair of threads takes, rounded up
};

struct Place {
  int64_t row, col;  // first element in the window
  int64_t count;     // valid elements from there on, at most the group's; <= 0: nothing to do
};

// Where group `index` of the window lies, `size` elements a group.
__device__ __forceinline__ Place place_of(const Window& w, uint32_t index, int size) {
  const uint32_t row = w.rows == 1 ? 0 : index / w.groups;
  const int64_t col = (int64_t)(index - row * w.groups) * size;
  return {row, col, row < w.rows ? w.cols - col : 0};
}

// The 16 codes into shared memory: from there a lookup never conflicts, as 16 words lie in 16 banks.
__device__ __forceinline__ void share_code(const float* code, float (&table)[16]) {
  if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
  __syncthreads();
}

// The 32 codes from `element` (a multiple of 32) on, of which `count` exist; words that do not exist whole
// are zero.
__device__ __forceinline__ uint4 load_codes(const uint8_t* packed, int64_t element, int64_t count) {
  const uint8_t* from = packed + (element >> 1);
  if (count >= 32) return ld_global_nc_v4(from);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  return make_uint4(count >= 8 ? words[0] : 0, count >= 16 ? words[1] : 0, count >= 24 ? words[2] : 0, 0);
}

// What is left of a row, element after element: [from, to) behind `element`, where the block's scale is
// `scale`.
template <typename T>
__device__ __forceinline__ void decode_rest(const uint8_t* packed, const float (&table)[16], float scale,
                                            int64_t element, int64_t from, int64_t to, T* out) {
#pragma unroll 1
  for (int64_t i = from; i < to; i++) store(__fmul_rn(table[nibble(packed, element + i)], scale), out + i);
}

// The block's 16 values in T, once for the 32 codes a thread decodes: a block has one scale, so rounding 16
// products is rounding them all.
template <typename T>
__device__ __forceinline__ Planes scaled_planes(const float (&table)[16], float scale) {
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    pairs[i] = pack2<T>(__fmul_rn(table[2 * i], scale), __fmul_rn(table[2 * i + 1], scale));
  return planes_of(pairs);
}

// 32 codes a thread: one 16-byte load, four 16-byte stores. PAIRED: two neighbours take 64 codes of one block
// and trade two words, so that each of their stores fills a 32-byte sector; else (blocks of 32, or rows that
// start between) each keeps its own.
template <typename T, bool PAIRED>
__global__ void __launch_bounds__(THREADS)
    dequantize_16bit_kernel(Weight w, Window window, T* __restrict__ out) {
  PK_SHARED(float, table, [16]);
  share_code(w.code, table);
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
  const int odd = PAIRED ? threadIdx.x & 1 : 0;
  constexpr int GROUP = PAIRED ? 64 : 32;
  const Place place = place_of(window, PAIRED ? thread / 2 : thread, GROUP);
  const int64_t element = window.start + place.row * window.k + place.col;
  const uint4 mine = load_codes(w.packed, element + 32 * odd, place.count - 32 * odd);
  uint32_t words[4] = {mine.x, mine.y, mine.z, mine.w};
  if (PAIRED) {  // the even thread ends up with the even words of both, the odd one with the odd words
    const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? mine.x : mine.y, 1);
    const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? mine.z : mine.w, 1);
    words[0] = odd ? first : mine.x;
    words[1] = odd ? second : mine.z;
    words[2] = odd ? mine.y : first;
    words[3] = odd ? mine.w : second;
  }
  if (place.count <= 0) return;
  const float scale = absmax_of(w, element >> w.shift);
  const Planes planes = scaled_planes<T>(table, scale);
  T* to = out + place.row * window.ld_out + place.col;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int offset = PAIRED ? 16 * i + 8 * odd : 8 * i;
    if (place.count >= offset + 8) {
      uint32_t values[4];  // [8] of T
      decode8(words[i], planes, values);
      *reinterpret_cast<uint4*>(to + offset) = make_uint4(values[0], values[1], values[2], values[3]);
    } else {
      decode_rest(w.packed, table, scale, element, offset, place.count, to);
    }
  }
}

// fp32: two neighbours take 16 codes, each reads 8 and both know all, so that each of their 16-byte stores
// fills a 32-byte sector.
__global__ void __launch_bounds__(THREADS)
    dequantize_f32_kernel(Weight w, Window window, float* __restrict__ out) {
  PK_SHARED(float, table, [16]);
  share_code(w.code, table);
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
  const int odd = threadIdx.x & 1;
  const Place place = place_of(window, thread / 2, 16);
  const int64_t element = window.start + place.row * window.k + place.col;
  uint32_t mine = 0;
  if (place.count - 8 * odd >= 8)
    mine = __ldg(reinterpret_cast<const uint32_t*>(w.packed + (element >> 1)) + odd);
  const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
  if (place.count <= 0) return;
  const float scale = absmax_of(w, element >> w.shift);
  float* to = out + place.row * window.ld_out + place.col;
#pragma unroll
  for (int word = 0; word < 2; word++) {
    // Bytes of elements 8 word + 4 odd and the three after it.
    const uint32_t codes = (word == odd ? mine : other) >> 16 * odd;
    const int offset = 8 * word + 4 * odd;
    if (place.count >= 8 * word + 8) {
      const float first = __fmul_rn(table[codes >> 4 & 15], scale),
                  second = __fmul_rn(table[codes & 15], scale);
      const float third = __fmul_rn(table[codes >> 12 & 15], scale),
                  fourth = __fmul_rn(table[codes >> 8 & 15], scale);
      *reinterpret_cast<float4*>(to + offset) = make_float4(first, second, third, fourth);
    } else {
      decode_rest(w.packed, table, scale, element, offset,
                  place.count < offset + 4 ? place.count : offset + 4, to);
    }
  }
}

// Any window: a warp takes 256 neighbouring elements of a row, lane after lane, each with its own absmax.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize_any_kernel(Weight w, Window window, T* __restrict__ out) {
  PK_SHARED(float, table, [16]);
  share_code(w.code, table);
  const uint32_t warp = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const Place place = place_of(window, warp, 256);
  const int64_t element = window.start + place.row * window.k + place.col;
  T* to = out + place.row * window.ld_out + place.col;
  for (int i = lane; i < 256 && i < place.count; i += 32)
    store(__fmul_rn(table[nibble(w.packed, element + i)], absmax_of(w, (element + i) >> w.shift)), to + i);
}

// All rows of the window start at a multiple of `elements`, in the weight, and of 16 bytes, in out.
bool rows_aligned(const Window& w, int64_t elements, const void* out, int64_t bytes) {
  if (w.start % elements || !aligned(out, 16)) return false;
  return w.rows == 1 || (w.k % elements == 0 && w.ld_out * bytes % 16 == 0);
}

// Launches with `threads` threads a group of `size` elements.
template <typename Kernel, typename T>
int launch_groups(Kernel kernel, const Weight& w, Window window, T* out, int size, int threads,
                  void* stream) {
  const int64_t groups = (window.cols + size - 1) / size, total = groups * window.rows * threads;
  // Indices are 32 bits wide: enough for 2^34 elements and more.
  if (total > 0xffffffffll - THREADS) return PK_ERR_SHAPE;
  window.groups = (uint32_t)groups;
  return launch(kernel, {dim3((unsigned)((total + THREADS - 1) / THREADS)), THREADS, 0, stream}, w, window,
                out);
}

template <typename T>
int dequantize_16bit(const Weight& w, const Window& window, T* out, void* stream) {
  if (aligned(w.packed, 16)) {
    const bool paired = w.shift >= 6 && rows_aligned(window, 64, out, 2);
    if (paired) return launch_groups(dequantize_16bit_kernel<T, true>, w, window, out, 64, 2, stream);
    if (rows_aligned(window, 32, out, 2))
      return launch_groups(dequantize_16bit_kernel<T, false>, w, window, out, 32, 1, stream);
  }
  return launch_groups(dequantize_any_kernel<T>, w, window, out, 256, 32, stream);
}

int dequantize_f32(const Weight& w, const Window& window, float* out, void* stream) {
  if (aligned(w.packed, 4) && rows_aligned(window, 16, out, 4))
    return launch_groups(dequantize_f32_kernel, w, window, out, 16, 2, stream);
  return launch_groups(dequantize_any_kernel<float>, w, window, out, 256, 32, stream);
}

}  // namespace
}  // namespace pk

extern "C" int pk_dequantize_4bit_cuda(const pk_weight* w, int64_t row, int64_t rows, int64_t col,
                                       int64_t cols, void* out, int64_t ld_out, int dtype, void* stream,
                                       int device) {
  using namespace pk;
  if (const int bad = check_window(w, row, rows, col, cols, out, ld_out, dtype)) return bad;
  if (rows == 0 || cols == 0) return PK_OK;
  const Weight view = view_of(*w);
  Window window = {row * w->k + col, w->k, rows, cols, ld_out, 0};
  // Whole rows in one piece: rows need not start aligned.
  if (cols == w->k && ld_out == cols) window.rows = 1, window.cols = rows * cols;
  const DeviceGuard guard(device);
  if (guard.status() != PK_OK) return guard.status();
  if (dtype == PK_F32) return dequantize_f32(view, window, static_cast<float*>(out), stream);
  if (dtype == PK_BF16) return dequantize_16bit(view, window, static_cast<bf16*>(out), stream);
  return dequantize_16bit(view, window, static_cast<f16*>(out), stream);
}
