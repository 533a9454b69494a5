// Attention of bf16 heads in tiles, without its matrix of scores: softmax of 32 rows at a time over blocks of
// keys; attention_gradients.h has the backward pass. Every result is summed by one task in one order. Scores
// and sums are fp32; the probabilities and the gradients of scores are rounded to bf16 for their products.
// docs/cpu-engine.md has the order of passes. Source: Dao, FlashAttention-2, 2023, section 3.
#pragma once
#include <math.h>

#include "attention.h"
#include "math_impl.h"
#include "qlora_impl.h"
#include "teams.h"
#include "tile_gradients.h"

namespace PK_NS {

constexpr float LOG2_E = 1.44269504f;

// What one call has, with its scratch as pk::AttentionPlan lays it out.
struct AttentionCall {
  const pk_attention& a;
  const pk::AttentionPlan& plan;
  float* base;
  int64_t first;  // the round's first head of keys
  float* of_head(int64_t head) const { return base + head * plan.head_size; }
  bf16* keys(int64_t head, int64_t form) const { return (bf16*)(of_head(head) + form * plan.key_size); }
  bf16* queries(int64_t head, int64_t g, int64_t form) const {
    const int64_t at = plan.key_forms * plan.key_size + (g * plan.query_forms + form) * plan.query_size;
    return (bf16*)(of_head(head) + at);
  }
  // Log-sum-exp of every query, then the sums of dy y.
  float* rows(int64_t head, int64_t g) const {
    return of_head(head) + plan.rows_at + g * 2 * plan.query_blocks * SIDE;
  }
  // Backward, where they are kept: gradients of the scores of a block of queries, a block of keys after the
  // other, rows of A.
  bf16* kept(int64_t head, int64_t g, int64_t query_block) const {
    const int64_t at = plan.kept_at + g * plan.kept_size;
    return (bf16*)(of_head(head) + at) + query_block * plan.key_blocks * STEP;
  }
  uint32_t* mask() const { return (uint32_t*)(base + plan.mask_at); }
  float* own() const { return base + plan.own_at + thread_id() * plan.own_size; }
  int64_t batch(int64_t head) const { return (first + head) / a.kv_heads; }
  int64_t key_head(int64_t head) const { return (first + head) % a.kv_heads; }
  const bf16* row_of(const pk_heads& x, int64_t batch, int64_t head, int64_t row) const {
    return (const bf16*)x.data + batch * x.batch + head * x.head + row * x.row;
  }
};

// A thread's own scratch.
struct AttentionOwn {
  bf16 *first, *second;  // operands of 32 rows
  float* scores;
  bf16 *left, *right;  // what stands in A: probabilities, gradients of scores
  float *sums, *more;  // of 32 rows
  AttentionOwn(float* at, int64_t dim_blocks) {
    first = (bf16*)at, second = first + dim_blocks * STEP;
    scores = at + dim_blocks * STEP;
    left = (bf16*)(scores + pk::ATTENTION_BLOCKS * STEP), right = left + pk::ATTENTION_BLOCKS * STEP;
    sums = scores + 2 * pk::ATTENTION_BLOCKS * STEP, more = sums + dim_blocks * STEP;
  }
};

// ---- operands

// 32 rows [rows <= 32][dim] as columns of B: [dim / 32] steps.
static void pack_heads_columns(const bf16* src, int64_t ld, int64_t rows, int64_t dim, bf16* out) {
  alignas(64) bf16 line[SIDE * SIDE];
  for (int64_t j = 0; j < dim; j += SIDE, out += STEP) {
    const bf16* from = src + j;
    int64_t apart = ld;
    if (rows < SIDE || dim - j < SIDE) {
      pack_tiles(src + j, ld, rows, smaller(SIDE, dim - j), line);
      from = line, apart = SIDE;
    }
    transpose_pairs(from, apart, out);
    transpose_pairs(from + 16 * apart, apart, out + HALF);
  }
}

// 32 rows as pairs of a contraction: a step for each 32 of dim, `blocks` steps apart.
static void pack_heads_pairs(const bf16* src, int64_t ld, int64_t rows, int64_t dim, int64_t blocks,
                             bf16* out) {
  for (int64_t j = 0; j < dim; j += SIDE, out += blocks * STEP)
    pack_row_pairs({src + j, ld, 0, nullptr, 0}, 0, rows, smaller(SIDE, dim - j), out);
}

// ---- which scores are seen

// Bytes of a mask as bits, one word for a row and 32 keys.
static void pack_mask(const AttentionCall& c, int64_t row) {
  const int64_t batch = row / c.a.seq, i = row % c.a.seq, blocks = c.plan.key_blocks;
  const uint8_t* from = c.a.mask + batch * c.a.mask_batch + i * c.a.mask_row;
  for (int64_t b = 0; b < blocks; b++) {
    uint32_t word = 0;
    for (int64_t j = 0; j < smaller(SIDE, c.a.keys - b * SIDE); j++)
      word |= (uint32_t)(from[b * SIDE + j] != 0) << j;
    c.mask()[row * blocks + b] = word;
  }
}

enum class Seen { NONE, SOME, ALL };

// The words of 32 queries for a block of 32 keys: bit j of word i is whether query i sees key j.
static inline Seen seen_words(const AttentionCall& c, int64_t batch, int64_t query_block, int64_t key_block,
                              uint32_t* words) {
  const int64_t q0 = query_block * SIDE, k0 = key_block * SIDE, blocks = c.plan.key_blocks;
  if (c.a.causal && k0 > q0 + SIDE - 1) return Seen::NONE;
  const uint32_t there = first_words(c.a.keys - k0);
  const bool whole = there == ~0u && q0 + SIDE <= c.a.seq && (!c.a.causal || k0 + SIDE - 1 <= q0);
  if (whole && !c.a.mask) return Seen::ALL;
  const uint32_t* bits = c.mask() + (c.a.mask_batch ? batch : 0) * c.a.seq * blocks + key_block;
  uint32_t any = 0, every = ~0u;
  for (int64_t i = 0; i < SIDE; i++) {
    uint32_t word = q0 + i < c.a.seq ? there : 0;
    if (c.a.causal) word &= first_words(q0 + i + 1 - k0);
    if (c.a.mask && word) word &= bits[(q0 + i) * blocks];
    words[i] = word, any |= word, every &= word;
  }
  return !any ? Seen::NONE : every == ~0u ? Seen::ALL : Seen::SOME;
}

static inline vf where(uint16_t mask, vf yes, vf no) {
  return (vf)_mm512_mask_mov_ps((__m512)no, mask, (__m512)yes);
}
static inline vf2 both_halves(const float* row) { return {load(row), load(row + 256)}; }

static inline vf2 probability(vf2 scores, vf2 scale, vf2 less) {
  return exp2_coarse(at_least(fma(scores, scale, -less), -152.0f));
}
static inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float largest_of(vf v) {
  v = larger(v, shuffle<other_half<8>>(v, v));
  v = larger(v, shuffle<other_half<4>>(v, v));
  v = larger(v, shuffle<other_half<2>>(v, v));
  return larger(v, shuffle<other_half<1>>(v, v))[0];
}

// ---- forward

// What each row's softmax has been so far: its largest score, and the sum of exp(score - largest).
struct RowsSoftmax {
  float most[SIDE], sum[SIDE];
};

// The largest of a block's scores by rows, lane by lane; what is not seen becomes -inf.
static void largest_scores(float* scores, Seen seen, const uint32_t* words, vf2* tops) {
  const vf none = set1(-INFINITY);
  for (int64_t i = 0; i < SIDE; i++) {
    float* row = row_of_block(scores, i);
    vf2 v = both_halves(row);
    if (seen == Seen::SOME) {
      v = {where((uint16_t)words[i], v.a, none), where((uint16_t)(words[i] >> 16), v.b, none)};
      store(row, v.a), store(row + 256, v.b);
    }
    tops[i] = {larger(tops[i].a, v.a), larger(tops[i].b, v.b)};
  }
}

// Scores of `count` blocks -> probabilities by rows of A, less each row's largest score so far; in_sums
// (may be null), dim_blocks blocks, are brought to it. tops: of these blocks.
static void softmax_blocks(float* scores, int64_t count, const vf2* tops, float scale, RowsSoftmax& state,
                           bf16* left, float* in_sums, int64_t dim_blocks) {
  float less[SIDE], fade[SIDE];
  vf2 sums[SIDE];
  for (int64_t i = 0; i < SIDE; i++) {
    const float here = largest_of(larger(tops[i].a, tops[i].b));
    const float before = state.most[i], most = here > before ? here : before;
    // A row that has seen nothing yet has probabilities of 0 whatever is taken off its scores.
    less[i] = most == -INFINITY ? 0.0f : most * scale;
    fade[i] = before == -INFINITY ? 0.0f : before == most ? 1.0f : exp2f((before - most) * scale);
    state.most[i] = most;
    sums[i] = {vf{}, vf{}};
  }
  for (int64_t b = 0; b < count; b++)
    for (int64_t i = 0; i < SIDE; i++) {
      const vf2 p = probability(both_halves(row_of_block(scores + b * STEP, i)), constant<vf2>(scale),
                                constant<vf2>(less[i]));
      sums[i] = sums[i] + p;
      store_words(left + b * STEP + i * SIDE, round_both(p.a, p.b));
    }
  for (int64_t i = 0; i < SIDE; i++) {
    state.sum[i] = state.sum[i] * fade[i] + ::PK_NS::sum(sums[i].a + sums[i].b);
    if (fade[i] == 1.0f || !in_sums) continue;
    for (int64_t d = 0; d < dim_blocks; d++) {
      float* row = row_of_block(in_sums + d * STEP, i);
      store(row, load(row) * set1(fade[i])), store(row + 256, load(row + 256) * set1(fade[i]));
    }
  }
}

// Sums times each row's factor -> rows [rows <= 32][dim], `ld` apart.
static void store_heads(float* sums, const float* factors, int64_t rows, int64_t dim, bf16* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < dim; j += SIDE) {
      const vf2 v = both_halves(row_of_block(sums + j / SIDE * STEP, i));
      _mm512_mask_storeu_epi16(out + i * ld + j, first_words(dim - j),
                               round_both(v.a * set1(factors[i]), v.b * set1(factors[i])));
    }
}

// Sums += what stands in `left` for the seen blocks, one after the other or, ALL, each at its place, times
// their packed pairs.
template <bool ALL = false>
static void add_products(const bf16* left, const bf16* pairs, int64_t blocks, int64_t dim_blocks,
                         int64_t count, const int64_t* places, float* sums) {
  Segment parts[pk::ATTENTION_BLOCKS];
  for (int64_t d = 0; d < dim_blocks; d++) {
    int64_t used = 0;
    for (int64_t b = 0; b < count; b++) {
      const bf16* at = pairs + (d * blocks + places[b]) * STEP;
      if (used && places[b] == places[b - 1] + 1) parts[used - 1].steps++;
      else parts[used++] = {left + (ALL ? places[b] : b) * STEP, at, 1};
    }
    tile_product(parts, used, sums + d * STEP, true);
  }
}

// 32 rows of y: queries of block `block` of head g of a round's head of keys.
static void attend(const AttentionCall& c, int64_t head, int64_t g, int64_t block, const pk_heads& y,
                   float* lse) {
  const pk_attention& a = c.a;
  const int64_t dims = c.plan.dim_blocks, batch = c.batch(head), q_head = c.key_head(head) * c.plan.group + g;
  const int64_t row = block * SIDE, rows = smaller(SIDE, a.seq - row);
  const AttentionOwn own(c.own(), dims);
  pack_tiles(c.row_of(a.q, batch, q_head, row), a.q.row, rows, a.dim, own.first);
  clear(own.sums, dims * STEP);
  RowsSoftmax state;
  for (int64_t i = 0; i < SIDE; i++) state.most[i] = -INFINITY, state.sum[i] = 0.0f;
  uint32_t words[SIDE];
  int64_t places[pk::ATTENTION_BLOCKS], count = 0;
  vf2 tops[SIDE];
  for (int64_t b = 0; b < c.plan.key_blocks; b++) {
    const Seen seen = seen_words(c, batch, block, b, words);
    if (seen != Seen::NONE) {
      const Segment part = {own.first, c.keys(head, 0) + b * dims * STEP, dims};
      tile_product(&part, 1, own.scores + count * STEP, false);
      if (!count)
        for (vf2& top : tops) top = {set1(-INFINITY), set1(-INFINITY)};
      largest_scores(own.scores + count * STEP, seen, words, tops);
      places[count++] = b;
    }
    if (count == pk::ATTENTION_BLOCKS || (count && b + 1 == c.plan.key_blocks)) {
      softmax_blocks(own.scores, count, tops, a.scale * LOG2_E, state, own.left, own.sums, dims);
      add_products(own.left, c.keys(head, 1), c.plan.key_blocks, dims, count, places, own.sums);
      count = 0;
    }
  }
  float factors[SIDE];
  for (int64_t i = 0; i < SIDE; i++) factors[i] = state.sum[i] == 0.0f ? 0.0f : 1.0f / state.sum[i];
  store_heads(own.sums, factors, rows, a.dim, (bf16*)c.row_of(y, batch, q_head, row), y.row);
  for (int64_t i = 0; i < rows; i++)
    lse[(batch * a.heads + q_head) * a.seq + row + i] =
        state.sum[i] == 0.0f ? INFINITY : state.most[i] * a.scale + logf(state.sum[i]);
}

// A round of heads of keys: each team has some that follow each other, which are mostly of one sequence.
struct AttentionRound {
  const AttentionCall& c;
  int64_t heads;
  Teams& teams;
  int64_t& turn;
  int64_t first(int64_t team) const { return heads * team / teams.count; }
  // task(head, i) for i < `each` of every head, all heads' first i before their second; ends with a barrier.
  template <typename F>
  void run(int64_t each, F task) const {
    const auto count = [&](int64_t team) { return first(team + 1) - first(team); };
    teams.run(
        turn++, [&](int64_t team) { return count(team) * each; },
        [&](int64_t team, int64_t i) { task(first(team) + i % count(team), i / count(team)); });
  }
};

// `part(round)` for each round of heads of keys, by threads that hold tiles.
template <typename F>
static void attention_rounds(const pk_attention& a, const pk::AttentionPlan& plan, float* scratch, F part,
                             int threads) {
  Teams teams(smaller(smaller(threads, pk::MOST_TEAMS), plan.heads));
#pragma omp parallel num_threads(threads)
  {
    int64_t turn = 0;
    tiles_on();
    AttentionCall c{a, plan, scratch, 0};
    if (a.mask) {
      const int64_t rows = (a.mask_batch ? a.batch : 1) * a.seq;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) pack_mask(c, row);
    }
    for (; c.first < a.batch * a.kv_heads; c.first += plan.heads)
      part(AttentionRound{c, smaller(plan.heads, a.batch * a.kv_heads - c.first), teams, turn});
    tiles_off();
  }
}

static void attention(const pk::Attention& of, int threads) {
  const pk_attention& a = of.a;
  const pk::AttentionPlan plan = pk::attention_plan(a, false, threads);
  attention_rounds(
      a, plan, of.scratch,
      [&](const AttentionRound& round) {
        const AttentionCall& c = round.c;
        const int64_t dims = plan.dim_blocks, blocks = plan.key_blocks, queries = plan.query_blocks;
        round.run(blocks, [&](int64_t head, int64_t b) {
          const int64_t rows = smaller(SIDE, a.keys - b * SIDE);
          const bf16* k = c.row_of(a.k, c.batch(head), c.key_head(head), b * SIDE);
          const bf16* v = c.row_of(a.v, c.batch(head), c.key_head(head), b * SIDE);
          pack_heads_columns(k, a.k.row, rows, a.dim, c.keys(head, 0) + b * dims * STEP);
          pack_heads_pairs(v, a.v.row, rows, a.dim, blocks, c.keys(head, 1) + b * STEP);
        });
        // The longest first: with a causal mask the last queries see most.
        round.run(queries * plan.group, [&](int64_t head, int64_t i) {
          attend(c, head, i % plan.group, queries - 1 - i / plan.group, of.y, of.lse);
        });
      },
      threads);
}

}  // namespace PK_NS
