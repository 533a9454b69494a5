// The backward pass of QLoRA linears on one input in bf16 tiles: dx, and what is summed over rows.
#pragma once
#include "tile_impl.h"

namespace PK_NS {

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

// The same of dx.
static void backward_task(const TileScratch& s, Stretch columns, int64_t m0, Stretch panels, int64_t m,
                          bf16* dx) {
  const pk::Group& g = s.group;
  const int64_t k = g.k();
  Target target = target_of(nullptr, k, SIDE, nullptr);
  bool drops = false;
  for_each_adapter(g, false, [&](const pk_adapter& a, const TileCursor&, int64_t) {
    drops = drops || a.lora.dropout_threshold;
  });
  for (int64_t i = 0, before = 0; i < g.count; before += panels_of(g.members[i++].weight.n)) {
    const int64_t n = g.members[i].weight.n, all = panels_of(n);
    const int64_t chunk = all ? pk::ceil_div(all, pk::ceil_div(all, pk::CHUNK)) : 1;
    for (int64_t step = 0; step < all; step += chunk) {
      const int64_t steps = smaller(chunk, all - step);
      const bool first = before + step == 0, last = before + step + steps == s.steps;
      for (int64_t q = 0; q < columns.count; q++) {
        const int64_t k0 = (columns.from + q) * SIDE;
        decode_pairs(g.members[i].weight, step * SIDE, smaller(n - step * SIDE, steps * SIDE), k0, s.own_b());
        if (last)
          for_each_adapter(g, false, [&](const pk_adapter& a, const TileCursor& cursor, int64_t) {
            pack_low_rows(a.lora, k, k0, s.own_low() + cursor.low * STEP);
          });
        for (int64_t p = panels.from; p < panels.from + panels.count; p++) {
          const int64_t row = m0 + p * SIDE, here = smaller(SIDE, m - row);
          float* c = s.own_c(q) + (last && first ? 0 : (p - panels.from) * STEP);
          const auto takes = [&](const pk_adapter& a) {
            const pk::Lanes lanes = pk::lanes_of(a, row, here);
            return !a.lora.dropout_threshold && lanes.from < lanes.to;
          };
          const bf16* a = s.packed(p) + (before + step) * STEP;
          target.out = dx + row * k + k0;
          product_with_adapters(s, false, a, s.own_b(), steps, p, last ? s.own_low() : nullptr, c, !first,
                                here, last && !drops ? &target : nullptr, takes);
          if (!last || !drops) continue;
          add_dropped(s, k0, row, here, p, s.own_low(), c);
          target.put_block(c, here);
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
static void tile_gradients(const TileScratch& s, const bf16* x, int64_t m, Teams& teams, int64_t turn) {
  const pk::Group& g = s.group;
  pk::Plan plan{};
  plan.own_at = s.plan.own_at, plan.own_size = s.plan.own_size;
  pack_all_slots(s);
#pragma omp barrier
  const Scratch own{plan, g, s.base, g.operands().r};
  const auto source = [&](int64_t member) {
    if (member == ALL) return Source<bf16>{x, g.k(), ALL, s.slots(false)};
    int64_t before = 0;
    for (int64_t i = 0; i < member; i++) before += panels_of(g.members[i].weight.n);
    const bf16* tiles = m <= s.plan.mc ? s.packed(0) + before * STEP : nullptr;
    const pk_member& from = g.members[member];
    return Source<bf16>{(const bf16*)from.dy, from.weight.n, member, s.slots(true), tiles, s.steps * STEP};
  };
  if (!pk::halved(m)) return column_strips<bf16>(own, m, source);
  // Either half of the rows by one half of the teams, which have them in their caches.
  const int64_t half = pk::half_of(m), total = strip_count(g), halves = teams.count > 1 ? 2 : 1;
  const auto part = [&](int64_t strip, int64_t of) {
    return s.base + s.plan.parts_at + (strip * 2 + of) * s.plan.part_size;
  };
  for (int64_t first = 0; first < total; first += s.plan.strips) {
    const int64_t count = smaller(s.plan.strips, total - first);
    const auto size = [&](int64_t team) {
      return team % pk::ceil_div(teams.count, halves) ? 0 : count * 2 / halves;
    };
    teams.run(turn++, size, [&](int64_t team, int64_t i) {
      const int64_t of = halves > 1 ? team > 0 : i / count, from = of * half, strip = i % count;
      strip_of(g, first + strip, source, [&](const Source<bf16>& src, int64_t c0) {
        gradient_rows(own, src, from, of ? m : half, c0, part(strip, of), own.own() + own.r * STRIP);
      });
    });
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++)
      strip_of(g, first + i, source, [&](const Source<bf16>& src, int64_t c0) {
        float *c = part(i, 0), *other = part(i, 1);
        for (int64_t j = 0; j < own.r * STRIP; j += VW) store(c + j, load(c + j) + load(other + j));
        finish_strip(own, src, m, c0, c);
      });
  }
}

static void backward_tiles(const pk::Group& g, const bf16* x, int64_t m, bf16* dx, float* scratch,
                           int threads) {
  Cores cores(threads);
  const pk::TilePlan plan = pk::backward_tile_plan(g, m, threads, cores.apart);
  const TileScratch s{plan, g, scratch, pk::member_steps(g)};
  Teams teams(plan.teams);
#pragma omp parallel num_threads(threads)
  {
    int64_t turn = 0;
    cores.measure();
    tiles_on();
    pack_projections(s, false);
#pragma omp barrier
    for_each_pass(
        s, teams, turn, m, panels_of(g.k()),
        [&](int64_t m0, int64_t p) { backward_panel(s, m0 + p * SIDE, smaller(SIDE, m - m0 - p * SIDE), p); },
        [&](int64_t m0, Stretch rows, Stretch columns) { backward_task(s, columns, m0, rows, m, dx); });
    tile_gradients(s, x, m, teams, turn);
    tiles_off();
  }
}

}  // namespace PK_NS
