// QLoRA linears on one input in bf16, forward and dx, as products of bf16 tiles. Rows of x and dy are rows of
// A, decoded weights are B, and the low-rank part goes on with the contraction, so that every result is
// summed in one place and rounded once. docs/cpu-engine.md has the order of passes.
#pragma once
#include "gradients_impl.h"
#include "tile_pack.h"

namespace PK_NS {

using pk::panels_of;

// Scratch of one call, laid out by pk::TilePlan.
struct TileScratch {
  const pk::TilePlan& plan;
  const pk::Group& group;
  float* base;
  int64_t steps;  // of the packed contraction
  bf16* packed(int64_t panel) const { return (bf16*)(base + plan.pack_at) + panel * steps * STEP; }
  bf16* low(int64_t panel, int64_t step) const {
    return (bf16*)(base + plan.low_at) + panel * plan.low_panel + step * STEP;
  }
  bf16* project(int64_t step) const { return (bf16*)(base + plan.project_at) + step * STEP; }
  const float* bias(int64_t member, int64_t n_before) const {
    const pk_member& m = group.members[member];
    return !m.bias || m.bias_dtype == PK_F32 ? (const float*)m.bias : base + plan.bias_at + n_before;
  }
  // xa (else dyb) of all adapters, as blocks of 32 slots by steps; null where the plan keeps none.
  bf16* slots(bool of_xa) const {
    return plan.slots_size ? (bf16*)(base + plan.slots_at) + (of_xa ? plan.slots_size : 0) : nullptr;
  }
  float* own() const { return base + plan.own_at + thread_id() * plan.own_size; }
  bf16* own_b() const { return (bf16*)own(); }
  bf16* own_low() const { return (bf16*)(own() + plan.b_size); }
  float* own_c(int64_t panel) const { return own() + plan.b_size + plan.low_size + panel * plan.mc * SIDE; }
  float* own_sums() const { return own() + plan.b_size + plan.low_size + plan.c_size; }
  float* own_block() const { return own_sums() + (plan.sums_size - STEP - pk::PROJECT_STEPS * STEP / 2); }
  bf16* own_masked() const { return (bf16*)(own_block() + STEP); }
};

// Where an adapter's operands begin among those of all.
struct TileCursor {
  int64_t project = 0, low = 0;
  void pass(const pk_adapter& a, int64_t steps) {
    project += pieces_of(a.lora.dtype) * panels_of(a.lora.r) * steps;
    low += pk::low_steps(a.lora.r);
  }
};

// `part(adapter, number, cursor, steps)`; steps: of the contraction that its projection has.
template <typename F>
static void for_each_adapter(const pk::Group& g, bool forward, F part) {
  TileCursor at;
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const pk_adapter& a = g.adapters[i];
    const int64_t steps = panels_of(forward ? g.k() : g.n_of(a));
    if (a.lora.r) part(a, at, steps);
    at.pass(a, steps);
  }
}

// The factors of all projections, [piece][block of 32 ranks][steps], by one thread of those that call it
// together.
static void pack_projections(const TileScratch& s, bool forward) {
  for_each_adapter(s.group, forward, [&](const pk_adapter& a, const TileCursor& at, int64_t steps) {
    const int64_t blocks = panels_of(a.lora.r), count = pieces_of(a.lora.dtype) * blocks * steps;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) {
      const int64_t step = i % steps, block = i / steps % blocks, piece = i / steps / blocks;
      bf16* out = s.project(at.project + i);
      if (forward) pack_rank_rows(a.lora, a.lora.lora_a, s.group.k(), block * SIDE, step * SIDE, piece, out);
      else pack_rank_columns(a.lora, a.lora.lora_b, s.group.n_of(a), block * SIDE, step * SIDE, piece, out);
    }
  });
}

// sums [blocks of 32 ranks] of a packed row panel against an adapter's factor; dropped where it drops.
static void project_panel(const TileScratch& s, const pk_adapter& a, int64_t project_at, int64_t steps,
                          const bf16* rows, int64_t row, const pk::Lanes& lanes, bool dropped, float* sums) {
  const int64_t blocks = panels_of(a.lora.r), pieces = pieces_of(a.lora.dtype);
  clear(sums, blocks * STEP);
  for (int64_t from = 0; from < steps; from += pk::PROJECT_STEPS) {
    const int64_t count = smaller(pk::PROJECT_STEPS, steps - from);
    const bf16* operand = rows + from * STEP;
    if (dropped) {
      uint8_t bits[SIDE * pk::PROJECT_STEPS * SIDE / 8];
      const Dropout d = make_dropout(a.lora.dropout_threshold, a.lora.seed);
      draw_bits(d, row + lanes.from - a.row_begin, from * SIDE, lanes.to - lanes.from, count * SIDE, bits,
                pk::PROJECT_STEPS * SIDE / 8);
      mask_tiles(operand, count, bits, lanes.from, lanes.to, s.own_masked());
      operand = s.own_masked();
    }
    for (int64_t block = 0; block < blocks; block++) {
      const bf16* factors[pk::PIECES];
      for (int64_t piece = 0; piece < pieces; piece++)  // the smallest first, while sums are small
        factors[pieces - 1 - piece] = s.project(project_at + (piece * blocks + block) * steps + from);
      add_chains(operand, factors, pieces, count, a.lora.r - block * SIDE, sums + block * STEP);
    }
  }
}

// Rows [from, to) of a panel's sums times `scale` -> out [rows][r] of fp32, from its first row on.
static void store_sums(const float* sums, const pk::Lanes& lanes, int64_t r, float scale, float* out) {
  for (int64_t i = lanes.from; i < lanes.to; i++, out += r)
    for (int64_t j = 0; j < r; j += VW) {
      const vf v =
          set1(scale) * load(sums + j / SIDE * STEP + i / 16 * 512 + j % SIDE / 16 * 256 + i % 16 * 16);
      memcpy(out + j, &v, (size_t)smaller(VW, r - j) * sizeof(float));
    }
}

// One panel of x -> packed; xa of every adapter, and its low-rank operand.
static void forward_panel(const TileScratch& s, const bf16* x, int64_t row, int64_t rows, int64_t panel) {
  const int64_t k = s.group.k();
  pack_tiles(x + row * k, k, rows, k, s.packed(panel));
  for_each_adapter(s.group, true, [&](const pk_adapter& a, const TileCursor& at, int64_t steps) {
    const pk::Lanes lanes = pk::lanes_of(a, row, rows);
    if (lanes.from >= lanes.to) return;
    float* sums = s.own_sums();
    project_panel(s, a, at.project, steps, s.packed(panel), row, lanes, a.lora.dropout_threshold != 0, sums);
    const float scale =
        a.lora.dropout_threshold ? make_dropout(a.lora.dropout_threshold, a.lora.seed).scale : 1.0f;
    store_sums(sums, lanes, a.lora.r, scale, a.xa + (row + lanes.from - a.row_begin) * a.lora.r);
    pack_low(a.lora, sums, lanes.from, lanes.to, scale * a.lora.scaling, s.low(panel, at.low));
  });
}

// c, a block, plus bias [cols] (may be null) -> out [rows <= 32][cols <= 32] of bf16.
static void store_block(const float* c, int64_t rows, int64_t cols, const float* bias, bf16* out,
                        int64_t ld) {
  const uint32_t some = first_words(cols);
  float add[SIDE] = {};
  for (int64_t j = 0; bias && j < cols; j++) add[j] = bias[j];
  const vf low = load(add), high = load(add + 16);
  for (int64_t i = 0; i < rows; i++, out += ld) {
    const float* at = c + i / 16 * 512 + i % 16 * 16;
    const __m512i both = round_both(load(at) + low, load(at + 256) + high);
    if (cols >= SIDE) store_words(out, both);
    else _mm512_mask_storeu_epi16(out, some, both);
  }
}

// The member and its row that column panel `index` of all members' begins with.
struct ColumnPanel {
  int64_t member, n0, cols, n_before;
};
static ColumnPanel column_panel(const pk::Group& g, int64_t index) {
  int64_t i = 0, before = 0;
  for (; index >= panels_of(g.members[i].weight.n); i++)
    index -= panels_of(g.members[i].weight.n), before += g.members[i].weight.n;
  return {i, index * SIDE, smaller(SIDE, g.members[i].weight.n - index * SIDE), before};
}

constexpr int64_t MOST_SEGMENTS = 64;  // of one product; further adapters are added by further ones

// c = (or, `accumulate`, +=) the packed rows from `a` on times `b`, and, where low [adapters] is wanted, the
// low-rank products of the adapters for which `takes` says so.
template <typename F>
static inline __attribute__((always_inline)) void product_with_adapters(
    const TileScratch& s, bool forward, const bf16* a, const bf16* b, int64_t steps, int64_t panel,
    const bf16* low_factors, float* c, bool accumulate, int64_t rows, F takes) {
  Segment parts[MOST_SEGMENTS];
  parts[0].a = a, parts[0].b = b, parts[0].steps = steps;
  int64_t count = 1;
  if (low_factors)
    for_each_adapter(s.group, forward, [&](const pk_adapter& a, const TileCursor& at, int64_t) {
      if (!takes(a)) return;
      if (count == MOST_SEGMENTS) {
        tile_product(parts, count, c, accumulate, rows);
        count = 0, accumulate = true;
      }
      parts[count++] = {s.low(panel, at.low), low_factors + at.low * STEP, panels_of(low_length(a.lora))};
    });
  tile_product(parts, count, c, accumulate, rows);
}

// Column panels [from, from + count) of y for the rows [m0, m0 + rows).
static void forward_task(const TileScratch& s, int64_t from, int64_t count, int64_t m0, int64_t rows,
                         int64_t m) {
  const pk::Group& g = s.group;
  for (int64_t step = 0; step < s.steps; step += s.plan.chunk) {
    const int64_t steps = smaller(s.plan.chunk, s.steps - step);
    const bool last = step + steps == s.steps;
    for (int64_t q = 0; q < count; q++) {
      const ColumnPanel at = column_panel(g, from + q);
      const pk_member& member = g.members[at.member];
      decode_columns(member.weight, at.n0, at.cols, step * SIDE, steps, s.own_b());
      if (last)
        for_each_adapter(g, true, [&](const pk_adapter& a, const TileCursor& cursor, int64_t) {
          if (a.member == at.member)
            pack_low_columns(a.lora, at.n0, at.cols, s.own_low() + cursor.low * STEP);
        });
      const float* bias = s.bias(at.member, at.n_before);
      for (int64_t p = 0; p < panels_of(rows); p++) {
        const int64_t row = m0 + p * SIDE, here = smaller(SIDE, m - row);
        float* c = s.own_c(q) + (last && !step ? 0 : p * STEP);
        const auto takes = [&](const pk_adapter& a) {
          const pk::Lanes lanes = pk::lanes_of(a, row, here);
          return a.member == at.member && lanes.from < lanes.to;
        };
        const bf16* a = s.packed(p) + step * STEP;
        product_with_adapters(s, true, a, s.own_b(), steps, p, last ? s.own_low() : nullptr, c, step != 0,
                              here, takes);
        if (last)
          store_block(c, here, at.cols, bias ? bias + at.n0 : nullptr,
                      (bf16*)member.y + row * member.weight.n + at.n0, member.weight.n);
      }
    }
  }
}

static void forward_tiles(const pk::Group& g, const bf16* x, int64_t m, float* scratch, int threads) {
  const pk::TilePlan plan = pk::forward_tile_plan(g, m, threads);
  const TileScratch s{plan, g, scratch, panels_of(g.k())};
  for (int64_t i = 0, n = 0; i < g.count; n += g.members[i++].weight.n)
    as_float(g.members[i].bias, g.members[i].bias_dtype, g.members[i].weight.n, scratch + plan.bias_at + n);
  const int64_t columns = pk::member_steps(g), tasks = (columns + plan.block - 1) / plan.block;
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
    pack_projections(s, true);
#pragma omp barrier
    for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
      const int64_t rows = smaller(plan.mc, m - m0);
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < panels_of(rows); p++)
        forward_panel(s, x, m0 + p * SIDE, smaller(SIDE, m - m0 - p * SIDE), p);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; task++)
        forward_task(s, task * plan.block, smaller(plan.block, columns - task * plan.block), m0, rows, m);
    }
    tiles_off();
  }
}

// One panel of every dy -> packed; dyb of every adapter, and its low-rank operand.
static void backward_panel(const TileScratch& s, int64_t row, int64_t rows, int64_t panel) {
  const pk::Group& g = s.group;
  for (int64_t i = 0, step = 0; i < g.count; step += panels_of(g.members[i++].weight.n)) {
    const int64_t n = g.members[i].weight.n;
    bf16* packed = s.packed(panel) + step * STEP;
    if (n) pack_tiles((const bf16*)g.members[i].dy + row * n, n, rows, n, packed);
    for_each_adapter(g, false, [&](const pk_adapter& a, const TileCursor& at, int64_t steps) {
      const pk::Lanes lanes = pk::lanes_of(a, row, rows);
      if (a.member != i || lanes.from >= lanes.to) return;
      float* sums = s.own_sums();
      project_panel(s, a, at.project, steps, packed, row, lanes, false, sums);
      if (a.dyb)
        store_sums(sums, lanes, a.lora.r, a.lora.scaling,
                   a.dyb + (row + lanes.from - a.row_begin) * a.lora.r);
      pack_low(a.lora, sums, lanes.from, lanes.to, a.lora.scaling, s.low(panel, at.low));
    });
  }
}

// c, a block of dx at (row, k0), += drop(dyb A) of the adapters that drop.
static void add_dropped(const TileScratch& s, int64_t k0, int64_t row, int64_t rows, int64_t panel,
                        const bf16* low_factors, float* c) {
  for_each_adapter(s.group, false, [&](const pk_adapter& a, const TileCursor& at, int64_t) {
    const pk::Lanes lanes = pk::lanes_of(a, row, rows);
    if (!a.lora.dropout_threshold || lanes.from >= lanes.to) return;
    const Segment part = {s.low(panel, at.low), low_factors + at.low * STEP, panels_of(low_length(a.lora))};
    float* block = s.own_block();
    tile_product(&part, 1, block, false, rows);
    const Dropout d = make_dropout(a.lora.dropout_threshold, a.lora.seed);
    uint8_t bits[SIDE * 8];  // a draw is 64 elements
    draw_bits(d, row + lanes.from - a.row_begin, k0, lanes.to - lanes.from, SIDE, bits, 8);
    for (int64_t i = lanes.from; i < lanes.to; i++) {
      uint32_t word;
      memcpy(&word, bits + (i - lanes.from) * 8, 4);
      vf factor[2];
      factors(word, set1(d.scale), factor);
      for (int64_t half = 0; half < 2; half++) {
        const int64_t to = i / 16 * 512 + half * 256 + i % 16 * 16;
        store(c + to, fma(factor[half], load(block + to), load(c + to)));
      }
    }
  });
}

// Column panels [from, from + count) of dx for the rows [m0, m0 + rows).
static void backward_task(const TileScratch& s, int64_t from, int64_t count, int64_t m0, int64_t rows,
                          int64_t m, bf16* dx) {
  const pk::Group& g = s.group;
  const int64_t k = g.k();
  for (int64_t i = 0, before = 0; i < g.count; before += panels_of(g.members[i++].weight.n)) {
    const int64_t n = g.members[i].weight.n, all = panels_of(n);
    const int64_t chunk = all ? pk::ceil_div(all, pk::ceil_div(all, pk::CHUNK)) : 1;
    for (int64_t step = 0; step < all; step += chunk) {
      const int64_t steps = smaller(chunk, all - step);
      const bool first = before + step == 0, last = before + step + steps == s.steps;
      for (int64_t q = 0; q < count; q++) {
        const int64_t k0 = (from + q) * SIDE;
        decode_pairs(g.members[i].weight, step * SIDE, smaller(n - step * SIDE, steps * SIDE), k0, s.own_b());
        if (last)
          for_each_adapter(g, false, [&](const pk_adapter& a, const TileCursor& cursor, int64_t) {
            pack_low_rows(a.lora, k, k0, s.own_low() + cursor.low * STEP);
          });
        for (int64_t p = 0; p < panels_of(rows); p++) {
          const int64_t row = m0 + p * SIDE, here = smaller(SIDE, m - row);
          float* c = s.own_c(q) + (last && first ? 0 : p * STEP);
          const auto takes = [&](const pk_adapter& a) {
            const pk::Lanes lanes = pk::lanes_of(a, row, here);
            return !a.lora.dropout_threshold && lanes.from < lanes.to;
          };
          const bf16* a = s.packed(p) + (before + step) * STEP;
          product_with_adapters(s, false, a, s.own_b(), steps, p, last ? s.own_low() : nullptr, c, !first,
                                here, takes);
          if (!last) continue;
          add_dropped(s, k0, row, here, p, s.own_low(), c);
          store_block(c, here, SIDE, nullptr, dx + row * k + k0, k);
        }
      }
    }
  }
}

// xa and dyb as operands of the gradients that are wanted, by one thread of those that call it together.
static void pack_all_slots(const TileScratch& s) {
  const pk::Group& g = s.group;
  for (int64_t of_xa = 0; of_xa < 2; of_xa++) {
    bf16* out = s.slots(of_xa);
    for (int64_t i = 0; out && i < g.adapter_count; i++) {
      const pk_adapter& a = g.adapters[i];
      const int64_t rows = a.row_end - a.row_begin, r = a.lora.r;
      const int64_t steps = panels_of(rows), count = steps * slot_blocks(a.lora);
      const bool wanted = of_xa ? a.d_lora_b != nullptr : a.d_lora_a != nullptr;
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < (wanted ? count : 0); j++) {
        const int64_t step = j % steps, from = step * SIDE;
        const float* low = (of_xa ? a.xa : a.dyb) + from * r;
        pack_slots(low, smaller(SIDE, rows - from), r, sum_pieces(a.lora.dtype), j / steps * SIDE,
                   out + j * STEP);
      }
      out += count * STEP;
    }
  }
}

// What is summed over rows. dy is read where it lies packed, if one pass held all of it.
static void tile_gradients(const TileScratch& s, const bf16* x, int64_t m) {
  const pk::Group& g = s.group;
  pk::Plan strips{};
  strips.own_at = s.plan.own_at, strips.own_size = s.plan.own_size;
  pack_all_slots(s);
#pragma omp barrier
  column_strips<bf16>(Scratch{strips, g, s.base, g.operands().r}, m, [&](int64_t member) {
    if (member == ALL) return Source<bf16>{x, g.k(), ALL, s.slots(false)};
    int64_t before = 0;
    for (int64_t i = 0; i < member; i++) before += panels_of(g.members[i].weight.n);
    const bf16* tiles = m <= s.plan.mc ? s.packed(0) + before * STEP : nullptr;
    const pk_member& own = g.members[member];
    return Source<bf16>{(const bf16*)own.dy, own.weight.n, member, s.slots(true), tiles, s.steps * STEP};
  });
}

static void backward_tiles(const pk::Group& g, const bf16* x, int64_t m, bf16* dx, float* scratch,
                           int threads) {
  const pk::TilePlan plan = pk::backward_tile_plan(g, m, threads);
  const TileScratch s{plan, g, scratch, pk::member_steps(g)};
  const int64_t columns = panels_of(g.k()), tasks = (columns + plan.block - 1) / plan.block;
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
    pack_projections(s, false);
#pragma omp barrier
    for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
      const int64_t rows = smaller(plan.mc, m - m0);
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < panels_of(rows); p++)
        backward_panel(s, m0 + p * SIDE, smaller(SIDE, m - m0 - p * SIDE), p);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; task++)
        backward_task(s, task * plan.block, smaller(plan.block, columns - task * plan.block), m0, rows, m,
                      dx);
    }
    tile_gradients(s, x, m);
    tiles_off();
  }
}

}  // namespace PK_NS
