// The C ABI: checks, picks the ISA once at load, calls its kernels.
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "plan.h"

namespace {

using pk::Kernels;

bool always() { return true; }
#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too (xgetbv), so a level it confirms can be used.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

struct Level { const Kernels* kernels; bool (*supported)(); };
const Level LEVELS[] = {  // lowest first
    {&pk::kernels_baseline, always},
#if defined(__x86_64__)
    {&pk::kernels_avx2, has_avx2},
    {&pk::kernels_avx512, has_avx512},
#endif
};

const Kernels* best_level() {
  const Kernels* best = LEVELS[0].kernels;
  const char* forced = getenv("PEFTKERN_CPU_ISA");
  for (const Level& level : LEVELS) {
    if (!level.supported()) continue;
    best = level.kernels;
    if (forced && !strcmp(forced, best->name)) break;
  }
  return best;
}
const Kernels* current = best_level();

int threads_or_default(int threads) {
#if defined(_OPENMP)
  return threads > 0 ? threads : omp_get_max_threads();
#else
  return 1;
#endif
}

bool bad_dtype(int dtype) { return dtype != PK_F32 && dtype != PK_BF16 && dtype != PK_F16; }
bool bad_block(int64_t size, int64_t low, int64_t high) { return size < low || size > high || (size & (size - 1)); }

int check_weight(const pk_weight* w) {
  if (!w || !w->data) return PK_ERR_NULL;
  if (w->n < 0 || w->k < 1) return PK_ERR_SHAPE;
  if (!w->code) return bad_dtype(w->dtype) ? PK_ERR_DTYPE : PK_OK;
  if (bad_block(w->blocksize, 32, 4096)) return PK_ERR_BLOCKSIZE;
  if (w->absmax) return PK_OK;
  if (!w->absmax_8bit || !w->absmax_code || !w->nested_absmax || !w->absmax_offset) return PK_ERR_NULL;
  return bad_block(w->nested_blocksize, 1, 1 << 30) ? PK_ERR_BLOCKSIZE : PK_OK;
}

int check_lora(const pk_lora* l) {
  if (!l) return PK_ERR_NULL;
  if (l->r == 0) return PK_OK;
  if (l->r < 0 || l->r > 256 || l->dropout_threshold > 65536) return PK_ERR_SHAPE;
  if (!l->lora_a || !l->lora_b) return PK_ERR_NULL;
  return bad_dtype(l->dtype) ? PK_ERR_DTYPE : PK_OK;
}

int64_t gemv_floats(int64_t m, int64_t n, int64_t k, int64_t r) { return 2 * m * k + r * (k + n) + n; }

int64_t plan_floats(int64_t m, int64_t outputs, int64_t contraction, int64_t n, int64_t k, int64_t r, int threads) {
  return pk::make_plan(m, outputs, contraction, n, k, r, current->lanes, threads).total;
}
int64_t lora_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  return pk::largest(plan_floats(m, n, 0, n, k, r, threads), plan_floats(m, k, 0, n, k, r, threads)) * (int64_t)sizeof(float);
}
int64_t scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  const int64_t gemv = m <= 64 ? gemv_floats(m, n, k, r) : 0;
  const int64_t gemm = pk::largest(plan_floats(m, n, k, n, k, r, threads), plan_floats(m, k, n, n, k, r, threads));
  // A backward pass without dx runs on the plan without a base product.
  return pk::largest(pk::largest(gemv, gemm) * (int64_t)sizeof(float), lora_scratch_bytes(m, n, k, r, threads));
}

}  // namespace

extern "C" {

const char* pk_status_string(int status) {
  static const char* const TEXT[] = {"ok", "a required pointer is null", "a size is out of range", "unknown dtype",
                                     "block size is not a power of two from 32 to 4096", "scratch is too small", "unknown or unsupported ISA"};
  return status >= 0 && status <= PK_ERR_ISA ? TEXT[status] : "unknown status";
}
int pk_abi_version(void) { return PEFTKERN_ABI_VERSION; }
const char* pk_isa(void) { return current->name; }
const char* pk_isa_name(int i) {
  for (const Level& level : LEVELS)
    if (level.supported() && i-- == 0) return level.kernels->name;
  return nullptr;
}
int pk_set_isa(const char* name) {
  for (const Level& level : LEVELS)
    if (name && !strcmp(name, level.kernels->name) && level.supported()) {
      current = level.kernels;
      return PK_OK;
    }
  return PK_ERR_ISA;
}

int pk_quantize_4bit_cpu(const void* w, int dtype, int64_t numel, int32_t blocksize, const float* code, uint8_t* packed, float* absmax, int threads) {
  if (!w || !code || !packed || !absmax) return PK_ERR_NULL;
  if (numel < 1) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (bad_block(blocksize, 32, 4096)) return PK_ERR_BLOCKSIZE;
  current->quantize(w, dtype, numel, blocksize, code, packed, absmax, threads_or_default(threads));
  return PK_OK;
}

int pk_quantize_absmax_cpu(const float* absmax, int64_t count, int32_t blocksize, const float* code, uint8_t* out, float* nested, int threads) {
  if (!absmax || !code || !out || !nested) return PK_ERR_NULL;
  if (count < 1) return PK_ERR_SHAPE;
  if (bad_block(blocksize, 1, 1 << 30)) return PK_ERR_BLOCKSIZE;
  current->quantize_absmax(absmax, count, blocksize, code, out, nested, threads_or_default(threads));
  return PK_OK;
}

int pk_dequantize_4bit_cpu(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols, void* out, int dtype, int threads) {
  if (int bad = check_weight(w)) return bad;
  if (!w->code || !out) return PK_ERR_NULL;
  if (row < 0 || rows < 0 || row + rows > w->n || col < 0 || cols < 0 || col + cols > w->k) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  current->dequantize(*w, row, rows, col, cols, out, dtype, threads_or_default(threads));
  return PK_OK;
}

int64_t pk_qlora_linear_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  return scratch_bytes(m, n, k, r, threads_or_default(threads));
}

int64_t pk_lora_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  return lora_scratch_bytes(m, n, k, r, threads_or_default(threads));
}

static int lora_forward(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k, const void* bias,
                        int bias_dtype, void* y, float* xa, int gemv, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_lora(lora)) return bad;
  if (m < 0 || n < 0 || k < 1 || (gemv && m > 64)) return PK_ERR_SHAPE;
  if (m == 0 || n == 0) return PK_OK;
  if (!x || !y || !scratch || (lora->r && !xa)) return PK_ERR_NULL;
  if (bad_dtype(dtype) || (bias && bad_dtype(bias_dtype))) return PK_ERR_DTYPE;
  threads = threads_or_default(threads);
  if (bytes < (w ? scratch_bytes : lora_scratch_bytes)(m, n, k, lora->r, threads)) return PK_ERR_SCRATCH;
  if (gemv) current->gemv(*w, *lora, x, dtype, m, bias, bias_dtype, y, xa, (float*)scratch, threads);
  else current->forward(w, *lora, x, dtype, m, n, k, bias, bias_dtype, y, xa, (float*)scratch, threads);
  return PK_OK;
}

int pk_qlora_linear_fwd_cpu(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m, const void* bias, int bias_dtype, void* y,
                            float* xa, int gemv, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  return lora_forward(w, lora, x, dtype, m, w->n, w->k, bias, bias_dtype, y, xa, gemv, scratch, bytes, threads);
}

int pk_lora_fwd_cpu(const pk_lora* lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k, const void* bias, int bias_dtype, void* y, float* xa,
                    void* scratch, int64_t bytes, int threads) {
  return lora_forward(nullptr, lora, x, dtype, m, n, k, bias, bias_dtype, y, xa, 0, scratch, bytes, threads);
}

static int lora_backward(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                         const float* xa, float* dyb, void* dx, void* d_a, void* d_b, float* d_bias, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_lora(lora)) return bad;
  if (m < 1 || n < 1 || k < 1) return PK_ERR_SHAPE;
  const bool low_rank = lora->r > 0;
  if (!dy || !scratch || (d_a && !x) || (d_b && !xa) || ((d_a || d_b) && !low_rank) || (low_rank && (dx || d_a) && !dyb)) return PK_ERR_NULL;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  threads = threads_or_default(threads);
  if (bytes < (w ? scratch_bytes : lora_scratch_bytes)(m, n, k, lora->r, threads)) return PK_ERR_SCRATCH;
  current->backward(w, *lora, dy, x, dtype, m, n, k, xa, dyb, dx, d_a, d_b, d_bias, (float*)scratch, threads);
  return PK_OK;
}

int pk_qlora_linear_bwd_cpu(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x, int dtype, int64_t m, const float* xa, float* dyb,
                            void* dx, void* d_a, void* d_b, float* d_bias, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  return lora_backward(w, lora, dy, x, dtype, m, w->n, w->k, xa, dyb, dx, d_a, d_b, d_bias, scratch, bytes, threads);
}

int pk_lora_bwd_cpu(const pk_lora* lora, const void* dy, const void* x, int dtype, int64_t m, int64_t n, int64_t k, const float* xa, float* dyb,
                    void* dx, void* d_a, void* d_b, float* d_bias, void* scratch, int64_t bytes, int threads) {
  return lora_backward(nullptr, lora, dy, x, dtype, m, n, k, xa, dyb, dx, d_a, d_b, d_bias, scratch, bytes, threads);
}

int pk_dropout_mask_cpu(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask, int threads) {
  if (!mask) return PK_ERR_NULL;
  if (m < 0 || k < 0 || threshold > 65536) return PK_ERR_SHAPE;
  current->dropout_mask(m, k, threshold, seed, mask, threads_or_default(threads));
  return PK_OK;
}

int pk_cross_entropy_cpu(void* logits, int dtype, int64_t m, int64_t n, int64_t width, const float* bias, const int64_t* labels,
                         const float* row_scale, float softcap, float label_smoothing, float z_loss, float* loss, int gradient, int threads) {
  if (m < 0 || n < 1 || width < 1) return PK_ERR_SHAPE;
  if (m == 0) return PK_OK;
  if (!logits || !labels || !loss) return PK_ERR_NULL;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  for (int64_t i = 0; i < m; i++)
    if (labels[i] < 0 || labels[i] >= n) return PK_ERR_SHAPE;
  current->cross_entropy(logits, dtype, m, n, width < n ? width : n, bias, labels, row_scale, softcap, label_smoothing, z_loss, loss, gradient,
                         threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
