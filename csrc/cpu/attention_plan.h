// Scratch of attention in bf16 tiles: what of q, k, v and dy is packed, for how many heads of keys at a time.
#pragma once
#include "tile_plan.h"

namespace pk {

// Blocks of 32 keys (forward and dq) or of 32 queries (dk and dv) whose scores a task holds.
constexpr int64_t ATTENTION_BLOCKS = 16;
constexpr int64_t ATTENTION_FLOATS = 4 << 20;  // packed heads of one round, unless a single one has more
constexpr int64_t MOST_HEAD_DIM = 256;

struct AttentionPlan {
  int64_t query_blocks, key_blocks, dim_blocks, group;  // group: heads of q to a head of keys
  int64_t query_size, key_size;                         // a packed form of one head, in floats
  int64_t heads, key_forms, query_forms;                // heads of keys of a round; forms of each packed head
  int64_t head_size, rows_at;                           // of a head of keys with its heads of q; see rows()
  int64_t kept_at, kept_size;                           // gradients of a head of q's scores; 0: not kept
  int64_t mask_at, own_at, own_size, total;
};

static inline AttentionPlan attention_plan(const pk_attention& a, bool backward, int threads) {
  AttentionPlan p{};
  p.query_blocks = panels_of(a.seq), p.key_blocks = panels_of(a.keys), p.dim_blocks = panels_of(a.dim);
  p.group = a.heads / a.kv_heads;
  p.query_size = p.query_blocks * p.dim_blocks * STEP / 2,
  p.key_size = p.key_blocks * p.dim_blocks * STEP / 2;
  p.key_forms = backward ? 3 : 2, p.query_forms = backward ? 4 : 0;
  // Of each query backward: its log-sum-exp, and the sum of dy y.
  p.rows_at = p.key_forms * p.key_size + p.group * p.query_forms * p.query_size;
  p.kept_at = p.rows_at + (backward ? p.group * 2 * p.query_blocks * SIDE : 0);
  // Those that dk needs are dq's too: kept where a round holds them, else made again.
  p.kept_size = backward ? p.query_blocks * p.key_blocks * STEP / 2 : 0;
  if (p.kept_at + p.group * p.kept_size > ATTENTION_FLOATS) p.kept_size = 0;
  p.head_size = p.kept_at + p.group * p.kept_size;
  p.heads = smaller(a.batch * a.kv_heads, largest(1, ATTENTION_FLOATS / largest(1, p.head_size)));
  p.mask_at = p.heads * p.head_size;
  const int64_t words = a.mask ? (a.mask_batch ? a.batch : 1) * a.seq * p.key_blocks : 0;
  p.own_at = p.mask_at + round_up(words, ALIGN);
  // Two operands of a block of rows, scores, their bf16 forms, and sums of 32 rows of two results.
  p.own_size = 2 * p.dim_blocks * STEP / 2 + ATTENTION_BLOCKS * STEP * 2 + 2 * p.dim_blocks * STEP;
  p.total = p.own_at + p.own_size * threads;
  return p;
}

}  // namespace pk
