// Threads that stay together through many short loops.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace tessera {

/// A decode step is hundreds of loops of some microseconds. Opening an OpenMP region for each of them wakes the threads
/// anew where they do not spin (OMP_WAIT_POLICY=passive), which takes longer than the loops. The threads of a team are
/// woken once; between two loops they look for work, and sleep only when none has come for a while. A loop is done when
/// its items are, not when every thread has noticed it: a thread that another process keeps from running holds nobody
/// up.
class Team {
 public:
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  /// The team that serves the loops of the calling thread; null where there is none, and within a loop.
  static Team* current() noexcept;

  int size() const { return size_; }

  /// body(i, thread) for i in [0, count), handed out in ascending order, `together` at a time, to `threads` threads, of
  /// which the caller is number 0. `body` does not throw.
  template <class Body>
  void run(std::int64_t count, std::int64_t together, int threads, const Body& body) {
    run_items(
        count, together, threads,
        [](const void* of, std::int64_t i, int thread) { (*static_cast<const Body*>(of))(i, thread); }, &body);
  }

 private:
  using Call = void (*)(const void* body, std::int64_t i, int thread);
  friend void with_team(int threads, const std::function<void()>& body);

  Team() = default;
  void run_items(std::int64_t count, std::int64_t together, int threads, Call call, const void* body);
  void serve(int thread);
  void take_items(int thread, std::uint32_t round);
  void end();

  int size_ = 1;
  // A loop: written before its round begins, and not again before all of its items are done.
  std::atomic<std::int64_t> count_ = 0;
  std::atomic<std::int64_t> together_ = 1;
  std::atomic<int> threads_ = 1;
  std::atomic<Call> call_ = nullptr;
  std::atomic<const void*> body_ = nullptr;
  std::atomic<bool> ended_ = false;
  alignas(64) std::atomic<std::uint32_t> round_ = 0;   ///< counts loops; where threads sleep
  alignas(64) std::atomic<std::uint64_t> ticket_ = 0;  ///< the round, and in the low half the next items to hand out
  alignas(64) std::atomic<std::uint32_t> done_ = 0;    ///< handed out items that are done
};

/// Runs body() on the calling thread, whose parallel_for loops a team of `threads` threads (0: OpenMP's default) serves
/// meanwhile. Within a team or a parallel region just body(). Exceptions come through.
void with_team(int threads, const std::function<void()>& body);

}  // namespace tessera
