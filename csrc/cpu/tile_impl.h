// QLoRA linears on one input in bf16, as products of bf16 tiles: what both directions share, and forward.
// Rows of x and dy are rows of A, decoded weights are B, and the low-rank part goes on with the contraction,
// so that every result is summed in one place and rounded once. docs/cpu-engine.md has the order of passes.
#pragma once
#include "gradients_impl.h"
#include "teams.h"
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
  float* own_c(int64_t panel) const {
    return own() + plan.b_size + plan.low_size + panel * plan.team_rows * SIDE;
  }
  float* own_sums() const { return own() + plan.b_size + plan.low_size + plan.c_size; }
  float* own_block() const { return own_sums() + (plan.sums_size - STEP - pk::PROJECT_STEPS * STEP / 2); }
  bf16* own_masked() const { return (bf16*)(own_block() + STEP); }
};

// Panels that follow each other.
struct Stretch {
  int64_t from, count;
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

// `cols` columns of rows `ld` apart, from the first row on, plus bias [cols] (may be null).
static Target target_of(bf16* out, int64_t ld, int64_t cols, const float* bias) {
  float add[SIDE] = {};
  for (int64_t j = 0; bias && j < cols; j++) add[j] = bias[j];
  return {out, ld, cols, load(add), load(add + 16)};
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
// low-rank products of the adapters for which `takes` says so; the sums go to the target, if there is one.
template <typename F>
static inline __attribute__((always_inline)) void product_with_adapters(
    const TileScratch& s, bool forward, const bf16* a, const bf16* b, int64_t steps, int64_t panel,
    const bf16* low_factors, float* c, bool accumulate, int64_t rows, const Target* target, F takes) {
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
  tile_product(parts, count, c, accumulate, rows, target);
}

// Some columns of y for some rows of the pass from row m0 on.
static void forward_task(const TileScratch& s, Stretch columns, int64_t m0, Stretch panels, int64_t m) {
  const pk::Group& g = s.group;
  for (int64_t step = 0; step < s.steps; step += s.plan.chunk) {
    const int64_t steps = smaller(s.plan.chunk, s.steps - step);
    const bool last = step + steps == s.steps;
    for (int64_t q = 0; q < columns.count; q++) {
      const ColumnPanel at = column_panel(g, columns.from + q);
      const pk_member& member = g.members[at.member];
      decode_columns(member.weight, at.n0, at.cols, step * SIDE, steps, s.own_b());
      if (last)
        for_each_adapter(g, true, [&](const pk_adapter& a, const TileCursor& cursor, int64_t) {
          if (a.member == at.member)
            pack_low_columns(a.lora, at.n0, at.cols, s.own_low() + cursor.low * STEP);
        });
      const float* bias = s.bias(at.member, at.n_before);
      const int64_t n = member.weight.n;
      Target target = target_of(nullptr, n, at.cols, bias ? bias + at.n0 : nullptr);
      for (int64_t p = panels.from; p < panels.from + panels.count; p++) {
        const int64_t row = m0 + p * SIDE, here = smaller(SIDE, m - row);
        float* c = s.own_c(q) + (last && !step ? 0 : (p - panels.from) * STEP);
        const auto takes = [&](const pk_adapter& a) {
          const pk::Lanes lanes = pk::lanes_of(a, row, here);
          return a.member == at.member && lanes.from < lanes.to;
        };
        const bf16* a = s.packed(p) + step * STEP;
        target.out = (bf16*)member.y + row * n + at.n0;
        product_with_adapters(s, true, a, s.own_b(), steps, p, last ? s.own_low() : nullptr, c, step != 0,
                              here, last ? &target : nullptr, takes);
      }
    }
  }
}

// The passes over m rows, by the threads of a parallel region: `pack(m0, panel)` for each row panel of a pass
// from row m0 on, then `product(m0, rows, columns)` of stretches of its row panels and of column panels.
template <typename F, typename G>
static void for_each_pass(const TileScratch& s, Teams& teams, int64_t& turn, int64_t m, int64_t column_panels,
                          F pack, G product) {
  const int64_t block = s.plan.block, tasks = pk::ceil_div(column_panels, block);
  for (int64_t m0 = 0; m0 < m; m0 += s.plan.mc) {
    const int64_t panels = panels_of(smaller(s.plan.mc, m - m0)), each = s.plan.team_rows / SIDE;
    const auto rows = [&](int64_t team) {
      return Stretch{team * each, smaller(each, pk::largest(0, panels - team * each))};
    };
    teams.run(
        turn++, [&](int64_t team) { return rows(team).count; },
        [&](int64_t team, int64_t i) { pack(m0, rows(team).from + i); });
    teams.run(
        turn++, [&](int64_t team) { return rows(team).count ? tasks : 0; },
        [&](int64_t team, int64_t i) {
          product(m0, rows(team), Stretch{i * block, smaller(block, column_panels - i * block)});
        });
  }
}

static void forward_tiles(const pk::Group& g, const bf16* x, int64_t m, float* scratch, int threads) {
  Cores cores(threads);
  const pk::TilePlan plan = pk::forward_tile_plan(g, m, threads, cores.apart);
  const TileScratch s{plan, g, scratch, panels_of(g.k())};
  for (int64_t i = 0, n = 0; i < g.count; n += g.members[i++].weight.n)
    as_float(g.members[i].bias, g.members[i].bias_dtype, g.members[i].weight.n, scratch + plan.bias_at + n);
  Teams teams(plan.teams);
#pragma omp parallel num_threads(threads)
  {
    int64_t turn = 0;
    cores.measure();
    tiles_on();
    pack_projections(s, true);
#pragma omp barrier
    for_each_pass(
        s, teams, turn, m, pk::member_steps(g),
        [&](int64_t m0, int64_t p) {
          forward_panel(s, x, m0 + p * SIDE, smaller(SIDE, m - m0 - p * SIDE), p);
        },
        [&](int64_t m0, Stretch rows, Stretch columns) { forward_task(s, columns, m0, rows, m); });
    tiles_off();
  }
}

}  // namespace PK_NS
