// The fused linear for few rows of bf16 by vdpbf16ps: 128 codes of a row of W are 32 words of four; a shift
// and a lookup in a table of two blocks' 16 numbers bring up 32 of them, one of each word, as bf16 pairs.
#pragma once
#include "gemv_impl.h"
#include "tile_pack.h"

namespace PK_NS {

constexpr int MOST_PAIR_ROWS =
    8;                         // of x, that share a decode: two rows of W have 16 sums, half the registers
constexpr int PAIR_TASK = 16;  // rows of W, whose sums are one vector of each row of y

static inline bool gemv_pairs_take(const pk_weight& w) {
  return w.code && w.blocksize >= 64 && w.k % 64 == 0;
}

// A row of x in steps of WIDE, `apart` elements from each other, zeros after its end: vector q of a step
// holds elements (q ^ 1), 4 + (q ^ 1), ..., nibble q of each word of codes. The rows' same steps lie
// together: a power of two apart they would share a set of the first-level cache.
static void prepare_pairs(const bf16* x, int64_t k, int64_t apart, bf16* out) {
  alignas(64) uint16_t fourth[32] = {};  // every fourth of 64 elements, in the lower half
  for (int i = 0; i < 16; i++) fourth[i] = (uint16_t)(4 * i);
  const __m512i first = _mm512_load_si512(fourth);
  for (int64_t g = 0; g < k; g += WIDE, out += apart) {
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_maskz_loadu_epi16(first_words(k - g - 32 * i), x + g + 32 * i);
    for (int q = 0; q < 4; q++) {
      const __m512i at = _mm512_add_epi16(first, _mm512_set1_epi16((int16_t)(q ^ 1)));
      const __m512i low = _mm512_permutex2var_epi16(v[0], at, v[1]);
      const __m512i high = _mm512_permutex2var_epi16(v[2], at, v[3]);
      store_words(out + 32 * q, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
}

// The sum of a b over `count` elements, as four chains.
static inline float dot(const bf16* a, const bf16* b, int64_t count) {
  vf sums[4] = {};
  for (int64_t i = 0; i < count; i += 128)
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      const uint32_t some = first_words(count - i - 32 * q);
      sums[q] = dot_pairs(sums[q], _mm512_maskz_loadu_epi16(some, a + i + 32 * q),
                          _mm512_maskz_loadu_epi16(some, b + i + 32 * q));
    }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The 256 numbers of a nested absmax's code by bytes, so that 64 are looked up at a time: byte b of each, in
// order. A gather of 16 takes as long as what is then done with their 1,024 codes.
struct NestedCode {
  alignas(64) uint8_t planes[4][256];
  explicit NestedCode(const float* code) {
    for (int i = 0; code && i < 256; i++)
      for (int b = 0; b < 4; b++) planes[b][i] = ((const uint8_t*)(code + i))[b];
  }
  // The numbers of 64 codes.
  void look_up(__m512i codes, vf* out) const {
    // Codes 4 l ... 4 l + 3 of the vectors' four go to lane l, where the planes are put together.
    alignas(64) static constexpr uint8_t TO_LANES[64] = {
        0,  1,  2,  3,  16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 4,  5,  6,  7,  20, 21,
        22, 23, 36, 37, 38, 39, 52, 53, 54, 55, 8,  9,  10, 11, 24, 25, 26, 27, 40, 41, 42, 43,
        56, 57, 58, 59, 12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63};
    codes = _mm512_permutexvar_epi8(_mm512_load_si512(TO_LANES), codes);
    const uint64_t upper = _mm512_movepi8_mask(codes);  // which of 128 and more
    __m512i bytes[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      const __m512i* plane = (const __m512i*)planes[b];
      const __m512i low = _mm512_permutex2var_epi8(plane[0], codes, plane[1]);
      bytes[b] = _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(plane[2], codes, plane[3]));
    }
    const __m512i a = _mm512_unpacklo_epi8(bytes[0], bytes[1]), b = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const __m512i c = _mm512_unpacklo_epi8(bytes[2], bytes[3]), d = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    out[0] = (vf)_mm512_unpacklo_epi16(a, c), out[1] = (vf)_mm512_unpackhi_epi16(a, c);
    out[2] = (vf)_mm512_unpacklo_epi16(b, d), out[3] = (vf)_mm512_unpackhi_epi16(b, d);
  }
};

// The scales of `count` blocks of 64 from `block` on, out of a nested absmax -> out, and up to a vector more.
static void nested_scales(const pk_weight& w, const NestedCode& code, int64_t block, int64_t count,
                          float* out) {
  const int shift = __builtin_ctz((unsigned)w.nested_blocksize);
  const vf offset = set1(*w.absmax_offset);
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t some = smaller(64, count - i);
    const uint64_t there = some == 64 ? ~0ull : (1ull << some) - 1;
    vf values[4];
    code.look_up(_mm512_maskz_loadu_epi8(there, w.absmax_8bit + block + i), values);
    if (some == 64 && (block + i) >> shift == (block + i + 63) >> shift) {  // one nested scale, as mostly
      const vf scale = set1(w.nested_absmax[(block + i) >> shift]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) store(out + i + v * VW, values[v] * scale + offset);
      continue;
    }
    for (int64_t v = 0; v * VW < some; v++) {
      const int64_t first = block + i + v * VW, here = smaller(VW, some - v * VW);
      vf scale = set1(w.nested_absmax[first >> shift]);
      for (int64_t j = 1; (first + here - 1) >> shift != first >> shift && j < here; j++)
        scale[j] = w.nested_absmax[(first + j) >> shift];
      store(out + i + v * VW, values[v] * scale + offset);  // pk::denested of a vector
    }
  }
}

// What the tasks share. x: as `prepare_pairs` lays it out, up to MOST_PAIR_ROWS rows together, `ld` elements
// a row.
struct PairRows {
  const pk::FewRows& of;
  const pk_weight& w;
  const NestedCode& code;
  int64_t ld;
  const bf16* x;
};

// The scales of `count` runs of 64 columns of a row, from element `start` of W on, and three more that count
// for nothing.
static inline void run_scales(const pk_weight& w, const NestedCode& code, int64_t start, int64_t count,
                              float* out) {
  const int shift = __builtin_ctz((unsigned)w.blocksize);
  if (w.blocksize != 64)
    for (int64_t i = 0; i < count; i++) out[i] = pk::absmax_of(w, (start + 64 * i) >> shift);
  else if (w.absmax) memcpy(out, w.absmax + (start >> shift), (size_t)count * sizeof(float));
  else nested_scales(w, code, start >> shift, count, out);
  out[count] = out[count + 1] = out[count + 2] = 0.0f;
}

// Columns whose scales are looked up together, and those of a piece: at most 20 KB of x.
constexpr int64_t SCALED_STEP = 4096;
template <int R>
constexpr int64_t PAIR_STEP = R > 5   ? 1024
                              : R > 2 ? 2048
                                      : SCALED_STEP;

// Rows of W that share each load of R rows of x: their sums are at most 20 registers.
template <int R>
constexpr int PAIR_SHARING = R > 5 ? 2 : 4;

// Scales of runs of 64 columns of a task's rows of W, and those that `run_scales` adds.
struct TaskScales {
  float of[PAIR_TASK][SCALED_STEP / 64 + VW + 2];
};

// The scales of whole rows, which lie next to each other: looked up as one run.
static void short_rows_scales(const pk_weight& w, const NestedCode& code, int64_t n0, int64_t rows,
                              TaskScales& out) {
  const int64_t runs = w.k / 64;
  float all[PAIR_TASK * SCALED_STEP / 64 + VW];
  run_scales(w, code, n0 * w.k, rows * runs, all);
  for (int64_t q = 0; q < rows; q++) {
    for (int64_t i = 0; i < runs; i += VW) store(out.of[q] + i, load(all + q * runs + i));
    memset(out.of[q] + runs, 0, 3 * sizeof(float));
  }
}

// A piece of W: the codes of its first row, those of the piece that is to be fetched meanwhile, and its
// scales, a row of `TaskScales` from each other.
struct Piece {
  const uint8_t *codes, *next;
  const float* scales;
};

// total[q][r] += these columns of ROWS rows of W times x[r][...].
template <int ROWS, int R>
static void pair_piece(const pk_weight& w, const Piece& piece, const bf16* x, int64_t count, vf (*total)[R]) {
  constexpr int CHAINS = ROWS * R <= 8 ? 2 : 1;  // or the products wait for one another
  constexpr int64_t SCALES = sizeof(TaskScales) / PAIR_TASK / sizeof(float);
  const vf codes = load(w.code);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const int64_t bytes = w.k / 2;
  // Scaled and rounded numbers take longer to come than a processor looks ahead past products that wait for
  // their turn: these are the next step's.
  __m512i tables[2][ROWS];
  const auto prepare = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int q = 0; q < ROWS; q++) {
      const float* scales = piece.scales + q * SCALES + i / 64;
      tables[i / WIDE % 2][q] = round_both(codes * set1(scales[0]), codes * set1(scales[1]));
    }
  };
  prepare(0);
  vf sums[CHAINS][ROWS][R];
#pragma GCC unroll 4
  for (int q = 0; q < ROWS; q++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      sums[CHAINS - 1][q][r] = vf{};
      sums[0][q][r] = total[q][r];
    }
  for (int64_t i = 0; i < count; i += WIDE) {
    const uint32_t there = first_words((count - i) / 4);  // words of four codes
    const __m512i* table = tables[i / WIDE % 2];
    __m512i words[ROWS];
    prepare(i + WIDE);
#pragma GCC unroll 4
    for (int q = 0; q < ROWS; q++) {
      words[q] = _mm512_maskz_loadu_epi16(there, piece.codes + q * bytes + i / 2);
      __builtin_prefetch(piece.next + q * bytes + i / 2);
      // Short pieces of two rows leave memory idle: the next task's on their way to the second-level cache.
      if (R > 5) __builtin_prefetch(piece.codes + (q + PAIR_TASK) * bytes + i / 2, 0, 2);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      __m512i values[ROWS];
#pragma GCC unroll 4
      for (int q = 0; q < ROWS; q++) {
        // (word & 15) | 16 of the second block's
        const __m512i index =
            _mm512_ternarylogic_epi32(_mm512_srli_epi16(words[q], 4 * s), nibble, second, 0xea);
        values[q] = _mm512_permutexvar_epi16(index, table[q]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i columns = load_words(x + i * R + r * WIDE + 32 * s);
#pragma GCC unroll 4
        for (int q = 0; q < ROWS; q++)
          sums[s % CHAINS][q][r] = dot_pairs(sums[s % CHAINS][q][r], values[q], columns);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < ROWS; q++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      total[q][r] = CHAINS == 2 ? sums[0][q][r] + sums[CHAINS - 1][q][r] : sums[0][q][r];
}

// The pieces of a task's `rows` rows of W, in the order in which they are multiplied: all rows for the same
// columns of x, or, of one or two rows of x, all columns of the rows that share loads, as W lies in memory.
template <int R>
struct Pieces {
  static constexpr int ROWS = PAIR_SHARING<R>;
  static constexpr int64_t STEP = PAIR_STEP<R>;
  // Pieces from one to that whose codes are fetched meanwhile: they are too short for the hardware's streams.
  static constexpr int64_t AHEAD = R > 2 ? 1 : 4;
  int64_t rows, k, full = rows / ROWS, groups = full + rows % ROWS, steps = pk::ceil_div(k, STEP);

  int64_t count() const { return groups * steps; }
  int64_t row(int64_t piece) const {
    const int64_t group = R > 2 ? piece % groups : piece / steps;
    return smaller(group, full) * ROWS + pk::largest(group - full, 0);
  }
  int64_t from(int64_t piece) const { return STEP * (R > 2 ? piece / groups : piece % steps); }
  // Where a piece's codes are, from the task's first on; those after the last are the next task's.
  int64_t codes(int64_t piece) const {
    const int64_t task = piece / count(), there = piece % count();
    return ((row(there) + task * rows) * k + from(there)) / 2;
  }
};

// total[q] += rows [n0, n0 + rows) of W times R rows of x, piece by piece. again: `scales` are what the call
// before, for other rows of x, has left there.
template <int R>
static void pair_rows(const PairRows& f, int64_t n0, int64_t rows, const bf16* x, TaskScales& scales,
                      bool again, vf (*total)[R]) {
  using P = Pieces<R>;
  const int64_t k = f.w.k;
  const P pieces{rows, k};
  const uint8_t* codes = (const uint8_t*)f.w.data + n0 * k / 2;
  const bool kept = again && k <= SCALED_STEP;
  if (k < SCALED_STEP && !kept) short_rows_scales(f.w, f.code, n0, rows, scales);
  for (int64_t p = 0; p < pieces.count(); p++) {
    const int64_t row = pieces.row(p), from = pieces.from(p), count = smaller(P::STEP, k - from);
    const int64_t some = row + P::ROWS <= rows ? P::ROWS : 1, run = from % SCALED_STEP / 64;
    for (int64_t q = row; k >= SCALED_STEP && !kept && !run && q < row + some; q++)
      run_scales(f.w, f.code, (n0 + q) * k + from, smaller(SCALED_STEP, k - from) / 64, scales.of[q]);
    const Piece piece = {codes + pieces.codes(p), codes + pieces.codes(p + P::AHEAD), scales.of[row] + run};
    if (some == P::ROWS) pair_piece<P::ROWS, R>(f.w, piece, x + from * R, count, total + row);
    else pair_piece<1, R>(f.w, piece, x + from * R, count, total + row);
  }
}

// Up to 16 numbers of a dtype of adapters, those from `count` on zero.
static inline vf some_of(const void* src, int dtype, int64_t at, int64_t count) {
  if (dtype == PK_F32) return some_of((const float*)src + at, count);
  if (dtype == PK_F16) return some_of((const f16*)src + at, count);
  const __m256i words = _mm256_maskz_loadu_epi16((uint16_t)first_words(count), (const bf16*)src + at);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}

// Rows [n0, n0 + rows) of W times rows [m0, m0 + R) of x, with the low-rank part and the bias -> y.
template <int R>
static void pair_task(const PairRows& f, int64_t n0, int64_t rows, int64_t m0, TaskScales& scales) {
  vf total[PAIR_TASK][R] = {};
  pair_rows<R>(f, n0, rows, f.x + m0 * f.ld, scales, m0 > 0, total);
  const pk_lora& lora = f.of.lora;
  for (int64_t j = 0; j < lora.r; j += VW) {
    const int64_t some = smaller(VW, lora.r - j);
    vf low[R];
    for (int r = 0; r < R; r++) low[r] = set1(lora.scaling) * some_of(f.of.xa + (m0 + r) * lora.r + j, some);
    for (int64_t i = 0; i < rows; i++) {
      const vf b = some_of(lora.lora_b, lora.dtype, (n0 + i) * lora.r + j, some);
      for (int r = 0; r < R; r++) total[i][r] = fma(low[r], b, total[i][r]);
    }
  }
  const vf bias = f.of.bias ? some_of(f.of.bias, f.of.bias_dtype, n0, rows) : vf{};
  for (int r = 0; r < R; r++) {
    vf sums[PAIR_TASK];
    for (int i = 0; i < PAIR_TASK; i++) sums[i] = total[i][r];
    const vf result = sum_each(sums) + bias;
    bf16* out = (bf16*)f.of.y + (m0 + r) * f.w.n + n0;
    if (rows == PAIR_TASK) storex(out, result);
    else _mm512_mask_storeu_epi16(out, first_words(rows), round_both(result, result));
  }
}

template <int R>
static void pair_task_of(int64_t count, const PairRows& f, int64_t n0, int64_t m0, TaskScales& scales) {
  if constexpr (R > 0) {
    if (count == R) pair_task<R>(f, n0, smaller(PAIR_TASK, f.w.n - n0), m0, scales);
    else pair_task_of<R - 1>(count, f, n0, m0, scales);
  }
}

}  // namespace PK_NS
