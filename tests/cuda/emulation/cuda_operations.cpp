// The operations of several lanes: shuffles, votes and products; and 16-bit numbers.
#include "cuda_on_cpu.h"

namespace pk_emulated {

constexpr int WARP = 32;

void need_aligned(const char* name, const void* p) {
  if ((uintptr_t)p % 16) fail("thread %u: %s at an address that is not a multiple of 16", position->thread.x, name);
}
void need_shared(const char* name, const void* p) {
  if (!in_shared(p, 16)) fail("thread %u: %s outside the block's shared memory", position->thread.x, name);
}

namespace {

struct Product {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  bool bf16;
};

float number(uint32_t pair, int half, bool bf16) {
  const uint16_t bits = (uint16_t)(pair >> 16 * half);
  return bf16 ? __uint_as_float((uint32_t)bits << 16) : half_value(bits);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void combine_product(void* const lanes[32]) {
  float a[16][16], b[16][8];
  for (int l = 0; l < WARP; l++) {
    const Product* p = (const Product*)lanes[l];
    const int group = l >> 2, thread = l % 4;
    for (int i = 0; i < 8; i++) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = number(p->a[i / 2], i & 1, p->bf16);
    }
    for (int i = 0; i < 4; i++) b[thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = number(p->b[i / 2], i & 1, p->bf16);
  }
  for (int l = 0; l < WARP; l++) {
    const Product* p = (const Product*)lanes[l];
    for (int i = 0; i < 4; i++) {
      const int row = (l >> 2) + (i < 2 ? 0 : 8), column = l % 4 * 2 + (i & 1);
      double sum = p->c[i];
      for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k][column];
      p->c[i] = (float)sum;
    }
  }
}

struct Vote {
  bool vote;
  unsigned result;
};

}  // namespace

void combine_shuffle(void* const lanes[32]) {
  for (int l = 0; l < WARP; l++) {
    Shuffle* s = (Shuffle*)lanes[l];
    if (!s) continue;
    const Shuffle* from = (const Shuffle*)lanes[s->source];
    s->result = from ? from->value : ~0ull;  // a lane outside the mask: undefined on the hardware
  }
}

unsigned ballot(const char* name, unsigned mask, bool vote) {
  Vote v = {vote, 0};
  collective(name, mask, false, &v, [](void* const* lanes) {
    unsigned votes = 0;
    for (int l = 0; l < WARP; l++) votes |= (unsigned)(lanes[l] && ((Vote*)lanes[l])->vote) << l;
    for (int l = 0; l < WARP; l++)
      if (lanes[l]) ((Vote*)lanes[l])->result = votes;
  });
  return v.result;
}

uint4 load16(const void* address) {
  need_aligned("a 16-byte load", address);
  return *(const uint4*)address;
}

void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16) {
  Product p = {c, a, b, bf16};
  collective(bf16 ? "mma (bf16)" : "mma (f16)", 0xffffffffu, true, &p, combine_product);
}

uint16_t half_bits(float value) {
  const _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
float half_value(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
}

}  // namespace pk_emulated
