// A head's product and cross-entropy in bf16 tiles, without logits: the C function.
// linear_cross_entropy_impl.h has the kernel.
#pragma once
#include "ops.h"
#include "tile_plan.h"

namespace pk {

struct LinearCrossEntropy {
  const pk_weight& w;
  const void* x;  // bf16 [m, k]
  int64_t m;
  const int64_t* labels;   // [m]
  const float* row_scale;  // [m], or null
  float z_loss;
  float* loss;  // [m]
  void* dx;     // bf16 [m, k], or null
  float* scratch;
};

constexpr int64_t LOSS_PANELS = 16;  // of 32 rows, for which a task packs the weight once
constexpr int64_t LOSS_BLOCKS = 8;   // of 32 words, whose logits it holds at a time
// Ranges into which the words are cut at most, so that few rows fill the threads, and floats of their sums,
// unless two ranges have more.
constexpr int64_t LOSS_RANGES = 8, LOSS_FLOATS = 8 << 20;

// A row panel's softmax over a range of words: of each row its largest logit and the sum of exp(logit -
// largest), and the sum of exp(logit - largest) W, [k / 32] blocks. All without the label, whose share would
// hide what is left of a row that is almost certain.
struct LossPlan {
  int64_t panels, steps, tasks_of_rows, ranges, range_blocks;
  int64_t pack_at, labelled_at, sums_at, state_at, own_at, own_size, total;  // in floats
};

static inline LossPlan loss_plan(int64_t m, int64_t n, int64_t k, bool gradient, int threads) {
  LossPlan p{};
  p.panels = panels_of(m), p.steps = panels_of(k);
  p.tasks_of_rows = ceil_div(p.panels, LOSS_PANELS);
  const int64_t blocks = panels_of(n);
  const int64_t hold = LOSS_FLOATS / largest(1, p.panels * p.steps * STEP);
  const int64_t most = hold < 2 ? 2 : smaller(hold, LOSS_RANGES);
  p.range_blocks = round_up(ceil_div(blocks, most), LOSS_BLOCKS);
  p.ranges = ceil_div(blocks, p.range_blocks);
  p.labelled_at = p.panels * p.steps * STEP / 2;
  p.state_at = p.labelled_at + p.panels * SIDE;
  p.sums_at = p.state_at + p.ranges * p.panels * 2 * SIDE;
  p.own_at = p.sums_at + (gradient ? p.ranges * p.panels * p.steps * STEP : 0);
  const int64_t b = (CHUNK > LOSS_BLOCKS ? CHUNK : LOSS_BLOCKS) * STEP / 2;
  p.own_size = b + LOSS_PANELS * LOSS_BLOCKS * STEP + LOSS_BLOCKS * STEP / 2 * LOSS_PANELS;
  p.own_size = largest(p.own_size, round_up(k, ALIGN));
  p.total = p.own_at + p.own_size * threads;
  return p;
}

// A weight of bf16, or a 4-bit one that tiles take.
static inline bool loss_takes(const pk_weight& w) {
  return w.code ? w.blocksize >= 64 && w.k % 64 == 0 : w.dtype == PK_BF16;
}

}  // namespace pk

#if defined(PK_NS) && defined(PK_AVX512BF16)
#include "linear_cross_entropy_impl.h"
#elif defined(PK_NS)  // no bf16 products on this level
namespace PK_NS {
static constexpr void (*linear_cross_entropy)(const pk::LinearCrossEntropy&, int) = nullptr;
}  // namespace PK_NS
#else
#include "entry.h"

extern "C" {

int64_t pk_linear_cross_entropy_scratch_bytes(int64_t m, int64_t n, int64_t k, int gradient, int threads) {
  if (m < 0 || n < 1 || k < 1 || !matrix(m, k) || !matrix(m, n) || !matrix(n, k)) return 0;
  return bytes_of(loss_plan(m, n, k, gradient != 0, threads_or_default(threads)).total);
}

int pk_linear_cross_entropy_cpu(const pk_weight* w, const void* x, int64_t m, const int64_t* labels,
                                const float* row_scale, float z_loss, float* loss, void* dx, void* scratch,
                                int64_t scratch_bytes, int threads) {
  if (!current->linear_cross_entropy) return PK_ERR_ISA;
  if (int bad = check_weight(w)) return bad;
  if (!w->code && w->dtype != PK_BF16) return PK_ERR_DTYPE;
  if (w->n < 1 || m < 0 || !matrix(m, w->k) || !matrix(m, w->n)) return PK_ERR_SHAPE;
  if (!loss_takes(*w)) return PK_ERR_BLOCKSIZE;
  if (m == 0) return PK_OK;
  if (!x || !labels || !loss || !scratch) return PK_ERR_NULL;
  for (int64_t i = 0; i < m; i++)
    if (labels[i] < 0 || labels[i] >= w->n) return PK_ERR_SHAPE;
  if (scratch_bytes < pk_linear_cross_entropy_scratch_bytes(m, w->n, w->k, dx != nullptr, threads))
    return PK_ERR_SCRATCH;
  current->linear_cross_entropy({*w, x, m, labels, row_scale, z_loss, loss, dx, aligned(scratch)},
                                threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
