// The C ABI: checks, and calls the kernels of the level in use.
#include <string.h>

#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "levels.h"
#include "scratch.h"

namespace {

using namespace pk;

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
    if (level.usable() && i-- == 0) return level.kernels->name;
  return nullptr;
}
int pk_set_isa(const char* name) {
  for (const Level& level : LEVELS)
    if (name && level.usable() && !strcmp(name, level.kernels->name)) {
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

// What a forward pass of one linear takes besides its weight and x.
struct ForwardOperands {
  const void* bias;
  int bias_dtype;
  void* y;
  float* xa;
  bool gemv;
};

static int lora_forward(const pk_weight* w, const pk_lora* lora, const ForwardOperands& of, const void* x,
                        int dtype, int64_t m, int64_t n, int64_t k, void* scratch, int64_t bytes,
                        int threads) {
  if (!lora) return PK_ERR_NULL;
  if (m < 0 || n < 0 || k < 1 || (of.gemv && m > 64)) return PK_ERR_SHAPE;
  threads = threads_or_default(threads);
  Single one(w, *lora, m, n, k);
  one.member.bias = of.bias, one.member.bias_dtype = of.bias_dtype, one.member.y = of.y;
  one.adapter.xa = of.xa;
  if (!of.gemv) return group_forward(one.group(), x, dtype, m, scratch, bytes, threads, true);
  if (int bad = check_group(one.group(), m)) return bad;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m == 0 || n == 0) return PK_OK;
  if (!x || !of.y || !scratch || (lora->r && !of.xa)) return PK_ERR_NULL;
  if (bytes < bytes_of(gemv_floats(m, n, k, lora->r))) return PK_ERR_SCRATCH;
  const FewRows few{*w, *lora, x, dtype, m, of.bias, of.bias_dtype, of.y, of.xa, aligned(scratch)};
  current->gemv(few, threads);
  return PK_OK;
}

int pk_qlora_linear_fwd_cpu(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                            const void* bias, int bias_dtype, void* y, float* xa, int gemv, void* scratch,
                            int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  const ForwardOperands of{bias, bias_dtype, y, xa, gemv != 0};
  return lora_forward(w, lora, of, x, dtype, m, w->n, w->k, scratch, bytes, threads);
}

int pk_lora_fwd_cpu(const pk_lora* lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                    const void* bias, int bias_dtype, void* y, float* xa, void* scratch, int64_t bytes,
                    int threads) {
  const ForwardOperands of{bias, bias_dtype, y, xa, false};
  return lora_forward(nullptr, lora, of, x, dtype, m, n, k, scratch, bytes, threads);
}

static int lora_backward(const pk_weight* w, const pk_lora* lora, const pk_lora_grad& of, const void* x,
                         int dtype, int64_t m, int64_t n, int64_t k, void* scratch, int64_t bytes,
                         int threads) {
  if (int bad = check_lora(lora)) return bad;
  if ((of.d_lora_a || of.d_lora_b) && !lora->r) return PK_ERR_NULL;
  if (lora->r && (of.dx || of.d_lora_a) && !of.dyb) return PK_ERR_NULL;
  if (m < 1 || n < 1 || k < 1) return PK_ERR_SHAPE;
  Single one(w, *lora, m, n, k);
  one.member.dy = of.dy, one.member.d_bias = of.d_bias;
  one.adapter.xa = const_cast<float*>(of.xa), one.adapter.dyb = of.dyb;
  one.adapter.d_lora_a = of.d_lora_a, one.adapter.d_lora_b = of.d_lora_b;
  return group_backward(one.group(), x, dtype, m, of.dx, scratch, bytes, threads_or_default(threads), true);
}

int pk_qlora_linear_bwd_cpu(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x, int dtype,
                            int64_t m, const float* xa, float* dyb, void* dx, void* d_a, void* d_b,
                            float* d_bias, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_weight(w)) return bad;
  const pk_lora_grad of{dy, xa, dyb, dx, d_a, d_b, d_bias};
  return lora_backward(w, lora, of, x, dtype, m, w->n, w->k, scratch, bytes, threads);
}

int pk_lora_bwd_cpu(const pk_lora* lora, const pk_lora_grad* grad, const void* x, int dtype, int64_t m,
                    int64_t n, int64_t k, void* scratch, int64_t bytes, int threads) {
  if (!grad) return PK_ERR_NULL;
  return lora_backward(nullptr, lora, *grad, x, dtype, m, n, k, scratch, bytes, threads);
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

// residual and s: of a norm of a sum (`sum`), else null.
static int norm_forward(const pk_rms_norm* norm, bool sum, const void* residual, void* s, void* y,
                        float* rstd, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return PK_OK;
  if (!norm->x || !norm->weight || !y || !rstd || !scratch) return PK_ERR_NULL;
  if (sum && (!residual || !s)) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, 0)) return PK_ERR_SCRATCH;
  current->rms_norm(*norm, residual, s, y, rstd, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}
int pk_rms_norm_fwd_cpu(const pk_rms_norm* norm, void* y, float* rstd, void* scratch, int64_t bytes,
                        int threads) {
  return norm_forward(norm, false, nullptr, nullptr, y, rstd, scratch, bytes, threads);
}
int pk_add_rms_norm_fwd_cpu(const pk_rms_norm* norm, const void* residual, void* s, void* y, float* rstd,
                            void* scratch, int64_t bytes, int threads) {
  return norm_forward(norm, true, residual, s, y, rstd, scratch, bytes, threads);
}

// ds: of a norm of a sum, whose dx is not optional.
static int norm_backward(const pk_rms_norm* norm, bool sum, const void* dy, const void* ds, const float* rstd,
                         void* dx, float* d_weight, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return d_weight ? PK_ERR_SHAPE : PK_OK;
  if (!norm->x || !norm->weight || !dy || !rstd || !scratch) return PK_ERR_NULL;
  if (sum && (!ds || !dx)) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, d_weight != nullptr)) return PK_ERR_SCRATCH;
  current->rms_norm_grad(*norm, dy, ds, rstd, dx, d_weight, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}
int pk_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const float* rstd, void* dx, float* d_weight,
                        void* scratch, int64_t bytes, int threads) {
  return norm_backward(norm, false, dy, nullptr, rstd, dx, d_weight, scratch, bytes, threads);
}
int pk_add_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const void* ds, const float* rstd,
                            void* d_sum, float* d_weight, void* scratch, int64_t bytes, int threads) {
  return norm_backward(norm, true, dy, ds, rstd, d_sum, d_weight, scratch, bytes, threads);
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
  const Rope of{{*q, *k}, dtype, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse != 0};
  current->rope(of, threads_or_default(threads));
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
  const CrossEntropy of{
      logits,  dtype,           m,      n,    width < n ? width : n, bias, labels, row_scale,
      softcap, label_smoothing, z_loss, loss, gradient != 0};
  current->cross_entropy(of, threads_or_default(threads));
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

int pk_dora_norm_cpu(const float* cross, const float* gram, const void* lora_b, int dtype, int64_t n,
                     int64_t r, float scaling, const float* squares, const float* magnitude, float* norm,
                     float* scale, int threads) {
  if (r < 1 || bad_rank(r) || !matrix(n, r)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (n == 0) return PK_OK;
  if (!cross || !gram || !lora_b || !squares || !magnitude || !norm || !scale) return PK_ERR_NULL;
  const DoraNorm of{cross, gram, lora_b, dtype, n, r, scaling, squares, magnitude, norm, scale};
  current->dora_norm(of, threads_or_default(threads));
  return PK_OK;
}
int pk_row_squares_cpu(const pk_weight* w, float* squares, int threads) {
  if (int bad = check_row_squares(w, squares)) return bad;
  current->row_squares(*w, squares, threads_or_default(threads));
  return PK_OK;
}

int pk_attention_served(void) { return current->attention != nullptr; }
int64_t pk_attention_scratch_bytes(const pk_attention* a, int backward, int threads) {
  if (check_attention(a) != PK_OK) return 0;
  return bytes_of(attention_plan(*a, backward != 0, threads_or_default(threads)).total);
}
static int attention_status(const pk_attention* a, bool backward, const void* scratch, int64_t bytes,
                            int threads) {
  if (!current->attention) return PK_ERR_ISA;
  if (int bad = check_attention(a)) return bad;
  if (!scratch) return PK_ERR_NULL;
  return bytes < pk_attention_scratch_bytes(a, backward, threads) ? PK_ERR_SCRATCH : PK_OK;
}
int pk_attention_fwd_cpu(const pk_attention* a, const pk_heads* y, float* lse, void* scratch, int64_t bytes,
                         int threads) {
  if (int bad = attention_status(a, false, scratch, bytes, threads)) return bad;
  if (!y || !heads_lie(*y, a->batch, a->heads, a->seq)) return y ? PK_ERR_SHAPE : PK_ERR_NULL;
  if (a->batch == 0 || a->seq == 0) return PK_OK;
  if (!y->data || !lse) return PK_ERR_NULL;
  current->attention(*a, *y, lse, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}
int pk_attention_bwd_cpu(const pk_attention* a, const pk_attention_grad* grad, const float* lse,
                         void* scratch, int64_t bytes, int threads) {
  if (int bad = attention_status(a, true, scratch, bytes, threads)) return bad;
  if (!grad) return PK_ERR_NULL;
  for (const pk_heads* x : {&grad->y, &grad->dy, &grad->dq}) {
    if (!heads_lie(*x, a->batch, a->heads, a->seq)) return PK_ERR_SHAPE;
    if (a->batch && a->seq && !x->data) return PK_ERR_NULL;
  }
  for (const pk_heads* x : {&grad->dk, &grad->dv}) {
    if (!heads_lie(*x, a->batch, a->kv_heads, a->keys)) return PK_ERR_SHAPE;
    if (a->batch && a->keys && !x->data) return PK_ERR_NULL;
  }
  if (a->batch && a->seq && !lse) return PK_ERR_NULL;
  if (a->batch) current->attention_grad(*a, *grad, lse, aligned(scratch), threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
