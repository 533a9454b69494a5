// One linear as a group of one, and the scratch of a call on the level in use. Only dispatch.cpp includes it.
#pragma once
#include <initializer_list>

#include "checks.h"
#include "levels.h"
#include "tile_plan.h"

namespace {

using namespace pk;

// Scratch begins at the next cache line, wherever the caller's does: its bytes hold as many more.
constexpr int64_t LINE = 64;
float* aligned(void* scratch) { return (float*)(((uintptr_t)scratch + LINE - 1) / LINE * LINE); }
int64_t bytes_of(int64_t floats) { return floats * (int64_t)sizeof(float) + LINE - 1; }

int64_t gemv_floats(int64_t m, int64_t n, int64_t k, int64_t r) {
  // x in fp32 and as the product takes it: rows of fp32, or 16 columns of bf16 and their xa
  const int64_t rows = m * gemv_ld(k), tiles = ceil_div(m, 16) * 16 * (round_up(k, 64) / 2 + r);
  return m * k + round_up(r * (k + n) + n, ALIGN) + ALIGN + largest(rows, tiles);
}

int64_t group_floats(const Group& g, int64_t m, int threads) {
  const int64_t forward = g.forward_plan(m, current->lanes, threads).total;
  // A backward pass without dx runs on the plan without base products.
  const int64_t with_dx = g.backward_plan(m, true, current->lanes, threads).total,
                without = g.backward_plan(m, false, current->lanes, threads).total;
  const int64_t most = largest(forward, largest(with_dx, without));
  if (!current->tiles || !tiles_take(g)) return most;
  int64_t tiles = most;  // however far apart the cores are when the call comes
  for (bool apart : {false, true})
    tiles = largest(tiles, largest(forward_tile_plan(g, m, threads, apart).total,
                                   backward_tile_plan(g, m, threads, apart).total));
  return tiles;
}

// One linear as a group of one; without a base product where w is null.
struct Single {
  pk_member member{};
  pk_adapter adapter{};
  Single(const pk_weight* w, const pk_lora& lora, int64_t m, int64_t n, int64_t k) {
    if (w) member.weight = *w;
    member.weight.n = n, member.weight.k = k;
    adapter.lora = lora;
    adapter.row_end = m;
  }
  Group group() const { return {&member, 1, &adapter, adapter.lora.r ? 1 : 0}; }
};

// 0 for sizes that no call takes.
int64_t single_scratch_bytes(bool base, int64_t m, int64_t n, int64_t k, int64_t r, int threads) {
  if (n < 1 || k < 1 || bad_rank(r) || !matrix(m, n) || !matrix(m, k) || !matrix(n, k) ||
      !matrix(largest(largest(m, n), k), r))
    return 0;
  static const float some = 0;
  pk_weight w{};
  w.data = w.code = &some;  // a 4-bit weight, so that there is room for either engine
  w.blocksize = 64;
  pk_lora lora{};
  lora.r = r;
  lora.dropout_threshold = r != 0;  // room for a mask
  const int64_t gemv = base && m <= 64 ? gemv_floats(m, n, k, r) : 0;
  return bytes_of(
      largest(gemv, group_floats(Single(base ? &w : nullptr, lora, m, n, k).group(), m, threads)));
}

// single: one linear, whose caller was told a scratch by its sizes alone.
int64_t needed_bytes(const Group& g, int64_t m, int threads, bool single) {
  const int64_t r = g.adapter_count ? g.adapters[0].lora.r : 0;
  return single ? single_scratch_bytes(g.base(), m, g.n(), g.k(), r, threads)
                : bytes_of(group_floats(g, m, threads));
}

}  // namespace
