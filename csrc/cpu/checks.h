// What a call of the CPU's functions is refused for, besides ../checks.h; what one op alone is
// refused for stands with it.
#pragma once
#include "../checks.h"
#include "../philox.h"
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

}  // namespace pk
