// Tasks of several teams of threads: each thread takes those of its own team first, whose rows its caches
// hold, then what is left of the others'. Where two cores have no cache in common, a line that one has
// written costs the other as much as one from memory.
#pragma once
#include "cores.h"
#include "tile_plan.h"

namespace PK_NS {

// Shared by the threads of a parallel region, made outside of it.
class Teams {
 public:
  const int64_t count;  // MOST_TEAMS at most
  explicit Teams(int64_t teams) : count(teams) {}
  // By every thread: task(team, i) for i < size(team), once each; ends with a barrier. turn: how many such
  // calls went before, by the caller's own count.
  template <typename N, typename F>
  void run(int64_t turn, N size, F task) {
    const int64_t own = thread_id() * count / thread_count();
    if (thread_id() == 0)  // those of the turn before last, which nobody reads any more
      for (Line& line : next[(turn + 1) % 3]) __atomic_store_n(&line.at, 0, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < count; i++) {
      const int64_t team = (own + i) % count, all = size(team);
      int64_t* at = &next[turn % 3][team].at;
      for (int64_t t; (t = __atomic_fetch_add(at, 1, __ATOMIC_RELAXED)) < all;) task(team, t);
    }
#pragma omp barrier
  }

 private:
  struct alignas(64) Line {
    int64_t at = 0;
  };
  Line next[3][pk::MOST_TEAMS];
};

}  // namespace PK_NS
