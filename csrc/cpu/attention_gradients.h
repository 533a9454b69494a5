// Gradients of attention in bf16 tiles: probabilities again from the log-sum-exp of each row; dk and dv by
// blocks of keys, then dq by blocks of queries, so that each is summed by one task. The gradients of scores
// that dk needs are turned and kept for dq, or, where they are too many, made again.
#pragma once
#include "attention_impl.h"

namespace PK_NS {

// Forms of a head of keys: columns of k, pairs of k, columns of v. Of a head of q: columns and pairs of q, of
// dy.
enum { K_COLUMNS, K_PAIRS, V_COLUMNS };
enum { Q_COLUMNS, Q_PAIRS, DY_COLUMNS, DY_PAIRS };

static void pack_query_block(const AttentionCall& c, int64_t head, int64_t g, int64_t block,
                             const pk_heads& y, const pk_heads& dy, const float* lse) {
  const pk_attention& a = c.a;
  const int64_t batch = c.batch(head), q_head = c.key_head(head) * c.plan.group + g, row = block * SIDE;
  const int64_t rows = smaller(SIDE, a.seq - row), dims = c.plan.dim_blocks, blocks = c.plan.query_blocks;
  const bf16 *q = c.row_of(a.q, batch, q_head, row), *grad = c.row_of(dy, batch, q_head, row);
  pack_heads_columns(q, a.q.row, rows, a.dim, c.queries(head, g, Q_COLUMNS) + block * dims * STEP);
  pack_heads_pairs(q, a.q.row, rows, a.dim, blocks, c.queries(head, g, Q_PAIRS) + block * STEP);
  pack_heads_columns(grad, dy.row, rows, a.dim, c.queries(head, g, DY_COLUMNS) + block * dims * STEP);
  pack_heads_pairs(grad, dy.row, rows, a.dim, blocks, c.queries(head, g, DY_PAIRS) + block * STEP);
  float *off = c.rows(head, g) + row, *delta = off + blocks * SIDE;
  for (int64_t i = 0; i < SIDE; i++) {
    off[i] = INFINITY, delta[i] = 0.0f;
    if (i >= rows) continue;
    const bf16 *out = c.row_of(y, batch, q_head, row + i), *in = grad + i * dy.row;
    vf total = {};
    for (int64_t j = 0; j < a.dim; j += VW)
      total = fma(load_some(out + j, a.dim - j), load_some(in + j, a.dim - j), total);
    off[i] = lse[(batch * a.heads + q_head) * a.seq + row + i] * LOG2_E, delta[i] = ::PK_NS::sum(total);
  }
}

// Scores and the gradients of probabilities, blocks of 32 x 32 -> probabilities and gradients of scores as
// rows of A. off, delta: of the rows (BY_ROWS), else of the columns. words: of queries.
template <bool BY_ROWS>
static void score_gradients(float* scores, float* grads, float scale, const float* off, const float* delta,
                            Seen seen, const uint32_t* words, bf16* probabilities, bf16* out) {
  const vf2 factor = constant<vf2>(scale), zero = {vf{}, vf{}};
  const __m512i low = load_words(words), high = load_words(words + 16);
  vf2 less = zero, minus = zero;
  if (!BY_ROWS) less = {load(off), load(off + 16)}, minus = {load(delta), load(delta + 16)};
  for (int64_t i = 0; i < SIDE; i++) {
    if (BY_ROWS) less = constant<vf2>(off[i]), minus = constant<vf2>(delta[i]);
    vf2 p = probability(both_halves(row_of_block(scores, i)), factor, less);
    if (seen == Seen::SOME) {
      const __m512i bit = _mm512_set1_epi32((int)(1u << i));
      const uint16_t first = BY_ROWS ? (uint16_t)words[i] : _mm512_test_epi32_mask(low, bit);
      const uint16_t second = BY_ROWS ? (uint16_t)(words[i] >> 16) : _mm512_test_epi32_mask(high, bit);
      p = {where(first, p.a, vf{}), where(second, p.b, vf{})};
    }
    const vf2 d = p * (both_halves(row_of_block(grads, i)) - minus);
    if (probabilities) store_words(probabilities + i * SIDE, round_both(p.a, p.b));
    store_words(out + i * SIDE, round_both(d.a, d.b));
  }
}

// A block [32][32] of rows of A -> its columns as rows of A.
static void turn_block(const bf16* block, bf16* out) {
  alignas(64) bf16 low[HALF], high[HALF];
  for (int64_t i = 0; i < SIDE; i += 2)
    interleave(load_words(block + i * SIDE), load_words(block + (i + 1) * SIDE), low + i * VW, high + i * VW);
  transpose_pairs(low, SIDE, out);
  transpose_pairs(high, SIDE, out + HALF);
}

// 32 rows of dq from the gradients of scores that were kept.
static void query_gradient_of_kept(const AttentionCall& c, int64_t head, int64_t g, int64_t block,
                                   const pk_heads& dq) {
  const pk_attention& a = c.a;
  const int64_t dims = c.plan.dim_blocks, batch = c.batch(head), q_head = c.key_head(head) * c.plan.group + g;
  const int64_t row = block * SIDE, blocks = c.plan.key_blocks;
  const AttentionOwn own(c.own(), dims);
  clear(own.sums, dims * STEP);
  uint32_t words[SIDE];
  int64_t places[pk::ATTENTION_BLOCKS], count = 0;
  for (int64_t b = 0; b < blocks; b++) {
    if (seen_words(c, batch, block, b, words) != Seen::NONE) places[count++] = b;
    if (count == pk::ATTENTION_BLOCKS || (count && b + 1 == blocks)) {
      add_products<true>(c.kept(head, g, block), c.keys(head, K_PAIRS), blocks, dims, count, places,
                         own.sums);
      count = 0;
    }
  }
  float factors[SIDE];
  for (float& factor : factors) factor = a.scale;
  store_heads(own.sums, factors, smaller(SIDE, a.seq - row), a.dim, (bf16*)c.row_of(dq, batch, q_head, row),
              dq.row);
}

// 32 rows of dq.
static void query_gradient(const AttentionCall& c, int64_t head, int64_t g, int64_t block, const pk_heads& dy,
                           const pk_heads& dq) {
  const pk_attention& a = c.a;
  const int64_t dims = c.plan.dim_blocks, batch = c.batch(head), q_head = c.key_head(head) * c.plan.group + g;
  const int64_t row = block * SIDE, rows = smaller(SIDE, a.seq - row);
  const AttentionOwn own(c.own(), dims);
  pack_tiles(c.row_of(a.q, batch, q_head, row), a.q.row, rows, a.dim, own.first);
  pack_tiles(c.row_of(dy, batch, q_head, row), dy.row, rows, a.dim, own.second);
  clear(own.sums, dims * STEP);
  const float *off = c.rows(head, g) + row, *delta = off + c.plan.query_blocks * SIDE;
  alignas(64) uint32_t words[SIDE] = {};
  int64_t places[pk::ATTENTION_BLOCKS], count = 0;
  for (int64_t b = 0; b < c.plan.key_blocks; b++) {
    const Seen seen = seen_words(c, batch, block, b, words);
    if (seen != Seen::NONE) {
      const Segment score = {own.first, c.keys(head, K_COLUMNS) + b * dims * STEP, dims};
      const Segment grad = {own.second, c.keys(head, V_COLUMNS) + b * dims * STEP, dims};
      tile_product(&score, 1, own.scores, false);
      tile_product(&grad, 1, own.scores + STEP, false);
      score_gradients<true>(own.scores, own.scores + STEP, a.scale * LOG2_E, off, delta, seen, words, nullptr,
                            own.left + count * STEP);
      places[count++] = b;
    }
    if (count == pk::ATTENTION_BLOCKS || (count && b + 1 == c.plan.key_blocks)) {
      add_products(own.left, c.keys(head, K_PAIRS), c.plan.key_blocks, dims, count, places, own.sums);
      count = 0;
    }
  }
  float factors[SIDE];
  for (float& factor : factors) factor = a.scale;
  store_heads(own.sums, factors, rows, a.dim, (bf16*)c.row_of(dq, batch, q_head, row), dq.row);
}

// 32 rows of dk and dv: the keys of a block, over all queries of all heads that see them.
static void key_gradients(const AttentionCall& c, int64_t head, int64_t block, const pk_heads& dk,
                          const pk_heads& dv) {
  const pk_attention& a = c.a;
  const int64_t dims = c.plan.dim_blocks, batch = c.batch(head), kv_head = c.key_head(head);
  const int64_t row = block * SIDE, rows = smaller(SIDE, a.keys - row), blocks = c.plan.query_blocks;
  const AttentionOwn own(c.own(), dims);
  pack_tiles(c.row_of(a.k, batch, kv_head, row), a.k.row, rows, a.dim, own.first);
  pack_tiles(c.row_of(a.v, batch, kv_head, row), a.v.row, rows, a.dim, own.second);
  clear(own.sums, 2 * dims * STEP);
  alignas(64) uint32_t words[SIDE] = {};
  for (int64_t g = 0; g < c.plan.group; g++) {
    const float *off = c.rows(head, g), *delta = off + blocks * SIDE;
    int64_t places[pk::ATTENTION_BLOCKS], count = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const Seen seen = seen_words(c, batch, b, block, words);
      if (seen != Seen::NONE) {
        const Segment score = {own.first, c.queries(head, g, Q_COLUMNS) + b * dims * STEP, dims};
        const Segment grad = {own.second, c.queries(head, g, DY_COLUMNS) + b * dims * STEP, dims};
        tile_product(&score, 1, own.scores, false);
        tile_product(&grad, 1, own.scores + STEP, false);
        score_gradients<false>(own.scores, own.scores + STEP, a.scale * LOG2_E, off + b * SIDE,
                               delta + b * SIDE, seen, words, own.left + count * STEP,
                               own.right + count * STEP);
        if (c.plan.kept_size) turn_block(own.right + count * STEP, c.kept(head, g, b) + block * STEP);
        places[count++] = b;
      }
      if (count == pk::ATTENTION_BLOCKS || (count && b + 1 == blocks)) {
        add_products(own.left, c.queries(head, g, DY_PAIRS), blocks, dims, count, places, own.more);
        add_products(own.right, c.queries(head, g, Q_PAIRS), blocks, dims, count, places, own.sums);
        count = 0;
      }
    }
  }
  float factors[SIDE], ones[SIDE];
  for (int64_t i = 0; i < SIDE; i++) factors[i] = a.scale, ones[i] = 1.0f;
  store_heads(own.sums, factors, rows, a.dim, (bf16*)c.row_of(dk, batch, kv_head, row), dk.row);
  store_heads(own.more, ones, rows, a.dim, (bf16*)c.row_of(dv, batch, kv_head, row), dv.row);
}

static void attention_grad(const pk::AttentionGrad& call, int threads) {
  const pk_attention& a = call.a;
  const pk_attention_grad& of = call.grad;
  const pk::AttentionPlan plan = pk::attention_plan(a, true, threads);
  attention_rounds(
      a, plan, call.scratch,
      [&](const AttentionRound& round) {
        const AttentionCall& c = round.c;
        const int64_t dims = plan.dim_blocks, blocks = plan.key_blocks, queries = plan.query_blocks;
        round.run(blocks, [&](int64_t head, int64_t b) {
          const int64_t rows = smaller(SIDE, a.keys - b * SIDE);
          const bf16* k = c.row_of(a.k, c.batch(head), c.key_head(head), b * SIDE);
          const bf16* v = c.row_of(a.v, c.batch(head), c.key_head(head), b * SIDE);
          pack_heads_pairs(k, a.k.row, rows, a.dim, blocks, c.keys(head, K_PAIRS) + b * STEP);
          if (plan.kept_size) return;
          pack_heads_columns(k, a.k.row, rows, a.dim, c.keys(head, K_COLUMNS) + b * dims * STEP);
          pack_heads_columns(v, a.v.row, rows, a.dim, c.keys(head, V_COLUMNS) + b * dims * STEP);
        });
        round.run(queries * plan.group, [&](int64_t head, int64_t i) {
          pack_query_block(c, head, i / queries, i % queries, of.y, of.dy, call.lse);
        });
        // The longest first: with a causal mask the first keys are seen most, the last queries see most.
        round.run(blocks, [&](int64_t head, int64_t b) { key_gradients(c, head, b, of.dk, of.dv); });
        round.run(queries * plan.group, [&](int64_t head, int64_t i) {
          const int64_t g = i % plan.group, block = queries - 1 - i / plan.group;
          if (plan.kept_size) query_gradient_of_kept(c, head, g, block, of.dq);
          else query_gradient(c, head, g, block, of.dy, of.dq);
        });
      },
      threads);
}

}  // namespace PK_NS
