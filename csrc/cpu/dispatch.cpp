// The C ABI, one unit for every level: the ops' C functions, each in the op's file, and those that belong to
// none.
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define PK_NS pk_dispatch  // cores.h is compiled for every level; the rest of this unit for none
#include "cores.h"
#undef PK_NS
#include "ops.h"

extern "C" {

const char* pk_status_string(int status) { return status_text(status); }
int pk_abi_version(void) { return PEFTKERN_ABI_VERSION; }
const char* pk_isa(void) { return current->name; }
const char* pk_isa_name(int i) {
  for (const Level& level : LEVELS)
    if (level.usable() && i-- == 0) return level.kernels->name;
  return nullptr;
}
int pk_set_isa(const char* name) {
  for (const Level& level : LEVELS)
    if (name && level.usable() && !strcmp(name, level.kernels->name)) {
      current = level.kernels;
      return PK_OK;
    }
  return PK_ERR_ISA;
}

int pk_set_cores(int how) {
  if (how < PK_CORES_MEASURED || how > PK_CORES_APART) return PK_ERR_SHAPE;
  __atomic_store_n(&pk::core_state.how, how, __ATOMIC_RELAXED);
  return PK_OK;
}
int64_t pk_core_distance(int threads) {
  threads = threads_or_default(threads);
  alignas(64) int64_t distance = 0;
  // A thread that is only started does not answer in time.
  for (int tries = 0; threads > 1 && !distance && tries < 5; tries++) {
    alignas(64) int64_t ball = 0;
#pragma omp parallel num_threads(threads)
    {
      const int64_t found = pk_dispatch::round_trip(&ball);
      if (found) distance = found;
    }
  }
  return distance;
}

int pk_advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < 0) return PK_ERR_SHAPE;
  if (bytes && !data) return PK_ERR_NULL;
#if defined(__linux__)
  const uintptr_t page = 2 << 20, begin = ((uintptr_t)data + page - 1) / page * page,
                  end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
  return PK_OK;
}

}  // extern "C"
