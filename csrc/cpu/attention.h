// Attention of bf16 heads: the C functions. attention_impl.h has the kernel, attention_gradients.h its
// backward pass.
#pragma once
#include "attention_plan.h"
#include "ops.h"

namespace pk {

struct Attention {
  const pk_attention& a;
  const pk_heads& y;
  float *lse, *scratch;  // lse: [batch, heads, seq], log-sum-exp of each row of scores
};

struct AttentionGrad {
  const pk_attention& a;
  const pk_attention_grad& grad;
  const float* lse;
  float* scratch;
};

}  // namespace pk

#if defined(PK_NS) && defined(PK_AVX512BF16)
#include "attention_gradients.h"
#elif defined(PK_NS)  // no bf16 products on this level
namespace PK_NS {
static constexpr void (*attention)(const pk::Attention&, int) = nullptr;
static constexpr void (*attention_grad)(const pk::AttentionGrad&, int) = nullptr;
}  // namespace PK_NS
#else
#include <initializer_list>

#include "entry.h"

namespace pk {

static inline bool heads_lie(const pk_heads& x, int64_t batch, int64_t heads, int64_t rows) {
  return reaches(batch, x.batch) && reaches(heads, x.head) && reaches(rows, x.row);
}

static inline int check_attention(const pk_attention* a) {
  if (!a) return PK_ERR_NULL;
  if (a->dim < 1 || a->dim > MOST_HEAD_DIM || a->kv_heads < 1 || a->heads < 1 || a->heads % a->kv_heads)
    return PK_ERR_SHAPE;
  if (!matrix(a->batch, a->heads) || !matrix(a->batch * a->heads, a->dim) || !matrix(a->seq, a->keys) ||
      !matrix(a->batch * a->heads * a->dim, largest(a->seq, a->keys)) || (a->causal && a->seq != a->keys) ||
      !(a->scale > 0.0f))
    return PK_ERR_SHAPE;
  if (!heads_lie(a->q, a->batch, a->heads, a->seq) || !heads_lie(a->k, a->batch, a->kv_heads, a->keys) ||
      !heads_lie(a->v, a->batch, a->kv_heads, a->keys))
    return PK_ERR_SHAPE;
  if (a->mask && (!matrix(a->batch, a->seq) || !matrix(a->batch * a->seq, a->keys) ||
                  !reaches(a->batch, a->mask_batch) || !reaches(a->seq, a->mask_row)))
    return PK_ERR_SHAPE;
  const bool queries = a->batch && a->seq, keys = a->batch && a->keys;
  return (queries && !a->q.data) || (keys && (!a->k.data || !a->v.data)) ? PK_ERR_NULL : PK_OK;
}

}  // namespace pk

extern "C" {

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
  current->attention({*a, *y, lse, aligned(scratch)}, threads_or_default(threads));
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
  if (a->batch) current->attention_grad({*a, *grad, lse, aligned(scratch)}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
