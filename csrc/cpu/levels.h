// The ISA levels: which of them this CPU has, and which is in use, chosen once at load. Only
// dispatch.cpp includes it.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "ops.h"

namespace pk {
extern const Kernels kernels_baseline;
#if defined(__x86_64__)
// A compiler that does not know a level's flags leaves its unit out.
extern const Kernels kernels_avx2 __attribute__((weak)), kernels_avx512 __attribute__((weak)),
    kernels_avx512bf16 __attribute__((weak)), kernels_amx __attribute__((weak));
#endif
}  // namespace pk

namespace {

using namespace pk;

bool always() { return true; }
#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too (xgetbv), so a level it confirms can be used. Clang's
// does not know f16c, which needs of the system what AVX needs.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
// With the byte permutes (VBMI), which Cooper Lake lacks: Zen 4, Sapphire Rapids and later.
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}
// The tiles' registers are 8 KB of state that Linux saves only for a process which asked for it. It refuses
// where a thread's alternate signal stack would be too small.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
bool has_amx() {
#if defined(PK_SIMDE)
  return true;
#else
  // leaf 7, EDX; older compilers' __builtin_cpu_supports has neither.
  constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
  unsigned a, b, c, d = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & BF16) &&
         may_use_tiles();
#endif
}
#endif

struct Level {
  const Kernels* kernels;  // null where the unit was left out
  bool (*supported)();
  bool usable() const { return kernels && supported(); }
};
const Level LEVELS[] = {
    // lowest first
    {&pk::kernels_baseline, always},
#if defined(__x86_64__)
    {&pk::kernels_avx2, has_avx2},
    {&pk::kernels_avx512, has_avx512},
    {&pk::kernels_avx512bf16, has_avx512bf16},
    {&pk::kernels_amx, has_amx},
#endif
};

const Kernels* best_level() {
  const Kernels* best = LEVELS[0].kernels;
  const char* forced = getenv("PEFTKERN_CPU_ISA");
  for (const Level& level : LEVELS) {
    if (!level.usable()) continue;
    best = level.kernels;
    if (forced && !strcmp(forced, best->name)) break;
  }
  return best;
}
const Kernels* current = best_level();

// More are taken as so many: a runtime that cannot start them ends the process.
constexpr int MOST_THREADS = 4096;

int threads_or_default(int threads) {
#if defined(_OPENMP)
  const int wanted = threads > 0 ? threads : omp_get_max_threads();
  return wanted < MOST_THREADS ? wanted : MOST_THREADS;
#else
  return 1;
#endif
}

}  // namespace
