// What a call of the CPU's functions is refused for, besides ../checks.h.
#pragma once
#include "../checks.h"
#include "../philox.h"
#include "attention_plan.h"
#include "group.h"

namespace pk {

constexpr int64_t MOST_RANKS = 1 << 20;  // of a group's adapters together

// Whether rows of `cols` elements, ld apart, lie one behind the other; a single row may have any ld.
static inline bool rows_apart(int64_t rows, int64_t cols, int64_t ld) {
  return rows <= 1 || (ld >= cols && matrix(rows, ld));
}

// Whether `count` steps of a stride of any sign stay within what can exist.
static inline bool reaches(int64_t count, int64_t stride) {
  return count <= 1 || (stride >= -MOST_ELEMENTS && matrix(count, stride < 0 ? -stride : stride));
}

static inline int check_row_squares(const pk_weight* w, const float* squares) {
  if (int bad = check_weight(w)) return bad;
  return w->n && !squares ? PK_ERR_NULL : PK_OK;
}

static inline int check_lora(const pk_lora* l) {
  if (!l) return PK_ERR_NULL;
  if (l->r == 0) return PK_OK;
  if (bad_rank(l->r) || l->dropout_threshold > EVERY_DRAW) return PK_ERR_SHAPE;
  if (!l->lora_a || !l->lora_b) return PK_ERR_NULL;
  return bad_dtype(l->dtype) ? PK_ERR_DTYPE : PK_OK;
}

static inline int check_member(const Group& g, const pk_member& member) {
  if (member.weight.k != g.k() || (member.weight.data != nullptr) != g.base() ||
      !matrix(member.weight.n, g.k()))
    return PK_ERR_SHAPE;
  if (g.base())
    if (int bad = check_weight(&member.weight)) return bad;
  if (member.bias && bad_dtype(member.bias_dtype)) return PK_ERR_DTYPE;
  if (member.scale && !g.base()) return PK_ERR_NULL;
  return member.norm && (!member.scale || !member.squares || !member.magnitude) ? PK_ERR_NULL : PK_OK;
}

// The adapters; a norm is that of one adapter, whose r is not 0.
static inline int check_adapters(const Group& g, int64_t m, int64_t n) {
  int64_t normed = 0, ranks = 0, dropped = 0;
  for (int64_t i = 0; i < g.count; i++) normed += g.members[i].norm != nullptr;
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const pk_adapter& a = g.adapters[i];
    if (int bad = check_lora(&a.lora)) return bad;
    if (a.member < 0 || a.member >= g.count || a.row_begin < 0 || a.row_end < a.row_begin || a.row_end > m)
      return PK_ERR_SHAPE;
    ranks += a.lora.r, dropped += Group::masked_rows(a);
    if (ranks > MOST_RANKS || !matrix(ranks, g.k()) || !matrix(ranks, n) || !matrix(ranks, m) ||
        !matrix(dropped, g.k()))
      return PK_ERR_SHAPE;
    if (!g.members[a.member].norm) continue;
    if (a.lora.r == 0) return PK_ERR_SHAPE;
    for (int64_t j = 0; j < i; j++)
      if (g.adapters[j].member == a.member) return PK_ERR_SHAPE;
    normed--;
  }
  return normed ? PK_ERR_SHAPE : PK_OK;
}

static inline int check_group(const Group& g, int64_t m) {
  if (!g.members || (g.adapter_count && !g.adapters)) return PK_ERR_NULL;
  if (g.count < 1 || g.adapter_count < 0 || m < 0 || g.k() < 1 || !matrix(m, g.k())) return PK_ERR_SHAPE;
  int64_t n = 0;
  for (int64_t i = 0; i < g.count; i++) {
    if (int bad = check_member(g, g.members[i])) return bad;
    n += g.members[i].weight.n;
    if (!matrix(n, g.k()) || !matrix(m, n)) return PK_ERR_SHAPE;
  }
  return check_adapters(g, m, n);
}

static inline int check_glu(const pk_glu* a, const pk_glu_grad* d, int dtype, int64_t m, int64_t n,
                            int activation) {
  if (!a) return PK_ERR_NULL;
  if (!matrix(m, n) || activation < PK_SILU || activation > PK_GELU_TANH) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m == 0 || n == 0) return PK_OK;
  if (!a->gate || !a->up || (d && (!d->d_gate || !d->d_up))) return PK_ERR_NULL;
  const bool apart = rows_apart(m, n, a->ld_gate) && rows_apart(m, n, a->ld_up);
  return apart && (!d || (rows_apart(m, n, d->ld_d_gate) && rows_apart(m, n, d->ld_d_up))) ? PK_OK
                                                                                           : PK_ERR_SHAPE;
}

static inline int check_norm(const pk_rms_norm* a) {
  if (!a) return PK_ERR_NULL;
  if (a->n < 1 || !matrix(a->m, a->n) || !rows_apart(a->m, a->n, a->ld_x)) return PK_ERR_SHAPE;
  if (a->cast != PK_CAST_LLAMA && a->cast != PK_CAST_GEMMA) return PK_ERR_SHAPE;
  if (bad_dtype(a->dtype) || bad_dtype(a->weight_dtype) || (a->y_dtype != a->dtype && a->y_dtype != PK_F32))
    return PK_ERR_DTYPE;
  return PK_OK;
}

// Of one of rope's operands, in a batch of `seq` tokens with heads of `dim`.
static inline int check_heads(const pk_rope_heads& h, int64_t batch, int64_t seq, int64_t dim) {
  if (!matrix(batch, seq) || !matrix(batch * seq, dim) || !matrix(h.heads, dim) ||
      !matrix(batch * seq, h.heads * dim))
    return PK_ERR_SHAPE;
  const bool x = reaches(batch, h.x_batch) && reaches(h.heads, h.x_head) && reaches(seq, h.x_seq);
  return x && reaches(batch, h.y_batch) && reaches(h.heads, h.y_head) && reaches(seq, h.y_seq) ? PK_OK
                                                                                               : PK_ERR_SHAPE;
}

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

static inline int check_scale(const void* u, int dtype, int64_t m, int64_t n, const float* scale) {
  if (!matrix(m, n)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  return m && n && (!u || !scale) ? PK_ERR_NULL : PK_OK;
}

}  // namespace pk
