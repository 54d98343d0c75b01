// Loops over threads: OpenMP with dynamic balance, or the threads of a team; exceptions carried to the caller.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "core/team.h"

namespace tessera {

/// Threads a call uses: `requested`, or OpenMP's default when 0; no more than a team has; 1 inside a parallel region.
inline int thread_count(int requested) {
  if (const Team* team = Team::current()) return requested > 0 ? std::min(requested, team->size()) : team->size();
  if (omp_in_parallel()) return 1;
  return requested > 0 ? requested : omp_get_max_threads();
}

/// body(i, thread) for i in [0, count), handed out in ascending order, `together` at a time: put long items first.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body, std::int64_t together = 1) {
  std::exception_ptr error;
  const auto guarded = [&](std::int64_t i, int thread) {
    try {
      body(i, thread);
    } catch (...) {
#pragma omp critical(tessera_parallel_error)
      if (!error) error = std::current_exception();
    }
  };
  const int team = count > 1 ? thread_count(threads) : 1;
  if (Team* own = Team::current(); own != nullptr && team > 1) {
    own->run(count, together, team, guarded);
  } else {
#pragma omp parallel for schedule(dynamic, together) num_threads(team) if (team > 1)
    for (std::int64_t i = 0; i < count; ++i) guarded(i, omp_get_thread_num());
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tessera
