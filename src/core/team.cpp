#include "core/team.h"

#include <omp.h>

#include <algorithm>
#include <exception>

#include "core/parallel.h"

namespace tessera {

namespace {

/// How often a waiting thread looks before it sleeps: some hundred microseconds, more than lies between two loops.
constexpr int kLooks = 1 << 14;

thread_local Team* current_team = nullptr;

/// The calling thread has this team until the end of the block.
class Membership {
 public:
  explicit Membership(Team* team) : before_(current_team) { current_team = team; }
  ~Membership() { current_team = before_; }
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;

 private:
  Team* before_;
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits until `number` is another one than `old`, which it returns.
std::uint32_t wait_for_change(const std::atomic<std::uint32_t>& number, std::uint32_t old) {
  for (int look = 0; look < kLooks; ++look) {
    if (const std::uint32_t now = number.load(std::memory_order_acquire); now != old) return now;
    pause();
  }
  number.wait(old, std::memory_order_acquire);
  return number.load(std::memory_order_acquire);
}

}  // namespace

Team* Team::current() noexcept {
  return current_team;
}

void Team::run_items(std::int64_t count, std::int64_t together, int threads, Call call, const void* body) {
  // Numbers of what is handed out have 32 bits.
  together = std::max(together, (count >> 31) + 1);
  const auto parts = static_cast<std::uint32_t>((count + together - 1) / together);
  count_.store(count, std::memory_order_relaxed);
  together_.store(together, std::memory_order_relaxed);
  threads_.store(threads, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  body_.store(body, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const std::uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  ticket_.store(std::uint64_t{round} << 32, std::memory_order_release);
  // Sequentially consistent, as all that is waited for: whoever is about to sleep sees it or is seen.
  round_.store(round, std::memory_order_seq_cst);
  round_.notify_all();
  {
    const Membership none(nullptr);  // loops within the body are the thread's own
    take_items(0, round);
  }
  for (std::uint32_t done = done_.load(std::memory_order_acquire); done != parts;) done = wait_for_change(done_, done);
}

void Team::take_items(int thread, std::uint32_t round) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (ticket >> 32 == round) {
    const std::int64_t count = count_.load(std::memory_order_relaxed);
    const std::int64_t together = together_.load(std::memory_order_relaxed);
    const std::int64_t first = static_cast<std::int64_t>(ticket & 0xffffffffU) * together;
    if (first >= count || thread >= threads_.load(std::memory_order_relaxed)) return;
    const Call call = call_.load(std::memory_order_relaxed);
    const void* body = body_.load(std::memory_order_relaxed);
    // Once items of a round are taken the round cannot end, so what was read before belongs to it.
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    for (std::int64_t i = first; i < std::min(count, first + together); ++i) call(body, i, thread);
    const std::uint32_t done = done_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (done == static_cast<std::uint32_t>((count + together - 1) / together)) done_.notify_one();
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Team::serve(int thread) {
  std::uint32_t round = 0;
  for (;;) {
    round = wait_for_change(round_, round);
    if (ended_.load(std::memory_order_relaxed)) return;
    take_items(thread, round);
  }
}

void Team::end() {
  ended_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_seq_cst);
  round_.notify_all();
}

void with_team(int threads, const std::function<void()>& body) {
  const int wanted = Team::current() == nullptr ? thread_count(threads) : 1;
  if (wanted == 1) return body();
  Team team;
  std::exception_ptr error;
#pragma omp parallel num_threads(wanted)
  {
    if (omp_get_thread_num() == 0) {
      team.size_ = omp_get_num_threads();
      const Membership member(&team);
      try {
        body();
      } catch (...) {
        error = std::current_exception();
      }
      team.end();
    } else {
      team.serve(omp_get_thread_num());
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tessera
