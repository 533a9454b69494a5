// The C ABI: checks, picks the ISA once at load, calls its kernels.
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "checks.h"
#include "kernels.h"
#include "tile_plan.h"

namespace {

using namespace pk;

bool always() { return true; }
#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too (xgetbv), so a level it confirms can be used. Clang's
// does not know f16c, which needs of the system what AVX needs.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
// With the byte permutes (VBMI), which Cooper Lake lacks: Zen 4, Sapphire Rapids and later.
[[maybe_unused]] bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}
// The tiles' registers are 8 KB of state that Linux saves only for a process which asked for it. It refuses
// where a thread's alternate signal stack would be too small.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
[[maybe_unused]] bool has_amx() {
#if defined(PK_SIMDE)
  return true;
#else
  // leaf 7, EDX; older compilers' __builtin_cpu_supports has neither.
  constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
  unsigned a, b, c, d = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & BF16) &&
         may_use_tiles();
#endif
}
#endif

struct Level {
  const Kernels* kernels;
  bool (*supported)();
};
const Level LEVELS[] = {
    // lowest first
    {&pk::kernels_baseline, always},
#if defined(__x86_64__)
    {&pk::kernels_avx2, has_avx2},
    {&pk::kernels_avx512, has_avx512},
#if !defined(PK_NO_AVX512BF16)  // the compiler does not know the flags (setup.py)
    {&pk::kernels_avx512bf16, has_avx512bf16},
#endif
#if !defined(PK_NO_AMX)
    {&pk::kernels_amx, has_amx},
#endif
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
  const int wanted = threads > 0 ? threads : omp_get_max_threads();
  return wanted < MOST_THREADS ? wanted : MOST_THREADS;
#else
  return 1;
#endif
}

// Scratch begins at the next cache line, wherever the caller's does: its bytes hold as many more.
constexpr int64_t LINE = 64;
float* aligned(void* scratch) { return (float*)(((uintptr_t)scratch + LINE - 1) / LINE * LINE); }
int64_t bytes_of(int64_t floats) { return floats * (int64_t)sizeof(float) + LINE - 1; }

int64_t gemv_floats(int64_t m, int64_t n, int64_t k, int64_t r) {
  return m * (k + gemv_ld(k)) + r * (k + n) + n;
}

int64_t group_floats(const Group& g, int64_t m, int threads) {
  const int64_t forward = g.forward_plan(m, current->lanes, threads).total;
  // A backward pass without dx runs on the plan without base products.
  const int64_t with_dx = g.backward_plan(m, true, current->lanes, threads).total,
                without = g.backward_plan(m, false, current->lanes, threads).total;
  const int64_t most = largest(forward, largest(with_dx, without));
  if (!current->tiles || !tiles_take(g)) return most;
  return largest(most,
                 largest(forward_tile_plan(g, m, threads).total, backward_tile_plan(g, m, threads).total));
}

// One linear as a group of one; without a base product where w is null.
struct Single {
  pk_member member{};
  pk_adapter adapter{};
  Single(const pk_weight* w, const pk_lora& lora, int64_t m, int64_t n, int64_t k) {
    if (w) member.weight = *w;
    member.weight.n = n, member.weight.k = k;
    adapter.lora = lora;
    adapter.row_end = m;
  }
  Group group() const { return {&member, 1, &adapter, adapter.lora.r ? 1 : 0}; }
};

// 0 for sizes that no call takes.
int64_t single_scratch_bytes(bool base, int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  if (n < 1 || k < 1 || bad_rank(r) || !matrix(m, n) || !matrix(m, k) || !matrix(n, k) ||
      !matrix(largest(largest(m, n), k), r))
    return 0;
  static const float some = 0;
  pk_weight w{};
  w.data = w.code = &some;  // a 4-bit weight, so that there is room for either engine
  w.blocksize = 64;
  pk_lora lora{};
  lora.r = r;
  lora.dropout_threshold = r != 0;  // room for a mask
  const int64_t gemv = base && m <= 64 ? gemv_floats(m, n, k, r) : 0;
  return bytes_of(
      largest(gemv, group_floats(Single(base ? &w : nullptr, lora, m, n, k).group(), m, threads)));
}

// single: one linear, whose caller was told a scratch by its sizes alone.
int64_t needed_bytes(const Group& g, int64_t m, int threads, bool single) {
  const int64_t r = g.adapter_count ? g.adapters[0].lora.r : 0;
  return single ? single_scratch_bytes(g.base(), m, g.n(), g.k(), r, threads)
                : bytes_of(group_floats(g, m, threads));
}

int group_forward(const Group& g, const void* x, int dtype, int64_t m, void* scratch, int64_t bytes,
                  int threads, bool single = false) {
  if (int bad = check_group(g, m)) return bad;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m == 0 || g.n() == 0) return PK_OK;
  if (!x || !scratch) return PK_ERR_NULL;
  for (int64_t i = 0; i < g.count; i++)
    if (g.members[i].weight.n && !g.members[i].y) return PK_ERR_NULL;
  for (int64_t i = 0; i < g.adapter_count; i++)
    if (g.adapters[i].lora.r && !g.adapters[i].xa && g.adapters[i].row_begin < g.adapters[i].row_end)
      return PK_ERR_NULL;
  if (bytes < needed_bytes(g, m, threads, single)) return PK_ERR_SCRATCH;
  current->forward(g, x, dtype, m, aligned(scratch), threads);
  return PK_OK;
}

int group_backward(const Group& g, const void* x, int dtype, int64_t m, void* dx, void* scratch,
                   int64_t bytes, int threads, bool single = false) {
  if (int bad = check_group(g, m)) return bad;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m < 1 || g.n() < 1) return PK_ERR_SHAPE;
  if (!scratch) return PK_ERR_NULL;
  for (int64_t i = 0; i < g.count; i++)
    if (g.members[i].weight.n && (!g.members[i].dy || (g.members[i].d_scale && !g.members[i].u)))
      return PK_ERR_NULL;
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const pk_adapter& a = g.adapters[i];
    const bool rows = a.row_begin < a.row_end;
    if ((a.d_lora_a || a.d_lora_b) && !a.lora.r) return PK_ERR_NULL;
    if ((a.d_lora_a && rows && (!x || !a.dyb)) || (a.d_lora_b && rows && !a.xa)) return PK_ERR_NULL;
  }
  if (bytes < needed_bytes(g, m, threads, single)) return PK_ERR_SCRATCH;
  current->backward(g, x, dtype, m, dx, aligned(scratch), threads);
  return PK_OK;
}

}  // namespace

extern "C" {

const char* pk_status_string(int status) { return status_text(status); }
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

int pk_quantize_4bit_cpu(const void* w, int dtype, int64_t numel, int32_t blocksize, const float* code,
                         uint8_t* packed, float* absmax, int threads) {
  if (int bad = check_quantize(w, dtype, numel, blocksize, code, packed, absmax)) return bad;
  current->quantize(w, dtype, numel, blocksize, code, packed, absmax, threads_or_default(threads));
  return PK_OK;
}

int pk_quantize_absmax_cpu(const float* absmax, int64_t count, int32_t blocksize, const float* code,
                           uint8_t* out, float* nested, int threads) {
  if (int bad = check_quantize_absmax(absmax, count, blocksize, code, out, nested)) return bad;
  current->quantize_absmax(absmax, count, blocksize, code, out, nested, threads_or_default(threads));
  return PK_OK;
}

int pk_dequantize_4bit_cpu(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                           void* out, int dtype, int threads) {
  if (int bad = check_window(w, row, rows, col, cols, out, cols, dtype)) return bad;
  if (rows == 0 || cols == 0) return PK_OK;
  current->dequantize(*w, row, rows, col, cols, out, dtype, threads_or_default(threads));
  return PK_OK;
}

int64_t pk_qlora_linear_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  return single_scratch_bytes(true, m, n, k, r, threads_or_default(threads));
}

int64_t pk_lora_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  return single_scratch_bytes(false, m, n, k, r, threads_or_default(threads));
}

int64_t pk_qlora_group_scratch_bytes(const pk_member* members, int64_t count, const pk_adapter* adapters,
                                     int64_t adapter_count, int64_t m, int threads) {
  const Group g{members, count, adapters, adapter_count};
  return check_group(g, m) == PK_OK ? bytes_of(group_floats(g, m, threads_or_default(threads))) : 0;
}

int pk_qlora_group_fwd_cpu(const pk_member* members, int64_t count, const pk_adapter* adapters,
                           int64_t adapter_count, const void* x, int dtype, int64_t m, void* scratch,
                           int64_t bytes, int threads) {
  return group_forward({members, count, adapters, adapter_count}, x, dtype, m, scratch, bytes,
                       threads_or_default(threads));
}

int pk_qlora_group_bwd_cpu(const pk_member* members, int64_t count, const pk_adapter* adapters,
                           int64_t adapter_count, const void* x, int dtype, int64_t m, void* dx,
                           void* scratch, int64_t bytes, int threads) {
  return group_backward({members, count, adapters, adapter_count}, x, dtype, m, dx, scratch, bytes,
                        threads_or_default(threads));
}

static int lora_forward(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                        int64_t n, int64_t k, const void* bias, int bias_dtype, void* y, float* xa, int gemv,
                        void* scratch, int64_t bytes, int threads) {
  if (!lora) return PK_ERR_NULL;
  if (m < 0 || n < 0 || k < 1 || (gemv && m > 64)) return PK_ERR_SHAPE;
  threads = threads_or_default(threads);
  Single one(w, *lora, m, n, k);
  one.member.bias = bias, one.member.bias_dtype = bias_dtype, one.member.y = y, one.adapter.xa = xa;
  if (!gemv) return group_forward(one.group(), x, dtype, m, scratch, bytes, threads, true);
  if (int bad = check_group(one.group(), m)) return bad;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m == 0 || n == 0) return PK_OK;
  if (!x || !y || !scratch || (lora->r && !xa)) return PK_ERR_NULL;
  if (bytes < bytes_of(gemv_floats(m, n, k, lora->r))) return PK_ERR_SCRATCH;
  current->gemv(*w, *lora, x, dtype, m, bias, bias_dtype, y, xa, aligned(scratch), threads);
  return PK_OK;
}

int pk_qlora_linear_fwd_cpu(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                            const void* bias, int bias_dtype, void* y, float* xa, int gemv, void* scratch,
                            int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  return lora_forward(w, lora, x, dtype, m, w->n, w->k, bias, bias_dtype, y, xa, gemv, scratch, bytes,
                      threads);
}

int pk_lora_fwd_cpu(const pk_lora* lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                    const void* bias, int bias_dtype, void* y, float* xa, void* scratch, int64_t bytes,
                    int threads) {
  return lora_forward(nullptr, lora, x, dtype, m, n, k, bias, bias_dtype, y, xa, 0, scratch, bytes, threads);
}

static int lora_backward(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x, int dtype,
                         int64_t m, int64_t n, int64_t k, const float* xa, float* dyb, void* dx, void* d_a,
                         void* d_b, float* d_bias, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_lora(lora)) return bad;
  if (((d_a || d_b) && !lora->r) || (lora->r && (dx || d_a) && !dyb)) return PK_ERR_NULL;
  if (m < 1 || n < 1 || k < 1) return PK_ERR_SHAPE;
  Single one(w, *lora, m, n, k);
  one.member.dy = dy, one.member.d_bias = d_bias;
  one.adapter.xa = const_cast<float*>(xa), one.adapter.dyb = dyb, one.adapter.d_lora_a = d_a,
  one.adapter.d_lora_b = d_b;
  return group_backward(one.group(), x, dtype, m, dx, scratch, bytes, threads_or_default(threads), true);
}

int pk_qlora_linear_bwd_cpu(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x, int dtype,
                            int64_t m, const float* xa, float* dyb, void* dx, void* d_a, void* d_b,
                            float* d_bias, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  return lora_backward(w, lora, dy, x, dtype, m, w->n, w->k, xa, dyb, dx, d_a, d_b, d_bias, scratch, bytes,
                       threads);
}

int pk_lora_bwd_cpu(const pk_lora* lora, const void* dy, const void* x, int dtype, int64_t m, int64_t n,
                    int64_t k, const float* xa, float* dyb, void* dx, void* d_a, void* d_b, float* d_bias,
                    void* scratch, int64_t bytes, int threads) {
  return lora_backward(nullptr, lora, dy, x, dtype, m, n, k, xa, dyb, dx, d_a, d_b, d_bias, scratch, bytes,
                       threads);
}

int pk_dropout_mask_cpu(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask, int threads) {
  if (!matrix(m, k) || threshold > EVERY_DRAW) return PK_ERR_SHAPE;
  if (m == 0 || k == 0) return PK_OK;
  if (!mask) return PK_ERR_NULL;
  current->dropout_mask(m, k, threshold, seed, mask, threads_or_default(threads));
  return PK_OK;
}

static int glu(const pk_glu* a, const pk_glu_grad* d, int dtype, int64_t m, int64_t n, int activation,
               const void* dy, void* h, int threads) {
  if (int bad = check_glu(a, d, dtype, m, n, activation)) return bad;
  if (m == 0 || n == 0) return PK_OK;
  if (d ? !dy : !h) return PK_ERR_NULL;
  current->glu(*a, d, dtype, m, n, activation, dy, h, threads_or_default(threads));
  return PK_OK;
}
int pk_glu_fwd_cpu(const pk_glu* operands, int dtype, int64_t m, int64_t n, int activation, void* h,
                   int threads) {
  return glu(operands, nullptr, dtype, m, n, activation, nullptr, h, threads);
}
int pk_glu_bwd_cpu(const pk_glu* operands, const pk_glu_grad* grads, int dtype, int64_t m, int64_t n,
                   int activation, const void* dy, void* h, int threads) {
  return grads ? glu(operands, grads, dtype, m, n, activation, dy, h, threads) : PK_ERR_NULL;
}

int64_t pk_rms_norm_scratch_bytes(int64_t m, int64_t n, int with_d_weight) {
  if (n < 1 || !matrix(m, n)) return 0;
  return bytes_of(n * (1 + (with_d_weight ? norm_tasks(m) : 0)));
}
int pk_rms_norm_fwd_cpu(const pk_rms_norm* norm, void* y, float* rstd, void* scratch, int64_t bytes,
                        int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return PK_OK;
  if (!norm->x || !norm->weight || !y || !rstd || !scratch) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, 0)) return PK_ERR_SCRATCH;
  current->rms_norm(*norm, nullptr, nullptr, y, rstd, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}
int pk_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const float* rstd, void* dx, float* d_weight,
                        void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return d_weight ? PK_ERR_SHAPE : PK_OK;
  if (!norm->x || !norm->weight || !dy || !rstd || !scratch) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, d_weight != nullptr)) return PK_ERR_SCRATCH;
  current->rms_norm_grad(*norm, dy, nullptr, rstd, dx, d_weight, aligned(scratch),
                         threads_or_default(threads));
  return PK_OK;
}

int pk_rope_cpu(const pk_rope_heads* q, const pk_rope_heads* k, int dtype, int64_t batch, int64_t seq,
                int64_t dim, const void* cos, const void* sin, int angle_dtype, int64_t angle_batch,
                int64_t rotary, int inverse, int threads) {
  if (!q || !k) return PK_ERR_NULL;
  if (rotary < 0 || rotary > dim || rotary % 2 || !reaches(batch, angle_batch)) return PK_ERR_SHAPE;
  if (int bad = check_heads(*q, batch, seq, dim)) return bad;
  if (int bad = check_heads(*k, batch, seq, dim)) return bad;
  if (bad_dtype(dtype) || bad_dtype(angle_dtype)) return PK_ERR_DTYPE;
  if (batch == 0 || seq == 0 || dim == 0 || q->heads + k->heads == 0) return PK_OK;
  if ((q->heads && (!q->x || !q->y)) || (k->heads && (!k->x || !k->y)) || (rotary && (!cos || !sin)))
    return PK_ERR_NULL;
  const pk_rope_heads both[2] = {*q, *k};
  current->rope(both, dtype, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse,
                threads_or_default(threads));
  return PK_OK;
}

int pk_cross_entropy_cpu(void* logits, int dtype, int64_t m, int64_t n, int64_t width, const float* bias,
                         const int64_t* labels, const float* row_scale, float softcap, float label_smoothing,
                         float z_loss, float* loss, int gradient, int threads) {
  if (n < 1 || width < 1 || !matrix(m, n)) return PK_ERR_SHAPE;
  if (m == 0) return PK_OK;
  if (!logits || !labels || !loss) return PK_ERR_NULL;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  for (int64_t i = 0; i < m; i++)
    if (labels[i] < 0 || labels[i] >= n) return PK_ERR_SHAPE;
  current->cross_entropy(logits, dtype, m, n, width < n ? width : n, bias, labels, row_scale, softcap,
                         label_smoothing, z_loss, loss, gradient, threads_or_default(threads));
  return PK_OK;
}

int pk_scale_columns_fwd_cpu(const void* u, int dtype, int64_t m, int64_t n, const float* scale,
                             const float* bias, void* y, int threads) {
  if (int bad = check_scale(u, dtype, m, n, scale)) return bad;
  if (m == 0 || n == 0) return PK_OK;
  if (!y) return PK_ERR_NULL;
  current->scale_columns(u, dtype, m, n, scale, bias, y, threads_or_default(threads));
  return PK_OK;
}
int pk_scale_columns_bwd_cpu(const void* dy, const void* u, int dtype, int64_t m, int64_t n,
                             const float* scale, void* du, float* d_scale, float* d_bias, int threads) {
  if (int bad = check_scale(u, dtype, m, n, scale)) return bad;
  if (n == 0) return PK_OK;
  if (m && !dy) return PK_ERR_NULL;
  current->scale_columns_grad(dy, u, dtype, m, n, scale, du, d_scale, d_bias, threads_or_default(threads));
  return PK_OK;
}

int pk_advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < 0) return PK_ERR_SHAPE;
  if (bytes && !data) return PK_ERR_NULL;
#if defined(__linux__)
  const uintptr_t page = 2 << 20, begin = ((uintptr_t)data + page - 1) / page * page,
                  end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
  return PK_OK;
}

int pk_add_rms_norm_fwd_cpu(const pk_rms_norm* norm, const void* residual, void* s, void* y, float* rstd,
                            void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return PK_OK;
  if (!norm->x || !norm->weight || !residual || !s || !y || !rstd || !scratch) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, 0)) return PK_ERR_SCRATCH;
  current->rms_norm(*norm, residual, s, y, rstd, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}
int pk_add_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const void* ds, const float* rstd,
                            void* d_sum, float* d_weight, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return d_weight ? PK_ERR_SHAPE : PK_OK;
  if (!norm->x || !norm->weight || !dy || !ds || !d_sum || !rstd || !scratch) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, d_weight != nullptr)) return PK_ERR_SCRATCH;
  current->rms_norm_grad(*norm, dy, ds, rstd, d_sum, d_weight, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}

int pk_dora_norm_cpu(const float* cross, const float* gram, const void* lora_b, int dtype, int64_t n,
                     int64_t r, float scaling, const float* squares, const float* magnitude, float* norm,
                     float* scale, int threads) {
  if (r < 1 || bad_rank(r) || !matrix(n, r)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (n == 0) return PK_OK;
  if (!cross || !gram || !lora_b || !squares || !magnitude || !norm || !scale) return PK_ERR_NULL;
  current->dora_norm(cross, gram, lora_b, dtype, n, r, scaling, squares, magnitude, norm, scale,
                     threads_or_default(threads));
  return PK_OK;
}
int pk_row_squares_cpu(const pk_weight* w, float* squares, int threads) {
  if (int bad = check_row_squares(w, squares)) return bad;
  current->row_squares(*w, squares, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
