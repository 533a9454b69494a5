// A head's product and cross-entropy in bf16 tiles: attention of rows of x over the words, whose keys and
// values both are rows of W. A task takes up to 256 rows through a range of words, 256 words at a time:
// logits, each row's softmax so far, and what it weighs of W; at the end the ranges are put together. Every
// result is summed in one order, whatever the number of threads. Logits and sums are fp32; what weighs W is
// rounded to bf16 for the product.
#pragma once
#include "attention_impl.h"
#include "linear_cross_entropy.h"

namespace PK_NS {

struct LossCall {
  const pk::LinearCrossEntropy& a;
  const pk::LossPlan& plan;
  bf16* x(int64_t panel) const { return (bf16*)(a.scratch + plan.pack_at) + panel * plan.steps * STEP; }
  float* labelled(int64_t panel) const { return a.scratch + plan.labelled_at + panel * SIDE; }
  RowsSoftmax& state(int64_t range, int64_t panel) const {
    return ((RowsSoftmax*)(a.scratch + plan.state_at))[range * plan.panels + panel];
  }
  float* sums(int64_t range, int64_t panel) const {
    return a.scratch + plan.sums_at + (range * plan.panels + panel) * plan.steps * STEP;
  }
  float* own() const { return a.scratch + plan.own_at + thread_id() * plan.own_size; }
  int64_t rows(int64_t panel) const { return smaller(SIDE, a.m - panel * SIDE); }
};

// Rows [n0, n0 + cols) of W over `steps` contraction steps from k0 on -> steps of B.
static void pack_words_columns(const pk_weight& w, int64_t n0, int64_t cols, int64_t k0, int64_t steps,
                               bf16* out) {
  if (w.code) return decode_columns(w, n0, cols, k0, steps, out);
  pack_heads_columns((const bf16*)w.data + n0 * w.k + k0, w.k, cols, smaller(steps * SIDE, w.k - k0), out);
}

// Columns [k0, k0 + 32) of W over `rows` of its rows from n0 on -> steps of B.
static void pack_words_pairs(const pk_weight& w, int64_t n0, int64_t rows, int64_t k0, bf16* out) {
  if (w.code) return decode_pairs(w, n0, rows, k0, out);
  const RowSource from = {(const bf16*)w.data + n0 * w.k + k0, w.k, SIDE * w.k, nullptr, 0};
  for (int64_t s = 0; s < pk::panels_of(rows); s++)
    pack_row_pairs(from, s, smaller(SIDE, rows - s * SIDE), smaller(SIDE, w.k - k0), out + s * STEP);
}

// A panel's logits of `count` blocks from word n0 on: the labels' are put aside and taken out; what is left
// becomes probabilities less each row's largest so far.
static void loss_softmax(const LossCall& c, int64_t range, int64_t panel, int64_t n0, int64_t count,
                         float* scores, bf16* left) {
  const pk_weight& w = c.a.w;
  for (int64_t i = 0; i < c.rows(panel); i++) {
    const int64_t at = c.a.labels[panel * SIDE + i] - n0;
    if (at < 0 || at >= count * SIDE) continue;
    float* score = row_of_block(scores + at / SIDE * STEP, i) + at % SIDE / 16 * 256 + at % 16;
    c.labelled(panel)[i] = *score;
    *score = -INFINITY;
  }
  vf2 tops[SIDE];
  for (vf2& top : tops) top = {set1(-INFINITY), set1(-INFINITY)};
  for (int64_t b = 0; b < count; b++) {
    const uint32_t there = first_words(w.n - n0 - b * SIDE);
    uint32_t words[SIDE];
    for (uint32_t& word : words) word = there;
    largest_scores(scores + b * STEP, there == ~0u ? Seen::ALL : Seen::SOME, words, tops);
  }
  softmax_blocks(scores, count, tops, LOG2_E, c.state(range, panel), left,
                 c.a.dx ? c.sums(range, panel) : nullptr, c.plan.steps);
}

// Rows [n0, n0 + rows) of W over `steps` contraction steps from k0 on, on their way into the cache: one of
// `parts` shares of them. Packing reads 32 rows side by side, which no prefetcher of the processor sees.
static inline void fetch_words(const pk_weight& w, int64_t n0, int64_t rows, int64_t k0, int64_t steps,
                               int64_t part, int64_t parts) {
  const bf16* from = (const bf16*)w.data + n0 * w.k + k0;
  for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++)
    for (int64_t s = 0; s < steps; s++) __builtin_prefetch(from + i * w.k + s * SIDE, 0, 2);
}

// Panels [first, first + panels) of rows through the words of a range.
static void loss_task(const LossCall& c, int64_t first, int64_t panels, int64_t range) {
  const pk_weight& w = c.a.w;
  const int64_t steps = c.plan.steps, all = pk::panels_of(w.n);
  const int64_t chunk = pk::round_up(pk::ceil_div(steps, pk::ceil_div(steps, pk::CHUNK)), 2);
  const int64_t from = range * c.plan.range_blocks, to = smaller(all, from + c.plan.range_blocks);
  constexpr int64_t B = (pk::CHUNK > pk::LOSS_BLOCKS ? pk::CHUNK : pk::LOSS_BLOCKS) * STEP / 2;
  constexpr int64_t SCORES = pk::LOSS_BLOCKS * STEP;  // of a panel
  bf16* b = (bf16*)c.own();
  float* scores = c.own() + B;
  bf16* left = (bf16*)(scores + pk::LOSS_PANELS * SCORES);
  for (int64_t p = 0; p < panels; p++) {
    RowsSoftmax& state = c.state(range, first + p);
    for (int64_t i = 0; i < SIDE; i++) state.most[i] = -INFINITY, state.sum[i] = 0.0f;
    if (c.a.dx) clear(c.sums(range, first + p), steps * STEP);
  }
  for (int64_t block = from; block < to; block += pk::LOSS_BLOCKS) {
    const int64_t count = smaller(pk::LOSS_BLOCKS, to - block), n0 = block * SIDE;
    for (int64_t q = 0; q < count; q++)
      for (int64_t step = 0; step < steps; step += chunk) {
        const int64_t some = smaller(chunk, steps - step), at = n0 + q * SIDE;
        pack_words_columns(w, at, smaller(SIDE, w.n - at), step * SIDE, some, b);
        const bool last = step + some == steps;
        const int64_t next = at + (last ? SIDE : 0), after = last ? 0 : step + some;
        for (int64_t p = 0; p < panels; p++) {
          const Segment part = {c.x(first + p) + step * STEP, b, some};
          tile_product(&part, 1, scores + p * SCORES + q * STEP, step != 0, c.rows(first + p));
          if (!w.code && next < w.n)
            fetch_words(w, next, smaller(SIDE, w.n - next), after * SIDE, smaller(chunk, steps - after), p,
                        panels);
        }
      }
    for (int64_t p = 0; p < panels; p++)
      loss_softmax(c, range, first + p, n0, count, scores + p * SCORES, left + p * SCORES);
    for (int64_t d = 0; c.a.dx && d < steps; d++) {
      pack_words_pairs(w, n0, smaller(count * SIDE, w.n - n0), d * SIDE, b);
      for (int64_t p = 0; p < panels; p++) {
        const Segment part = {left + p * SCORES, b, count};
        tile_product(&part, 1, c.sums(range, first + p) + d * STEP, true, c.rows(first + p));
      }
    }
  }
}

// The ranges of a row put together: its loss, and dx = row_scale ((1 + 2 z lse) sum of p W - W[label]).
static void loss_row(const LossCall& c, int64_t panel, int64_t i, float* of_label) {
  const pk::LinearCrossEntropy& a = c.a;
  const int64_t row = panel * SIDE + i, ranges = c.plan.ranges;
  const float label = c.labelled(panel)[i];
  float most = label, fade[pk::LOSS_RANGES];
  for (int64_t r = 0; r < ranges; r++) {
    const float top = c.state(r, panel).most[i];
    most = top > most ? top : most;
  }
  double others = 0;
  for (int64_t r = 0; r < ranges; r++) {
    const RowsSoftmax& state = c.state(r, panel);
    fade[r] = state.most[i] == -INFINITY ? 0.0f : expf(state.most[i] - most);
    others += (double)fade[r] * state.sum[i];
  }
  const double own = exp((double)label - most), total = own + others, lse = log(total) + most;
  a.loss[row] = (float)(lse - label + a.z_loss * lse * lse);
  if (!a.dx) return;
  const double scale = a.row_scale ? a.row_scale[row] : 1.0, more = 2.0 * a.z_loss * lse;
  const vf at_label = set1((float)(scale * (more * own - others) / total));
  for (int64_t r = 0; r < ranges; r++) fade[r] *= (float)(scale * (1.0 + more) / total);
  decode(a.w, a.w.code ? make_table(a.w.code) : Table{}, a.labels[row] * a.w.k, a.w.k, of_label);
  for (int64_t d = 0; d < c.plan.steps; d++) {
    const int64_t k0 = d * SIDE, here = smaller(SIDE, a.w.k - k0);
    vf2 v = {at_label * some_of(of_label + k0, here), at_label * some_of(of_label + k0 + VW, here - VW)};
    for (int64_t r = 0; r < ranges; r++)
      v = fma(constant<vf2>(fade[r]), both_halves(row_of_block(c.sums(r, panel) + d * STEP, i)), v);
    _mm512_mask_storeu_epi16((bf16*)a.dx + row * a.w.k + k0, first_words(here), round_both(v.a, v.b));
  }
}

static void linear_cross_entropy(const pk::LinearCrossEntropy& a, int threads) {
  const pk::LossPlan plan = pk::loss_plan(a.m, a.w.n, a.w.k, a.dx != nullptr, threads);
  const LossCall c{a, plan};
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < plan.panels; p++)
      pack_tiles((const bf16*)a.x + p * SIDE * a.w.k, a.w.k, c.rows(p), a.w.k, c.x(p));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.tasks_of_rows * plan.ranges; task++) {
      const int64_t first = task / plan.ranges * pk::LOSS_PANELS;
      loss_task(c, first, smaller(pk::LOSS_PANELS, plan.panels - first), task % plan.ranges);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.m; row++) loss_row(c, row / SIDE, row % SIDE, c.own());
    tiles_off();
  }
}

}  // namespace PK_NS
