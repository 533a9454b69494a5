// The adapters', biases' and scales' gradients, and the whole backward pass of a group.
#pragma once
#include "qlora_impl.h"
#include "scale_columns.h"
#if defined(PK_AVX512BF16)
#include "tile_gradients.h"
#endif

namespace PK_NS {

constexpr int64_t STRIP = pk::STRIP_PANELS * LANES;

// What strips of columns of one matrix yield: of x the d_lora_a of all adapters, of a member's dy the
// d_lora_b of its own, d_bias and d_scale.
template <typename T>
struct Source {
  const T* data;
  int64_t cols, member;  // member ALL: x
  // Of bf16 tiles, may be null: `low` of the adapters it takes as A, and the rows, packed, panels so far
  // apart.
  const T *slots = nullptr, *tiles = nullptr;
  int64_t panel = 0;
  bool takes(const pk_adapter& a) const {
    return member == ALL ? a.d_lora_a != nullptr : a.member == member && a.d_lora_b;
  }
  const float* low(const pk_adapter& a) const { return member == ALL ? a.dyb : a.xa; }
  bool drops(const pk_adapter& a) const { return member == ALL && a.lora.dropout_threshold; }
};

// out = scale * c [r][STRIP], a strip of `width` columns from c0 on: as [r, cols], or as [cols, r] where
// `transposed`.
template <typename G>
static void store_gradient(float* c, int64_t r, int64_t c0, int64_t width, int64_t cols, float scale,
                           bool transposed, G* out) {
  if (!transposed) return store_rows(c, STRIP, r, width, scale, out + c0, cols);
  for (int64_t i = 0; i < r * STRIP; i++) c[i] *= scale;
  for (int64_t q = 0; q < width; q += LANES)
    store_transposed(c + q, STRIP, r, smaller(LANES, width - q), nullptr, out + (c0 + q) * r, r, false);
}

template <typename T>
static void store_gradients(const pk::Group& g, const Source<T>& src, float* c, int64_t c0, int64_t width) {
  const bool b = src.member != ALL;
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const pk_adapter& a = g.adapters[i];
    if (!src.takes(a)) continue;
    const float scale = b ? a.lora.scaling : 1.0f;
    void* out = b ? a.d_lora_b : a.d_lora_a;
    const float* by_column = b ? g.members[a.member].scale : nullptr;  // of dy, whose strips are not scaled
    for (int64_t j = 0; by_column && j < a.lora.r; j++)
      for (int64_t q = 0; q < width; q++) c[j * STRIP + q] *= by_column[c0 + q];
    if (a.lora.dtype == PK_F32) store_gradient(c, a.lora.r, c0, width, src.cols, scale, b, (float*)out);
    else if (a.lora.dtype == PK_BF16) store_gradient(c, a.lora.r, c0, width, src.cols, scale, b, (bf16*)out);
    else store_gradient(c, a.lora.r, c0, width, src.cols, scale, b, (f16*)out);
    c += a.lora.r * STRIP;
  }
}

// The mask of the rows [m0, m0 + count) of a strip, as bits: from the first row that the adapter applies to.
struct Mask {
  const uint8_t* bits;
  int64_t ld;
  float scale;
};

// c of the adapters without dropout, or of `only` with its mask, += low^T (rows [m0, m0 + count) of the
// strip).
template <typename T>
static void accumulate(const pk::Group& g, const Source<T>& src, const pk_adapter* only, const Mask& mask,
                       const T* rows, int64_t m0, int64_t count, int64_t width, float* buffer, float* c) {
  const pk::Lanes masked = only ? pk::lanes_of(*only, m0, count) : pk::Lanes{};
  for (int64_t q = 0; q < width; q += LANES) {
    if (!only) pack_rows(rows + q, src.cols, count, width - q, buffer);
    else
      pack_masked_rows(mask.bits + q / 8, mask.ld, mask.scale, rows + masked.from * src.cols + q, src.cols,
                       masked.to - masked.from, width - q, buffer + masked.from * LANES);
    float* at = c;
    for (int64_t i = 0; i < g.adapter_count; i++) {
      const pk_adapter& a = g.adapters[i];
      if (!src.takes(a)) continue;
      const pk::Lanes span = pk::lanes_of(a, m0, count);
      const int64_t r = a.lora.r;
      if (span.from < span.to && (only ? only == &a : !src.drops(a)))
        multiply({src.low(a) + (m0 + span.from - a.row_begin) * r, 1, r}, r, buffer + span.from * LANES,
                 span.to - span.from, at + q, STRIP, LOW_RANK_CHAIN);
      at += r * STRIP;
    }
  }
}

#if defined(PK_AVX512BF16)
// The same in tiles. What the products of a pass have left behind saves work where rows begin with a step.
static void accumulate(const pk::Group& g, const Source<bf16>& src, const pk_adapter* only, const Mask& mask,
                       const bf16* rows, int64_t m0, int64_t count, int64_t width, float* buffer, float* c) {
  bf16 *a = (bf16*)buffer, *b = a + GRADIENT_STEPS * STEP;
  const bf16* next = src.slots;
  for (int64_t i = 0; i < g.adapter_count; i++) {
    const pk_adapter& adapter = g.adapters[i];
    const pk::Lanes span = pk::lanes_of(adapter, m0, count);
    const int64_t r = adapter.lora.r, size = span.to - span.from, row = m0 + span.from - adapter.row_begin;
    const int64_t steps = pk::panels_of(adapter.row_end - adapter.row_begin),
                  blocks = slot_blocks(adapter.lora);
    const bf16* slots = next;
    if (next) next += steps * blocks * STEP;
    if (!src.takes(adapter)) continue;
    if (size > 0 && (only ? only == &adapter : !src.drops(adapter))) {
      RowSource from = {rows + span.from * src.cols, src.cols, SIDE * src.cols, only ? mask.bits : nullptr,
                        mask.ld};
      int64_t panel = SIDE;
      if (src.tiles && (m0 + span.from) % SIDE == 0) {
        const int64_t c0 = rows - src.data - m0 * src.cols;
        from.data = src.tiles + (m0 + span.from) / SIDE * src.panel + c0 / SIDE * STEP;
        from.ld = SIDE, from.step = src.panel, panel = STEP;
      }
      const float scale = only ? mask.scale : 1.0f;
      if (slots && row % SIDE == 0) {
        const Slots packed = {slots + row / SIDE * STEP, steps * STEP, 0, blocks};
        add_gradient(packed, adapter.lora, from, panel, size, width, scale, b, c, STRIP);
      } else {
        for (int64_t block = 0; block < blocks; block++) {
          pack_slots(src.low(adapter) + row * r, size, r, sum_pieces(adapter.lora.dtype), block * SIDE, a);
          add_gradient({a, 0, block * SIDE, 1}, adapter.lora, from, panel, size, width, scale, b, c, STRIP);
        }
      }
    }
    c += r * STRIP;
  }
}
static inline void tiles_for(bf16*, bool on) { on ? tiles_on() : tiles_off(); }
#endif
template <typename T>
static inline void tiles_for(T*, bool) {}

// The sums over rows [m0, m0 + count) of a strip of a member's dy and of dy * u, added to.
template <typename T>
static void add_sums(const pk_member& member, const T* dy, int64_t ld, int64_t c0, int64_t m0, int64_t count,
                     int64_t m, int64_t width, ScaleSums* sums) {
  for (int64_t i = m0; i < m0 + count; i += ColumnSum::CHAIN) {
    const int64_t rows = smaller(ColumnSum::CHAIN, m0 + count - i);
    for (int64_t q = 0; q < width; q += LANES) {
      const int64_t at = i * ld + c0 + q;
      const T* u = member.d_scale ? (const T*)member.u + at : dy + at;
      sums[q / LANES].add(dy + at, u, ld, rows, smaller(LANES, width - q), nullptr, (T*)nullptr, i + rows, m);
    }
  }
}

// c [ranks][STRIP] = the sums over rows [from, to) of one strip of columns of one source.
template <typename T>
static void gradient_rows(const Scratch& s, const Source<T>& src, int64_t from, int64_t to, int64_t c0,
                          float* c, float* buffer) {
  const pk::Group& g = s.group;
  const int64_t width = smaller(STRIP, src.cols - c0);
  clear(c, s.r * STRIP);
  bool plain = false;
  for (int64_t i = 0; i < g.adapter_count; i++)
    plain |= src.takes(g.adapters[i]) && !src.drops(g.adapters[i]);
  for (int64_t m0 = from; m0 < to; m0 += pk::KC) {
    const int64_t count = smaller(pk::KC, to - m0);
    const T* rows = src.data + m0 * src.cols + c0;
    if (plain) accumulate(g, src, nullptr, Mask{}, rows, m0, count, width, buffer, c);
    pk::Cursor cursor;
    for (int64_t i = 0; i < g.adapter_count; cursor.pass(g, g.adapters[i++])) {
      const pk_adapter& a = g.adapters[i];
      const pk::Lanes span = pk::lanes_of(a, m0, count);
      if (!src.takes(a) || !src.drops(a) || span.from >= span.to) continue;
      const Dropout d = make_dropout(a.lora.dropout_threshold, a.lora.seed);
      const int64_t first = m0 + span.from - a.row_begin;
      uint8_t bits[pk::KC * STRIP / 8];
      const uint8_t* drawn = s.mask(cursor, first, c0);
      if (!drawn) draw_bits(d, first, c0, span.to - span.from, width, bits, STRIP / 8);
      accumulate(g, src, &a, Mask{drawn ? drawn : bits, drawn ? s.plan.mask_ld : STRIP / 8, d.scale}, rows,
                 m0, count, width, buffer, c);
    }
  }
}

// What a strip yields: its gradients from c, its sums over all rows.
template <typename T>
static void finish_strip(const Scratch& s, const Source<T>& src, int64_t m, int64_t c0, float* c) {
  const int64_t width = smaller(STRIP, src.cols - c0);
  store_gradients(s.group, src, c, c0, width);
  const pk_member* summed = src.member == ALL ? nullptr : &s.group.members[src.member];
  if (!summed || (!summed->d_bias && !summed->d_scale)) return;
  ScaleSums sums[pk::STRIP_PANELS];
  for (int64_t m0 = 0; m0 < m; m0 += pk::KC)
    add_sums(*summed, src.data, src.cols, c0, m0, smaller(pk::KC, m - m0), m, width, sums);
  for (int64_t q = 0; q < width; q += LANES)
    sums[q / LANES].store_sums(smaller(LANES, width - q),
                               summed->d_scale ? summed->d_scale + c0 + q : nullptr,
                               summed->d_bias ? summed->d_bias + c0 + q : nullptr);
}

static inline int64_t strips_of(int64_t cols) { return pk::ceil_div(cols, STRIP); }

// Strips of columns of x, where a gradient of an A is wanted, and of every dy.
static inline int64_t strips_of_x(const pk::Group& g) {
  return g.wants(&pk_adapter::d_lora_a) ? strips_of(g.k()) : 0;
}
static inline int64_t strip_count(const pk::Group& g) {
  int64_t total = strips_of_x(g);
  for (int64_t i = 0; g.wants_columns() && i < g.count; i++) total += strips_of(g.members[i].weight.n);
  return total;
}

// part(source, first column) of a strip. source(member): what the strips are of.
template <typename F, typename G>
static void strip_of(const pk::Group& g, int64_t index, F source, G part) {
  const int64_t of_x = strips_of_x(g);
  if (index < of_x) return part(source(ALL), index * STRIP);
  int64_t member = 0;
  for (index -= of_x; index >= strips_of(g.members[member].weight.n); member++)
    index -= strips_of(g.members[member].weight.n);
  part(source(member), index * STRIP);
}

// What is summed over rows, by strips of columns of x and of every dy, by the threads that call it together.
template <typename T, typename F>
static void column_strips(const Scratch& s, int64_t m, F source) {
  const int64_t total = strip_count(s.group);
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < total; i++)
    strip_of(s.group, i, source, [&](const Source<T>& src, int64_t c0) {
      float* c = s.own();
      gradient_rows(s, src, 0, m, c0, c, c + s.r * STRIP);
      finish_strip(s, src, m, c0, c);
    });
}

template <typename T>
static void column_gradients(const Scratch& s, const T* x, int64_t m, int threads) {
  const pk::Group& g = s.group;
#pragma omp parallel num_threads(threads)
  {
    tiles_for((T*)nullptr, true);
    column_strips<T>(s, m, [&](int64_t i) {
      if (i == ALL) return Source<T>{x, g.k(), ALL};
      return Source<T>{(const T*)g.members[i].dy, g.members[i].weight.n, i};
    });
    tiles_for((T*)nullptr, false);
  }
}

template <typename T>
static void backward_all(const pk::Plan& plan, const pk::Group& g, const T* x, int64_t m, T* dx,
                         float* scratch, int threads) {
  if (dx || g.wants(&pk_adapter::d_lora_a)) backward_dx(plan, g, m, dx, scratch, threads);
  column_gradients(Scratch{plan, g, scratch, g.operands().r}, x, m, threads);
}

}  // namespace PK_NS
