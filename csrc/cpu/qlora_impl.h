// QLoRA linears on one input, forward and dx, from the engine's pieces. See docs/math.md, and
// docs/cpu-engine.md for the order of passes.
#pragma once
#include "dora_norm.h"
#include "gemm_impl.h"
#include "gemv_impl.h"
#include "group.h"
#include "dropout_impl.h"
#include "cores.h"

namespace PK_NS {

static const float* as_float(const void* p, int dtype, int64_t count, float* out) {
  if (!p || dtype == PK_F32) return (const float*)p;
  if (dtype == PK_BF16) convert((const bf16*)p, count, out);
  else convert((const f16*)p, count, out);
  return out;
}

static inline void clear(float* p, int64_t count) { memset(p, 0, (size_t)count * sizeof(float)); }

// Scratch of one call, laid out by pk::Plan. The adapters in fp32: where they are stored so, where they are.
struct Scratch {
  const pk::Plan& plan;
  const pk::Group& group;
  float* base;
  int64_t r;
  float* pack(int64_t panel) const { return base + plan.pack_at + panel * LANES * plan.contraction; }
  float* low_rank(int64_t panel, int64_t at) const {
    return base + plan.low_rank_at + (panel * r + at) * LANES;
  }
  float* own() const { return base + plan.own_at + thread_id() * plan.own_size; }
  float* own_decoded() const { return own(); }
  float* own_c() const { return own() + plan.decoded_size; }
  float* own_tmp() const { return own() + plan.decoded_size + plan.c_size; }
  float* own_cross() const { return own_tmp() + plan.tmp_size; }
  const float* lora_a(const pk_adapter& a, const pk::Cursor& at) const {
    return a.lora.dtype == PK_F32 ? (const float*)a.lora.lora_a : base + plan.lora_a_at + at.lora_a;
  }
  const float* lora_b(const pk_adapter& a, const pk::Cursor& at) const {
    return a.lora.dtype == PK_F32 ? (const float*)a.lora.lora_b : base + plan.lora_b_at + at.lora_b;
  }
  // The bits of an adapter's mask from column `col` on, rows plan.mask_ld bytes apart; null where the plan
  // keeps none.
  uint8_t* mask(const pk::Cursor& at, int64_t row, int64_t col) const {
    return plan.mask_ld ? (uint8_t*)(base + plan.mask_at) + (at.masked + row) * plan.mask_ld + col / 8
                        : nullptr;
  }
  const float* bias(int64_t member, int64_t n_before) const {
    const pk_member& m = group.members[member];
    return !m.bias || m.bias_dtype == PK_F32 ? (const float*)m.bias : base + plan.bias_at + n_before;
  }
  void convert_operands() const {
    pk::Cursor at;
    for (int64_t i = 0; i < group.adapter_count; at.pass(group, group.adapters[i++])) {
      const pk_adapter& a = group.adapters[i];
      as_float(a.lora.lora_a, a.lora.dtype, a.lora.r * group.k(), base + plan.lora_a_at + at.lora_a);
      as_float(a.lora.lora_b, a.lora.dtype, a.lora.r * group.n_of(a), base + plan.lora_b_at + at.lora_b);
    }
    for (int64_t i = 0, n = 0; i < group.count; n += group.members[i++].weight.n)
      as_float(group.members[i].bias, group.members[i].bias_dtype, group.members[i].weight.n,
               base + plan.bias_at + n);
  }
};

static Scratch make_scratch(const pk::Plan& plan, const pk::Group& group, float* base) {
  Scratch s{plan, group, base, group.operands().r};
  s.convert_operands();
  return s;
}

// Which of a group's adapters a pass projects onto: those of one member, or (forward) all.
constexpr int64_t ALL = -1;
static inline bool takes_part(const pk_adapter& a, int64_t member, const pk::Lanes& lanes) {
  return (member == ALL || a.member == member) && lanes.from < lanes.to && a.lora.r;
}

// c [rows][0 ... LANES) times scale [rows].
static void scale_rows(float* c, int64_t ldc, int64_t rows, const float* scale) {
  for (int64_t j = 0; j < rows; j++)
    for (int half = 0; half < LANES; half += VW)
      store(c + j * ldc + half, load(c + j * ldc + half) * set1(scale[j]));
}

// One panel of src [rows][cols] -> packed [cols][LANES] (may be null) and, for each adapter, low[j][LANES] =
// A src^T (forward, dropped) or B^T src^T (backward, a scaled member's columns of src times their scale) for
// its r rows.
template <typename T>
static void pack_and_project(const Scratch& s, bool forward, int64_t member, const T* src, int64_t row,
                             int64_t rows, int64_t cols, int64_t panel, float* packed) {
  const pk::Group& g = s.group;
  float* tmp = s.own_tmp();
  const float* scale = forward ? nullptr : g.members[member].scale;
  for (int64_t from = 0; from < cols; from += pk::KC) {
    const int64_t count = smaller(pk::KC, cols - from);
    const T* at = src + row * cols + from;
    float* chunk = packed ? packed + from * LANES : tmp + pk::KC * LANES;
    bool have = false;
    const auto pack = [&] {
      if (have) return;
      pack_transposed(at, cols, rows, count, chunk);
      if (scale) scale_rows(chunk, LANES, count, scale + from);
      have = true;
    };
    if (packed) pack();
    pk::Cursor cursor;
    for (int64_t i = 0; i < g.adapter_count; cursor.pass(g, g.adapters[i++])) {
      const pk_adapter& a = g.adapters[i];
      const int64_t r = a.lora.r;
      const pk::Lanes lanes = pk::lanes_of(a, row, rows);
      if (!takes_part(a, member, lanes)) continue;
      float *low = s.low_rank(panel, cursor.r), *operand = chunk;
      if (from == 0) clear(low, r * LANES);
      pack();
      if (forward && a.lora.dropout_threshold) {
        uint8_t bits[LANES * pk::KC / 8];
        const Dropout d = make_dropout(a.lora.dropout_threshold, a.lora.seed);
        draw_bits(d, row + lanes.from - a.row_begin, from, lanes.to - lanes.from, count, bits, pk::KC / 8);
        mask_panel<false>(bits, pk::KC / 8, lanes.from, lanes.to, d.scale, count, chunk, operand = tmp,
                          LANES);
      }
      if (forward)
        multiply({s.lora_a(a, cursor) + from, cols, 1}, r, operand, count, low, LANES, LOW_RANK_CHAIN);
      else multiply({s.lora_b(a, cursor) + from * r, 1, r}, r, operand, count, low, LANES, LOW_RANK_CHAIN);
    }
  }
}

// The projections of one panel, scaled -> `to` [rows of the adapter, r] (xa before the scaling, dyb after
// it); zero for other adapters' rows.
static void store_projections(const Scratch& s, bool forward, int64_t member, int64_t row, int64_t rows,
                              int64_t panel) {
  const pk::Group& g = s.group;
  pk::Cursor cursor;
  for (int64_t i = 0; i < g.adapter_count; cursor.pass(g, g.adapters[i++])) {
    const pk_adapter& a = g.adapters[i];
    const pk::Lanes lanes = pk::lanes_of(a, row, rows);
    if (!takes_part(a, member, lanes)) continue;
    const int64_t r = a.lora.r, at = (row + lanes.from - a.row_begin) * r;
    float* low = s.low_rank(panel, cursor.r);
    if (forward)
      store_transposed(low + lanes.from, LANES, r, lanes.to - lanes.from, nullptr, a.xa + at, r, false);
    for (int64_t j = 0; j < r; j++)
      for (int64_t l = 0; l < LANES; l++)
        low[j * LANES + l] = l >= lanes.from && l < lanes.to ? low[j * LANES + l] * a.lora.scaling : 0.0f;
    if (!forward && a.dyb)
      store_transposed(low + lanes.from, LANES, r, lanes.to - lanes.from, nullptr, a.dyb + at, r, false);
  }
}

// The rows of a task, [from, from + size) of all members' rows, are of one member or of several:
// `part(member, n0, size, before, offset)` gets each stretch, its first row within the member, the rows of
// earlier members and those before it in the task.
template <typename F>
static void for_each_part(const pk::Group& g, int64_t from, int64_t size, F part) {
  for (int64_t i = 0, before = 0; i < g.count; before += g.members[i++].weight.n) {
    const int64_t begin = from > before ? from : before,
                  end = smaller(from + size, before + g.members[i].weight.n);
    if (begin < end) part(i, begin - before, end - begin, before, begin - from);
  }
}

static inline Table table_of(const pk_weight& w) { return w.code ? make_table(w.code) : Table{}; }

// c [size][ldc] of a task's rows += scaling * B xa^T of every adapter whose rows the panel holds.
static void add_low_rank(const Scratch& s, int64_t member, int64_t n0, int64_t size, int64_t row,
                         int64_t rows, int64_t panel, float* c) {
  const pk::Group& g = s.group;
  pk::Cursor cursor;
  for (int64_t i = 0; i < g.adapter_count; cursor.pass(g, g.adapters[i++])) {
    const pk_adapter& a = g.adapters[i];
    const int64_t r = a.lora.r;
    if (!takes_part(a, member, pk::lanes_of(a, row, rows))) continue;
    multiply({s.lora_b(a, cursor) + n0 * r, r, 1}, size, s.low_rank(panel, cursor.r), r, c, s.plan.ldc,
             LOW_RANK_CHAIN);
  }
}

// The members whose norm is wanted: `part(adapter, cursor, gram)` gets the one adapter of each, and its A A^T
// [r][rank_ld].
template <typename F>
static void for_each_norm(const Scratch& s, F part) {
  const pk::Group& g = s.group;
  pk::Cursor at;
  float* gram = s.base + s.plan.gram_at;
  for (int64_t i = 0; i < g.adapter_count; at.pass(g, g.adapters[i++])) {
    const pk_adapter& a = g.adapters[i];
    if (!g.members[a.member].norm) continue;
    part(a, at, gram);
    gram += a.lora.r * pk::rank_ld(a.lora.r);
  }
}

static inline int64_t rank_panels(const pk_adapter& a) { return (a.lora.r + LANES - 1) / LANES; }

// LANES columns of A A^T: panel `index` of those of all norms.
static void gram_panel(const Scratch& s, int64_t index) {
  const int64_t k = s.group.k();
  for_each_norm(s, [&](const pk_adapter& a, const pk::Cursor& at, float* gram) {
    const int64_t r = a.lora.r, ld = pk::rank_ld(r), first = index * LANES;
    const bool here = index >= 0 && index < rank_panels(a);
    index -= rank_panels(a);
    if (!here) return;
    const float* lora_a = s.lora_a(a, at);
    for (int64_t j = 0; j < r; j++) clear(gram + j * ld + first, LANES);
    for (int64_t from = 0; from < k; from += pk::KC) {
      const int64_t count = smaller(pk::KC, k - from);
      pack_transposed(lora_a + first * k + from, k, smaller(LANES, r - first), count, s.own_tmp());
      multiply({lora_a + from, k, 1}, r, s.own_tmp(), count, gram + first, ld, LOW_RANK_CHAIN);
    }
  });
}

// cross [rows][cross_ld] += W A^T over columns [from, from + count) of W, decoded: A's rows are one more
// panel of activations.
static void add_cross(const Scratch& s, int64_t member, const float* decoded, int64_t rows, int64_t from,
                      int64_t count, float* cross) {
  const int64_t k = s.group.k();
  for_each_norm(s, [&](const pk_adapter& a, const pk::Cursor& at, float*) {
    for (int64_t q = 0; a.member == member && q < a.lora.r; q += LANES) {
      pack_transposed(s.lora_a(a, at) + q * k + from, k, smaller(LANES, a.lora.r - q), count, s.own_tmp());
      multiply({decoded, pk::LD_FWD, 1}, rows, s.own_tmp(), count, cross + q, s.plan.cross_ld);
    }
  });
}

// norm and scale of a member's rows [n0, n0 + rows).
static void store_norms(const Scratch& s, int64_t member, int64_t n0, int64_t rows, const float* cross) {
  const pk_member& m = s.group.members[member];
  for_each_norm(s, [&](const pk_adapter& a, const pk::Cursor& at, const float* gram) {
    const int64_t r = a.lora.r;
    const float* b = s.lora_b(a, at);
    for (int64_t i = n0; a.member == member && i < n0 + rows; i++) {
      m.norm[i] = row_norm(b + i * r, r, a.lora.scaling, cross + (i - n0) * s.plan.cross_ld, 1, gram,
                           pk::rank_ld(r), m.squares[i]);
      m.scale[i] = m.magnitude[i] / m.norm[i];
    }
  });
}

// y_i = x W_i^T + sum of scaling * xa B^T + bias_i, by blocks of rows of x; without base products y_i is
// added to.
template <typename T>
static void forward_gemm(const pk::Plan& plan, const pk::Group& g, const T* x, int64_t m, float* scratch,
                         int threads) {
  const Scratch s = make_scratch(plan, g, scratch);
  const int64_t k = g.k(), n = g.n(), blocks = (n + plan.block - 1) / plan.block;
  const bool base = g.base();
  int64_t grams = 0;
  for_each_norm(s, [&](const pk_adapter& a, const pk::Cursor&, float*) { grams += rank_panels(a); });
  for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
    const int64_t rows = smaller(plan.mc, m - m0), panels = (rows + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < panels + grams; task++) {
      const int64_t p = task - grams, row = m0 + p * LANES, count = smaller(LANES, m - row);
      if (p < 0) {
        gram_panel(s, task);
        continue;
      }
      pack_and_project(s, true, ALL, x, row, count, k, p, base ? s.pack(p) : nullptr);
      store_projections(s, true, ALL, row, count, p);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t from_row = block * plan.block, size = smaller(plan.block, n - from_row);
      float *c = s.own_c(), *decoded = s.own_decoded(), *cross = s.own_cross();
      clear(c, size * plan.ldc);
      if (grams) clear(cross, size * plan.cross_ld);
      for (int64_t from = 0; base && from < k; from += pk::KC) {
        const int64_t count = smaller(pk::KC, k - from);
        for_each_part(g, from_row, size, [&](int64_t i, int64_t n0, int64_t part, int64_t, int64_t offset) {
          const pk_weight& w = g.members[i].weight;
          decode_pieces(w, table_of(w), n0, part, from, count, decoded + offset * pk::LD_FWD, pk::LD_FWD);
          if (grams)
            add_cross(s, i, decoded + offset * pk::LD_FWD, part, from, count, cross + offset * plan.cross_ld);
        });
        for (int64_t p = 0; p < panels; p++)
          multiply({decoded, pk::LD_FWD, 1}, size, s.pack(p) + from * LANES, count, c + p * LANES, plan.ldc);
      }
      for_each_part(g, from_row, size,
                    [&](int64_t i, int64_t n0, int64_t part, int64_t before, int64_t offset) {
                      const int64_t width = g.members[i].weight.n;
                      const float* bias = s.bias(i, before);
                      if (grams) store_norms(s, i, n0, part, cross + offset * plan.cross_ld);
                      for (int64_t p = 0; p < panels; p++) {
                        const int64_t row = m0 + p * LANES, count = smaller(LANES, m - row);
                        float* at = c + offset * plan.ldc + p * LANES;
                        add_low_rank(s, i, n0, part, row, count, p, at);
                        const pk_member& member = g.members[i];
                        if (member.scale && member.u)
                          store_transposed(at, plan.ldc, part, count, nullptr,
                                           (T*)member.u + row * width + n0, width, false);
                        if (member.scale) scale_rows(at, plan.ldc, part, member.scale + n0);
                        store_transposed(at, plan.ldc, part, count, bias ? bias + n0 : nullptr,
                                         (T*)g.members[i].y + row * width + n0, width, !base);
                      }
                    });
    }
    grams = 0;  // the first block of rows has the norms
  }
}

// c [size][ldc] of one panel += drop(dyb A)^T of every adapter; what is drawn for it stays in scratch for
// d_lora_a. columns: [size][LANES].
static void add_low_rank_dx(const Scratch& s, int64_t k0, int64_t size, int64_t row, int64_t rows,
                            int64_t panel, float* c, float* columns) {
  const pk::Group& g = s.group;
  const int64_t k = g.k();
  pk::Cursor cursor;
  for (int64_t i = 0; i < g.adapter_count; cursor.pass(g, g.adapters[i++])) {
    const pk_adapter& a = g.adapters[i];
    const pk::Lanes lanes = pk::lanes_of(a, row, rows);
    if (!takes_part(a, ALL, lanes)) continue;
    const Rows at = {s.lora_a(a, cursor) + k0, 1, k};
    const float* low = s.low_rank(panel, cursor.r);
    if (!a.lora.dropout_threshold) {
      multiply(at, size, low, a.lora.r, c, s.plan.ldc, LOW_RANK_CHAIN);
      continue;
    }
    clear(columns, size * LANES);
    multiply(at, size, low, a.lora.r, columns, LANES, LOW_RANK_CHAIN);
    constexpr int64_t LD = pk::MAX_BLOCK / 8;
    uint8_t bits[LANES * LD];
    const int64_t first = row + lanes.from - a.row_begin, count = lanes.to - lanes.from;
    const Dropout d = make_dropout(a.lora.dropout_threshold, a.lora.seed);
    draw_bits(d, first, k0, count, size, bits, LD);
    for (int64_t l = 0; s.plan.mask_ld && l < count; l++)
      memcpy(s.mask(cursor, first + l, k0), bits + l * LD, (size_t)(size + 7) / 8);
    mask_panel<true>(bits, LD, lanes.from, lanes.to, d.scale, size, columns, c, s.plan.ldc);
  }
}

// dyb = scaling * dy B and, where dx is wanted, dx = sum of dy_i W_i + drop(dyb A); without base products dx
// is added to.
template <typename T>
static void backward_dx(const pk::Plan& plan, const pk::Group& g, int64_t m, T* dx, float* scratch,
                        int threads) {
  const Scratch s = make_scratch(plan, g, scratch);
  const int64_t k = g.k(), blocks = dx ? (k + plan.block - 1) / plan.block : 0;
  const bool base = g.base() && dx;
  for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
    const int64_t rows = smaller(plan.mc, m - m0), panels = (rows + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t row = m0 + p * LANES, count = smaller(LANES, m - row);
      for (int64_t i = 0, before = 0; i < g.count; before += g.members[i++].weight.n) {
        pack_and_project(s, false, i, (const T*)g.members[i].dy, row, count, g.members[i].weight.n, p,
                         base ? s.pack(p) + before * LANES : nullptr);
        store_projections(s, false, i, row, count, p);
      }
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t k0 = block * plan.block, size = smaller(plan.block, k - k0), ld = plan.block + pk::PAD;
      float *c = s.own_c(), *decoded = s.own_decoded(), *tmp = s.own_tmp();
      clear(c, size * plan.ldc);
      for (int64_t i = 0, before = 0; base && i < g.count; before += g.members[i++].weight.n) {
        const pk_weight& w = g.members[i].weight;
        const Table table = table_of(w);
        for (int64_t from = 0; from < w.n; from += pk::KC) {
          const int64_t count = smaller(pk::KC, w.n - from);
          decode_pieces(w, table, from, count, k0, size, decoded, ld);
          for (int64_t p = 0; p < panels; p++)
            multiply({decoded, 1, ld}, size, s.pack(p) + (before + from) * LANES, count, c + p * LANES,
                     plan.ldc);
        }
      }
      for (int64_t p = 0; p < panels; p++) {
        const int64_t row = m0 + p * LANES, lanes = smaller(LANES, m - row);
        T* out = dx + row * k + k0;
        add_low_rank_dx(s, k0, size, row, lanes, p, c + p * LANES, tmp);
        store_transposed(c + p * LANES, plan.ldc, size, lanes, nullptr, out, k, !g.base());
      }
    }
  }
}

}  // namespace PK_NS
