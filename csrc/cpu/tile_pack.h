// Bringing operands of a bf16 product into tiles: rows copied, weights decoded, adapters split into bf16
// numbers.
#pragma once
#include "decode_impl.h"
#include "dropout_impl.h"
#include "tiles.h"

namespace PK_NS {

// Rows [rows <= 32][cols], `ld` apart -> steps of A, zeros around them.
static void pack_tiles(const bf16* src, int64_t ld, int64_t rows, int64_t cols, bf16* dst) {
  for (int64_t j = 0; j < cols; j += SIDE, dst += STEP) {
    const uint32_t some = first_words(cols - j);
    for (int64_t i = 0; i < SIDE; i++)
      store_words(dst + i * SIDE,
                  i < rows ? _mm512_maskz_loadu_epi16(some, src + i * ld + j) : _mm512_setzero_si512());
  }
}

// The same of PROJECT_STEPS steps or fewer already packed, where `bits` (rows of 16 bytes) keep them; rows
// [from, to).
static void mask_tiles(const bf16* src, int64_t steps, const uint8_t* bits, int64_t from, int64_t to,
                       bf16* dst) {
  for (int64_t s = 0; s < steps; s++)
    for (int64_t i = 0; i < SIDE; i++) {
      uint32_t keep = 0;
      if (i >= from && i < to) memcpy(&keep, bits + (i - from) * 16 + s * 4, 4);
      store_words(dst + s * STEP + i * SIDE,
                  _mm512_maskz_mov_epi16(keep, load_words(src + s * STEP + i * SIDE)));
    }
}

// 16 rows of 16 pairs, `ld` elements apart -> a tile of B, whose pair p holds that of every row. The fours of
// a row are gathered by loads, so that 32 shuffles are left of 64.
static void transpose_pairs(const bf16* src, int64_t ld, bf16* dst) {
  for (int64_t g = 0; g < 4; g++) {
    __m512i v[4];
    for (int64_t r = 0; r < 4; r++) {
      const bf16* at = src + r * ld + g * 8;
      const auto four = [&](int64_t q) { return _mm_loadu_si128((const __m128i*)(at + 4 * q * ld)); };
      v[r] = _mm512_castsi128_si512(four(0));
      v[r] = _mm512_inserti32x4(v[r], four(1), 1);
      v[r] = _mm512_inserti32x4(v[r], four(2), 2);
      v[r] = _mm512_inserti32x4(v[r], four(3), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    bf16* out = dst + g * 4 * 32;
    store_words(out, _mm512_unpacklo_epi64(a, c));
    store_words(out + 32, _mm512_unpackhi_epi64(a, c));
    store_words(out + 64, _mm512_unpacklo_epi64(b, d));
    store_words(out + 96, _mm512_unpackhi_epi64(b, d));
  }
}

// Two contraction steps (32 columns each) -> a pair of both tiles of B.
static inline void interleave(__m512i first, __m512i second, bf16* low, bf16* high) {
  alignas(64) static constexpr uint16_t LOW[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i at = _mm512_load_si512(LOW), beyond = _mm512_add_epi16(at, _mm512_set1_epi16(16));
  store_words(low, _mm512_permutex2var_epi16(first, at, second));
  store_words(high, _mm512_permutex2var_epi16(first, beyond, second));
}

// Columns of y: rows [n0, n0 + cols) of W over `steps` contraction steps from k0 on (both even numbers of 32)
// -> steps of B, zeros for missing rows.
static void decode_columns(const pk_weight& w, int64_t n0, int64_t cols, int64_t k0, int64_t steps,
                           bf16* out) {
  const vf codes = load(w.code);
  alignas(64) bf16 rows[16 * 64];
  float scales[16];
  for (int64_t half = 0; half < 2; half++) {
    const int64_t count = smaller(16, cols - half * 16);
    if (count < 16) memset(rows, 0, sizeof rows);
    for (int64_t s = 0; s < steps; s += 2) {
      const int64_t two = smaller(2, steps - s), start = (n0 + half * 16) * w.k + k0 + s * SIDE;
      const uint8_t* packed = (const uint8_t*)w.data + (start >> 1);
      block_scales(w, start, w.k, count, scales);
      for (int64_t i = 0; i < count; i++, packed += w.k / 2) {
        // Of the next panel: a row's piece is too short for the hardware's streams.
        __builtin_prefetch(packed + SIDE * w.k / 2, 0, 2);
        const vf scaled = codes * set1(scales[i]);
        const __m512i table = round_both(scaled, scaled);
        store_words(rows + i * 64, _mm512_permutexvar_epi16(word_codes(packed), table));
        if (two == 2)
          store_words(rows + i * 64 + 32, _mm512_permutexvar_epi16(word_codes(packed + 16), table));
      }
      for (int64_t q = 0; q < two; q++)
        transpose_pairs(rows + q * 32, 64, out + (s + q) * STEP + half * HALF);
    }
  }
}

// Index of the 32-entry table of two rows for 16 columns: the first row's codes in the low words, the
// second's, plus 16, in the high ones. bytes: 16 of either row.
static inline __m512i pair_codes(__m512i bytes, __m512i spread) {
  alignas(64) static constexpr uint32_t SHIFT[16] = {4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0};
  const __m512i moved = _mm512_srlv_epi32(_mm512_permutexvar_epi8(spread, bytes), _mm512_load_si512(SHIFT));
  return _mm512_or_si512(_mm512_and_si512(moved, _mm512_set1_epi32(0x000f000f)),
                         _mm512_set1_epi32(0x00100000));
}

// Columns of dx: [k0, k0 + 32) of W over `rows` of its rows from n0 on, CHUNK steps at most -> steps of B,
// zeros for missing rows.
static void decode_pairs(const pk_weight& w, int64_t n0, int64_t rows, int64_t k0, bf16* out) {
  alignas(64) static constexpr uint32_t SPREAD[16] = {
      0x100000, 0x100000, 0x110001, 0x110001, 0x120002, 0x120002, 0x130003, 0x130003,
      0x140004, 0x140004, 0x150005, 0x150005, 0x160006, 0x160006, 0x170007, 0x170007};
  const __m512i low = _mm512_load_si512(SPREAD), high = _mm512_add_epi32(low, _mm512_set1_epi32(0x080008));
  const vf codes = load(w.code);
  const int64_t ld = w.k / 2;  // of packed rows, in bytes
  const uint8_t* packed = (const uint8_t*)w.data + (n0 * w.k + k0) / 2;
  float scales[pk::CHUNK * SIDE + 1];
  block_scales(w, n0 * w.k + k0, w.k, rows, scales);
  scales[rows] = 0.0f;
  for (int64_t i = 0; i < pk::round_up(rows, SIDE); i += 2, packed += 2 * ld) {
    bf16* to = out + i / SIDE * STEP + i % SIDE / 2 * 32;
    if (i >= rows) {
      store_words(to, _mm512_setzero_si512());
      store_words(to + HALF, _mm512_setzero_si512());
      continue;
    }
    // 16 rows on, and the rows' next lines for the panels to come: a row's piece is too short for the
    // hardware's streams.
    for (int64_t row = 0; row < 2; row++) {
      __builtin_prefetch(packed + (16 + row) * ld);
      __builtin_prefetch(packed + row * ld + 64, 0, 2);
    }
    const uint8_t* second = i + 1 < rows ? packed + ld : packed;
    const __m256i both =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)packed)),
                                _mm_loadu_si128((const __m128i*)second), 1);
    const __m512i bytes = _mm512_castsi256_si512(both);
    const __m512i table = round_both(codes * set1(scales[i]), codes * set1(scales[i + 1]));
    store_words(to, _mm512_permutexvar_epi16(pair_codes(bytes, low), table));
    store_words(to + HALF, _mm512_permutexvar_epi16(pair_codes(bytes, high), table));
  }
}

// ---- adapters: a number as a sum of bf16 ones, each what rounding to it leaves of the rest

static inline int64_t pieces_of(int dtype) { return dtype == PK_BF16 ? 1 : dtype == PK_F16 ? 2 : 3; }

static inline vf rounded_value(vf v) { return (vf)((vu)round_bf16(v) << 16); }

static inline vf some_of(const float* src, int64_t count) {
  return (vf)_mm512_maskz_loadu_epi32((uint16_t)first_words(smaller(count, VW)), src);
}
static inline vf some_of(const f16* src, int64_t count) {
  f16 values[VW] = {};
  if (count > 0) memcpy(values, src, (size_t)smaller(count, VW) * sizeof(f16));
  return loadx(values);
}

// Piece `index` of 32 numbers, those from `count` on zero.
template <typename T>
static inline __m512i piece_of(const T* src, int64_t count, int64_t index) {
  vf low = some_of(src, count), high = some_of(src + VW, count - VW);
  for (; index > 0; index--) low -= rounded_value(low), high -= rounded_value(high);
  return round_both(low, high);
}
static inline __m512i piece_of(const bf16* src, int64_t count, int64_t index) {
  return index ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(first_words(count), src);
}
static inline __m512i piece_of(const void* matrix, int dtype, int64_t at, int64_t count, int64_t index) {
  if (dtype == PK_F32) return piece_of((const float*)matrix + at, count, index);
  if (dtype == PK_BF16) return piece_of((const bf16*)matrix + at, count, index);
  return piece_of((const f16*)matrix + at, count, index);
}

// A of [r, k]: columns are ranks [j0, j0 + 32), the contraction is k, from column `from` on -> one step of B.
static void pack_rank_rows(const pk_lora& lora, const void* matrix, int64_t k, int64_t j0, int64_t from,
                           int64_t piece, bf16* out) {
  alignas(64) bf16 rows[SIDE * SIDE];
  for (int64_t j = 0; j < SIDE; j++)
    store_words(rows + j * SIDE, j0 + j < lora.r
                                     ? piece_of(matrix, lora.dtype, (j0 + j) * k + from, k - from, piece)
                                     : _mm512_setzero_si512());
  transpose_pairs(rows, SIDE, out);
  transpose_pairs(rows + 16 * SIDE, SIDE, out + HALF);
}

// B of [n, r]: columns are ranks [j0, j0 + 32), the contraction is n, from row `from` on -> one step of B.
static void pack_rank_columns(const pk_lora& lora, const void* matrix, int64_t n, int64_t j0, int64_t from,
                              int64_t piece, bf16* out) {
  const auto row = [&](int64_t i) {
    return i < n ? piece_of(matrix, lora.dtype, i * lora.r + j0, lora.r - j0, piece) : _mm512_setzero_si512();
  };
  for (int64_t p = 0; p < 16; p++)
    interleave(row(from + 2 * p), row(from + 2 * p + 1), out + p * 32, out + HALF + p * 32);
}

// Element l of a low-rank contraction: which rank, of which piece of xa (or dyb) and of which of the other
// factor.
static inline int64_t low_length(const pk_lora& lora) { return (lora.dtype == PK_BF16 ? 2 : 3) * lora.r; }
static inline int64_t piece_of_sum(int64_t segment) { return segment == 1; }
static inline int64_t piece_of_factor(int64_t segment) { return segment == 2; }

// The low-rank operand of a row panel: sums [32 rows][ranks], each rank block of 32 a block's C, times
// `scale`, in pieces.
static void pack_low(const pk_lora& lora, const float* sums, int64_t from, int64_t to, float scale,
                     bf16* out) {
  const int64_t length = low_length(lora), padded = pk::round_up(length, SIDE);
  alignas(64) float row[256 + SIDE];
  alignas(64) bf16 line[3 * 256 + 2 * SIDE];
  for (int64_t i = 0; i < SIDE; i++) {
    memset(line, 0, (size_t)padded * sizeof(bf16));
    if (i >= from && i < to) {
      for (int64_t j = 0; j < lora.r; j += 16)
        store(row + j,
              set1(scale) * load(sums + j / SIDE * STEP + i / 16 * 512 + j % SIDE / 16 * 256 + i % 16 * 16));
      for (int64_t segment = 0; segment * lora.r < length; segment++)
        for (int64_t j = 0; j < lora.r; j += SIDE)
          _mm512_mask_storeu_epi16(line + segment * lora.r + j, first_words(lora.r - j),
                                   piece_of(row + j, lora.r - j, piece_of_sum(segment)));
    }
    for (int64_t s = 0; s < padded / SIDE; s++)
      store_words(out + s * STEP + i * SIDE, load_words(line + s * SIDE));
  }
}

// The other factor of y's low-rank part, B of rows [n0, n0 + cols) -> low_steps(r) steps of B at most.
static void pack_low_columns(const pk_lora& lora, int64_t n0, int64_t cols, bf16* out) {
  const int64_t length = low_length(lora);
  alignas(64) bf16 rows[SIDE * SIDE];
  for (int64_t s = 0; s * SIDE < length; s++, out += STEP) {
    memset(rows, 0, sizeof rows);
    for (int64_t i = 0; i < cols; i++)
      for (int64_t l = s * SIDE; l < smaller(length, (s + 1) * SIDE);) {
        const int64_t segment = l / lora.r, j = l % lora.r, run = smaller(lora.r - j, (s + 1) * SIDE - l);
        const __m512i piece =
            piece_of(lora.lora_b, lora.dtype, (n0 + i) * lora.r + j, run, piece_of_factor(segment));
        _mm512_mask_storeu_epi16(rows + i * SIDE + l % SIDE, first_words(run), piece);
        l += run;
      }
    transpose_pairs(rows, SIDE, out);
    transpose_pairs(rows + 16 * SIDE, SIDE, out + HALF);
  }
}

// The same for dx: columns [k0, k0 + 32) of A.
static void pack_low_rows(const pk_lora& lora, int64_t k, int64_t k0, bf16* out) {
  const int64_t length = low_length(lora);
  const auto row = [&](int64_t l) {
    return l < length
               ? piece_of(lora.lora_a, lora.dtype, l % lora.r * k + k0, k - k0, piece_of_factor(l / lora.r))
               : _mm512_setzero_si512();
  };
  for (int64_t l = 0; l < length; l += 2) {
    bf16* to = out + l / SIDE * STEP + l % SIDE / 2 * 32;
    interleave(row(l), row(l + 1), to, to + HALF);
  }
  for (int64_t l = pk::round_up(length, 2); l < pk::round_up(length, SIDE); l += 2) {
    bf16* to = out + l / SIDE * STEP + l % SIDE / 2 * 32;
    store_words(to, _mm512_setzero_si512());
    store_words(to + HALF, _mm512_setzero_si512());
  }
}

}  // namespace PK_NS
