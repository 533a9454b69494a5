// How far apart the threads' cores are. Some have a third-level cache in common; of other chiplets or sockets
// they have none, and what one core has written costs the other four times as much. A virtual machine's cores
// are moved from one state to the other while a process runs, so that it is measured again and again.
#pragma once
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../include/peftkern.h"

namespace pk {

// A round trip of a line from which cores count as apart, in ns: 80 within a chiplet of Zen 5, 370 to 2,200
// between two. And every which call measures.
constexpr int64_t CORES_APART_NS = 200, MEASURE_EVERY = 64;

struct CoreState {
  int32_t how;  // PK_CORES_*
  int64_t calls, distance;
};
inline CoreState core_state = {PK_CORES_MEASURED, 0, 0};

}  // namespace pk

namespace PK_NS {

#if defined(_OPENMP)
static inline int thread_id() { return omp_get_thread_num(); }
static inline int thread_count() { return omp_get_num_threads(); }
static inline double seconds() { return omp_get_wtime(); }
#else
static inline int thread_id() { return 0; }
static inline int thread_count() { return 1; }
static inline double seconds() { return 0; }
#endif

// Gives up after some 20 us: the other thread may not run.
static inline bool comes_to(const int64_t* at, int64_t value) {
  for (int i = 0; i < 20000; i++)
    if (__atomic_load_n(at, __ATOMIC_ACQUIRE) == value) return true;
  return false;
}

// By every thread of a parallel region: to the first, ns of a round trip between it and the last; 0 where
// that did not answer, and to the others. ball: 0, on a line of its own.
static inline int64_t round_trip(int64_t* ball) {
  constexpr int64_t TRIPS = 4, TRIES = 3;
  const int last = thread_count() - 1;
  if (last < 1 || (thread_id() && thread_id() != last)) return 0;
  double best = 0;
  for (int64_t step = 0; step < 2 * TRIPS * TRIES;) {
    const double start = seconds();
    for (int64_t i = 0; i < TRIPS; i++, step += 2) {
      if (thread_id() && !comes_to(ball, step + 1)) return 0;
      __atomic_store_n(ball, step + (thread_id() ? 2 : 1), __ATOMIC_RELEASE);
      if (!thread_id() && !comes_to(ball, step + 2)) return (int64_t)best;
    }
    const double ns = (seconds() - start) * 1e9 / TRIPS;
    best = step == 2 * TRIPS || ns < best ? ns : best;
  }
  return thread_id() ? 0 : (int64_t)best + 1;
}

// Whether a call's threads are apart, by what was measured before it. Made outside of a parallel region whose
// threads then call measure().
class Cores {
 public:
  const bool apart;
  explicit Cores(int threads)
      : apart(state() == PK_CORES_APART ||
              (state() == PK_CORES_MEASURED &&
               __atomic_load_n(&pk::core_state.distance, __ATOMIC_RELAXED) > pk::CORES_APART_NS)),
        due(threads > 1 && state() == PK_CORES_MEASURED &&
            __atomic_fetch_add(&pk::core_state.calls, 1, __ATOMIC_RELAXED) % pk::MEASURE_EVERY == 0) {}
  void measure() {
    const int64_t distance = due ? round_trip(&ball) : 0;
    if (distance) __atomic_store_n(&pk::core_state.distance, distance, __ATOMIC_RELAXED);
  }

 private:
  alignas(64) int64_t ball = 0;
  alignas(64) const bool due;
  static int32_t state() { return __atomic_load_n(&pk::core_state.how, __ATOMIC_RELAXED); }
};

}  // namespace PK_NS
