// A group of linears that share their input, as the engine sees it: members side by side, each with its
// low-rank branches. One linear is a group of one. Plain arithmetic, the same on every ISA.
#pragma once
#include "../include/peftkern.h"
#include "plan.h"

namespace pk {

struct Group {
  const pk_member* members;
  int64_t count;
  const pk_adapter* adapters;
  int64_t adapter_count;

  int64_t k() const { return members[0].weight.k; }
  // Of one, of all: checked by the dispatcher.
  bool base() const { return members[0].weight.data != nullptr; }
  int64_t n() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += members[i].weight.n;
    return total;
  }
  int64_t n_of(const pk_adapter& a) const { return members[a.member].weight.n; }
  bool wants(void* pk_adapter::* gradient) const {
    for (int64_t i = 0; i < adapter_count; i++)
      if (adapters[i].*gradient) return true;
    return false;
  }
  bool wants_columns() const {  // anything summed over the rows of a dy
    for (int64_t i = 0; i < count; i++)
      if (members[i].d_bias || members[i].d_scale) return true;
    return wants(&pk_adapter::d_lora_b);
  }
  Operands operands() const {
    Operands held{0, 0, 0, n()};
    for (int64_t i = 0; i < adapter_count; i++) {
      const int64_t r = adapters[i].lora.r;
      held.r += r, held.lora_a += r * k(), held.lora_b += r * n_of(adapters[i]);
    }
    return held;
  }
  // With what DoRA's norms take besides.
  Operands forward_operands() const {
    Operands held = operands();
    for (int64_t i = 0; i < adapter_count; i++) {
      const int64_t r = adapters[i].lora.r;
      if (members[adapters[i].member].norm)
        held.gram += r * rank_ld(r), held.cross = largest(held.cross, rank_ld(r));
    }
    return held;
  }
  // Where dx and some dA are wanted, backward needs each mask twice.
  Operands backward_operands(bool dx) const {
    Operands held = operands();
    for (int64_t i = 0; dx && i < adapter_count; i++) held.dropped_rows += masked_rows(adapters[i]);
    return held;
  }
  static int64_t masked_rows(const pk_adapter& a) {
    return a.lora.dropout_threshold && a.row_end > a.row_begin ? a.row_end - a.row_begin : 0;
  }
  Plan forward_plan(int64_t m, int64_t lanes, int threads) const {
    return make_plan(m, n(), base() ? k() : 0, forward_operands(), 12, lanes, threads);
  }
  Plan backward_plan(int64_t m, bool dx, int64_t lanes, int threads) const {
    return make_plan(m, k(), base() && dx ? n() : 0, backward_operands(dx), 48, lanes, threads);
  }
};

// Where an adapter's rows, A, B and mask begin among those of all; moved on by `pass`.
struct Cursor {
  int64_t r = 0, lora_a = 0, lora_b = 0, masked = 0;
  void pass(const Group& g, const pk_adapter& a) {
    r += a.lora.r, lora_a += a.lora.r * g.k(), lora_b += a.lora.r * g.n_of(a),
        masked += Group::masked_rows(a);
  }
};

// The lanes [from, to) of a panel of `count` rows from `row` on that an adapter applies to; empty where from
// >= to.
struct Lanes {
  int64_t from, to;
};
static inline Lanes lanes_of(const pk_adapter& a, int64_t row, int64_t count) {
  const int64_t from = a.row_begin - row, to = a.row_end - row;
  return {from > 0 ? from : 0, to < count ? to : count};
}

}  // namespace pk
