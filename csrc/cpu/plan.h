// How a large product is blocked and what scratch that takes: plain arithmetic, the same on every ISA, tested
// on its own.
#pragma once
#include "../host_device.h"

namespace pk {

// Contraction steps a pass: a panel's piece (KC x lanes) stays in the first-level cache.
constexpr int64_t KC = 256;
// Floats after each decoded row, so that rows do not share cache sets.
constexpr int64_t PAD = 16;
constexpr int64_t LD_FWD = KC + PAD;
// Output rows a task: its decoded piece (192 x 256 floats) fits the second-level cache.
constexpr int64_t MAX_BLOCK = 192;
constexpr int64_t PACK_FLOATS = 5 << 18;  // 5 MB of packed activations at most, where that allows one panel
// Rows of x a pass, so that a task's accumulators fit the second-level cache.
constexpr int64_t MAX_ROWS_BLOCK = 512;
constexpr int64_t STRIP_PANELS = 4,
                  STRIP_ROWS = KC + KC / 2;  // of a strip's columns; rows packed, in bf16 tiles two pieces
// Dropout masks kept as bits from dx to dA, a call; what needs more is drawn twice.
constexpr int64_t MASK_BYTES = 5 << 18;
constexpr int64_t MAX_LANES = 32, ALIGN = 16;

struct Plan {
  // mc: rows of x a pass, ldc apart in a task's sums; block: output rows a task.
  int64_t contraction, mc, ldc, block;
  int64_t pack_at, low_rank_at, lora_a_at, lora_b_at, bias_at, own_at;  // offsets in floats
  // DoRA's norms: A A^T of each, and floats a row of a task's W A^T.
  int64_t gram_at, cross_ld;
  int64_t decoded_size, c_size, tmp_size, own_size, total;
  // Bits of the dropped adapters' rows, mask_ld bytes each; 0: none.
  int64_t mask_at, mask_ld;
};

// Floats between rows of x that the product for few rows has prepared: whole steps of 128 columns.
static inline int64_t gemv_ld(int64_t k) { return round_up(k, 128); }

// What a call holds in scratch besides the activations: the low-rank branches' rows together, their adapters
// and biases in fp32. dropped_rows: of the adapters whose masks are kept from one use to the next. gram:
// DoRA's A A^T together; cross: the largest rank_ld of these.
struct Operands {
  int64_t r, lora_a, lora_b, bias, dropped_rows = 0, gram = 0, cross = 0;
};

// Floats between rows that hold a value for each of r ranks: whole panels.
static inline int64_t rank_ld(int64_t r) { return round_up(r, MAX_LANES); }

// outputs: rows of the product (all n forward, k backward); contraction: the other one, or 0 where there is
// no base product. `unit`: what a task's rows are a multiple of: 48 backward (whole tiles of 6 and 12, whole
// vectors, whole nibble words), 12 forward, where rows are only ever broadcast (whole tiles).
static inline Plan make_plan(int64_t m, int64_t outputs, int64_t contraction, const Operands& held,
                             int64_t unit, int64_t lanes, int threads) {
  Plan p{};
  p.contraction = contraction;
  int64_t limit = contraction ? PACK_FLOATS / contraction / lanes * lanes : MAX_ROWS_BLOCK;
  limit = limit < lanes ? lanes : limit > MAX_ROWS_BLOCK ? MAX_ROWS_BLOCK : limit;
  const int64_t rows = m < 1 ? 1 : m;
  p.mc = round_up(ceil_div(rows, ceil_div(rows, limit)), lanes);
  p.ldc = p.mc + PAD;
  // Equal tasks, a whole number of them for each thread.
  const int64_t rounds = largest(1, ceil_div(outputs, threads * MAX_BLOCK));
  p.block = largest(unit, round_up(ceil_div(outputs, threads * rounds), unit));
  if (p.block > MAX_BLOCK) p.block = MAX_BLOCK;
  p.decoded_size = round_up(largest(p.block * LD_FWD, KC * (p.block + PAD)), ALIGN);
  p.c_size = round_up(p.block * p.ldc, ALIGN);
  p.tmp_size = 2 * KC * lanes;
  p.cross_ld = held.cross;
  const int64_t gradient = held.r * STRIP_PANELS * lanes + STRIP_ROWS * lanes;
  p.own_size =
      round_up(largest(p.decoded_size + p.c_size + p.tmp_size + p.block * p.cross_ld, gradient), ALIGN);
  int64_t at = 0;
  auto take = [&at](int64_t size) {
    int64_t here = at;
    at += round_up(size, ALIGN);
    return here;
  };
  p.pack_at = take(p.mc * contraction);
  p.low_rank_at = take(p.mc * held.r);
  p.lora_a_at = take(held.lora_a);
  p.lora_b_at = take(held.lora_b);
  p.bias_at = take(held.bias);
  p.gram_at = take(held.gram);
  p.own_at = take(p.own_size * threads);
  const int64_t mask_ld = round_up(outputs, 64) / 8;
  p.mask_ld = held.dropped_rows && mask_ld <= MASK_BYTES / held.dropped_rows ? mask_ld : 0;
  p.mask_at = take(held.dropped_rows * p.mask_ld / 4);
  p.total = at;
  return p;
}

}  // namespace pk
