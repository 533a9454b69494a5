// How a product of bf16 tiles is blocked and what scratch that takes: plain arithmetic, the same on every
// level.
#pragma once
#include "group.h"

namespace pk {

// Rows, columns and contraction steps of a block: two tiles of 16 each way.
constexpr int64_t SIDE = 32;
// bf16 elements of either operand a step.
constexpr int64_t STEP = SIDE * SIDE;
// Steps at most whose decoded columns (20 KB) stay in the first-level cache beside rows; even, as a block of
// a weight is two steps or more.
constexpr int64_t CHUNK = 10;
constexpr int64_t COLUMN_PANELS = 4;          // of 32 columns, decoded by one task
constexpr int64_t PACKED_BYTES = 4600 << 10;  // of packed rows, where that allows one panel
constexpr int64_t PIECES = 3;                 // bf16 numbers that hold an fp32 one, at most
constexpr int64_t PROJECT_STEPS = 4;          // a chain of 128 terms in the low-rank products

static inline int64_t panels_of(int64_t count) { return ceil_div(count, SIDE); }

// A low-rank product's contraction, in steps: xa in two pieces against B, and its first piece once more
// against what is left of a B that is not bf16.
static inline int64_t low_steps(int64_t r) { return panels_of(PIECES * r); }

constexpr int64_t PARTS_BYTES = 1 << 19;  // of strips' sums over either half of the rows
constexpr int64_t SLOT_BYTES = 1 << 20;   // of xa and dyb as operands of the gradients, where that holds them

constexpr int64_t MOST_TEAMS = 16;
// Of the product of a row panel and a column panel: decoding the column panel, 48 of 120 ns a step on Zen 5;
// and bringing over a row panel that another core has packed, where both have a cache in common or none.
constexpr double DECODING = 0.4, SHARING = 0.2, SHARING_APART = 4.0;

struct TilePlan {
  int64_t mc, chunk, block;  // rows a pass; steps a chunk; column panels a task
  int64_t teams, team_rows;  // of threads, and of a pass each team's rows
  int64_t low_panel;         // bf16 elements of a row panel's low-rank operands
  int64_t strips;            // whose sums over halves of the rows are held at a time
  int64_t pack_at, low_at, project_at, bias_at, slots_at, parts_at, own_at;  // offsets in floats
  int64_t b_size, low_size, c_size, sums_size, slots_size, part_size, own_size, total;
};

// Whether the gradients of adapters are summed over either half of the rows apart: whatever the number of
// threads, so that they have the same bits.
static inline bool halved(int64_t m) { return m >= 4 * SIDE; }
static inline int64_t half_of(int64_t m) { return round_up(ceil_div(m, 2), SIDE); }

// Column panels of a task, where `threads` share them.
static inline int64_t task_panels(int64_t column_panels, int64_t threads) {
  const int64_t rounds = largest(1, ceil_div(column_panels, threads * COLUMN_PANELS));
  return largest(1, ceil_div(column_panels, threads * rounds));
}

// Threads by teams. A team has row panels of its own, which it packs and alone reads, and decodes the weight
// for itself. The price of `teams`, in products of a row panel by all columns: how much longer than with
// equal shares the last thread takes; decoding, once for a team's panels; and bringing over what the team's
// other threads have packed.
static inline double price_of_teams(int64_t teams, int64_t panels, int64_t column_panels, int threads,
                                    bool apart) {
  const int64_t each = ceil_div(panels, teams), members = threads / teams;
  const int64_t block = task_panels(column_panels, members);
  const int64_t rounds = ceil_div(ceil_div(column_panels, block), members);
  const double longest = (double)(each * smaller(rounds * block, column_panels)),
               equal = (double)(panels * column_panels) / threads;
  return longest / equal + DECODING / (double)each +
         (apart ? SHARING_APART : SHARING) * (double)(members - 1) / (double)column_panels;
}
static inline int64_t teams_of(int64_t panels, int64_t column_panels, int threads, bool apart) {
  int64_t best = 1;
  for (int64_t t = 2; column_panels && t <= smaller(threads, MOST_TEAMS); t++) {
    if (threads % t || (t - 1) * ceil_div(panels, t) >= panels) continue;  // none stays without rows
    if (price_of_teams(t, panels, column_panels, threads, apart) <
        price_of_teams(best, panels, column_panels, threads, apart))
      best = t;
  }
  return best;
}

// What the adapters of a call hold: `project` steps of 32 ranks times pieces, `low` steps of their low-rank
// operands, backward `slots`, steps of xa or dyb against the columns of x or dy, and `total` ranks.
struct TileRanks {
  int64_t project, low, widest, slots, total;
};

static inline TilePlan make_tile_plan(int64_t m, int64_t steps, int64_t column_panels, const TileRanks& ranks,
                                      int64_t bias, int threads, bool apart) {
  TilePlan p{};
  const int64_t rows = largest(m, 1);
  int64_t limit = PACKED_BYTES / 2 / (largest(steps, 1) * SIDE) / SIDE * SIDE;
  limit = limit < SIDE ? SIDE : limit > MAX_ROWS_BLOCK ? MAX_ROWS_BLOCK : limit;
  p.mc = round_up(ceil_div(rows, ceil_div(rows, limit)), SIDE);
  p.chunk = round_up(ceil_div(steps, ceil_div(largest(steps, 1), CHUNK)), 2);
  p.teams = teams_of(p.mc / SIDE, column_panels, threads, apart);
  p.team_rows = ceil_div(p.mc / SIDE, p.teams) * SIDE;
  p.block = task_panels(column_panels, threads / p.teams);
  p.low_panel = ranks.low * STEP;
  p.b_size = CHUNK * STEP / 2;
  p.low_size = ranks.low * STEP / 2;
  p.c_size = p.block * p.team_rows * SIDE;
  p.sums_size = (ranks.widest + 1) * STEP + PROJECT_STEPS * STEP / 2;
  const int64_t strip = ranks.slots ? ranks.total * STRIP_PANELS * MAX_LANES + STRIP_ROWS * MAX_LANES : 0;
  p.own_size = largest(p.b_size + p.low_size + p.c_size + p.sums_size, round_up(strip, ALIGN));
  p.slots_size = ranks.slots * STEP * 4 <= SLOT_BYTES ? ranks.slots * STEP : 0;
  p.part_size = ranks.slots && halved(m) ? ranks.total * STRIP_PANELS * MAX_LANES : 0;
  p.strips = largest(threads, PARTS_BYTES / 4 / largest(1, 2 * p.part_size));
  int64_t at = 0;
  auto take = [&at](int64_t size) {
    int64_t here = at;
    at += round_up(size, ALIGN);
    return here;
  };
  p.pack_at = take(p.mc * steps * SIDE / 2);
  p.low_at = take(p.mc / SIDE * p.low_panel / 2);
  p.project_at = take(ranks.project * STEP / 2);
  p.bias_at = take(bias);
  p.slots_at = take(p.slots_size);
  p.parts_at = take(p.strips * 2 * p.part_size);
  p.own_at = take(p.own_size * threads);
  p.total = at;
  return p;
}

static inline TileRanks tile_ranks(const Group& g, bool forward) {
  TileRanks ranks{0, 0, 1, 0, 0};
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const int64_t r = g.adapters[i].lora.r, blocks = panels_of(r);
    ranks.project += PIECES * blocks * panels_of(forward ? g.k() : g.n_of(g.adapters[i]));
    ranks.low += low_steps(r);
    ranks.widest = largest(ranks.widest, blocks);
    ranks.total += r;
    if (!forward) ranks.slots += panels_of(g.adapters[i].row_end - g.adapters[i].row_begin) * low_steps(r);
  }
  return ranks;
}

static inline int64_t member_steps(const Group& g) {
  int64_t total = 0;
  for (int64_t i = 0; i < g.count; i++) total += panels_of(g.members[i].weight.n);
  return total;
}

// apart: whether the threads' cores have no cache in common.
static inline TilePlan forward_tile_plan(const Group& g, int64_t m, int threads, bool apart) {
  return make_tile_plan(m, panels_of(g.k()), member_steps(g), tile_ranks(g, true), g.n(), threads, apart);
}
static inline TilePlan backward_tile_plan(const Group& g, int64_t m, int threads, bool apart) {
  return make_tile_plan(m, member_steps(g), panels_of(g.k()), tile_ranks(g, false), 0, threads, apart);
}

// Whether the tiles serve a call: 4-bit weights whose rows are whole blocks of 64 or more.
static inline bool tiles_take(const Group& g) {
  for (int64_t i = 0; i < g.count; i++) {
    const pk_weight& w = g.members[i].weight;
    if (!w.data || !w.code || w.blocksize < 64 || w.k % 64) return false;
    if (g.members[i].scale || g.members[i].norm) return false;
  }
  return true;
}

}  // namespace pk
