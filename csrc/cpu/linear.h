// The linears: the C functions of one and of a group, of the low-rank part alone, of decoding and of
// dropout's mask. A linear is a group of one. The kernels: table_impl.h and what it includes.
#pragma once
#include "group.h"
#include "ops.h"

namespace pk {

// Rows and columns of a 4-bit weight, decoded to out [rows, cols] of `dtype`.
struct Window {
  const pk_weight& w;
  int64_t row, rows, col, cols;
  void* out;
  int dtype;
};

// y = x W^T + scaling * (x A^T) B^T + bias for few rows.
struct FewRows {
  const pk_weight& w;
  const pk_lora& lora;
  const void* x;  // [m, k] of `dtype`
  int dtype;
  int64_t m;
  const void* bias;  // [n] of `bias_dtype`, or null
  int bias_dtype;
  void* y;    // [m, n] of `dtype`
  float* xa;  // [m, r]
  float* scratch;
};

struct Forward {
  const Group& group;
  const void* x;  // [m, k] of `dtype`
  int dtype;
  int64_t m;
  float* scratch;
};

struct Backward {
  const Group& group;
  const void* x;  // [m, k] of `dtype`, or null
  int dtype;
  int64_t m;
  void* dx;  // [m, k] of `dtype`, or null
  float* scratch;
};

struct DropoutMask {
  int64_t m, k;
  uint32_t threshold;
  uint64_t seed;
  float* mask;  // [m, k]
};

}  // namespace pk

#if !defined(PK_NS)  // compiled once, in dispatch.cpp
#include "entry.h"

static int group_forward(const Group& g, const void* x, int dtype, int64_t m, void* scratch, int64_t bytes,
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
  current->forward({g, x, dtype, m, aligned(scratch)}, threads);
  return PK_OK;
}

static int group_backward(const Group& g, const void* x, int dtype, int64_t m, void* dx, void* scratch,
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
  current->backward({g, x, dtype, m, dx, aligned(scratch)}, threads);
  return PK_OK;
}

extern "C" {

int pk_dequantize_4bit_cpu(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                           void* out, int dtype, int threads) {
  if (int bad = check_window(w, row, rows, col, cols, out, cols, dtype)) return bad;
  if (rows == 0 || cols == 0) return PK_OK;
  current->dequantize({*w, row, rows, col, cols, out, dtype}, threads_or_default(threads));
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
  current->dropout_mask({m, k, threshold, seed, mask}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
