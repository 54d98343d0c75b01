// Loops over threads: OpenMP with dynamic balance, exceptions carried to the caller.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

namespace tessera {

/// Threads a call uses: `requested`, or OpenMP's default when 0; 1 inside a parallel region.
inline int thread_count(int requested) {
  if (omp_in_parallel()) return 1;
  return requested > 0 ? requested : omp_get_max_threads();
}

/// body(i, thread) for i in [0, count), handed out in ascending order, `together` at a time: put long items first.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body, std::int64_t together = 1) {
  // Not inlined, so that the two loops below share one copy of it.
  const auto call = [&](std::int64_t i, int thread) __attribute__((noinline)) {
    body(i, thread);
  };
  const int team = count > 1 ? thread_count(threads) : 1;
  if (team == 1) {
    // OpenMP would set up a team of one: a step of decoding has hundreds of such loops.
    for (std::int64_t i = 0; i < count; ++i) call(i, 0);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, together) num_threads(team)
  for (std::int64_t i = 0; i < count; ++i) {
    try {
      call(i, omp_get_thread_num());
    } catch (...) {
#pragma omp critical(tessera_parallel_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tessera
