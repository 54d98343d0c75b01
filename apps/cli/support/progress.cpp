#include "support/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>

namespace tessera::cli {

namespace {

// A signal handler can reach nothing but a static object.
volatile std::sig_atomic_t interrupt_seen = 0;

}  // namespace

void watch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = [](int) {
    interrupt_seen = 1;
    for (const int watched : {SIGINT, SIGTERM}) signal(watched, SIG_DFL);
  };
  for (const int watched : {SIGINT, SIGTERM}) sigaction(watched, &action, nullptr);
}

bool interrupted() {
  return interrupt_seen != 0;
}

ProgressLine::ProgressLine() : terminal_(isatty(STDERR_FILENO) != 0) {}

bool ProgressLine::due(double done) {
  const double elapsed = watch_.milliseconds() / 1000;
  const double wait = terminal_ ? (shown_ ? 0.2 : 1.0) : (shown_ ? 10.0 : 1.0);
  if (elapsed - last_ < wait || done <= 0) return false;
  last_ = elapsed;
  shown_ = true;
  return true;
}

void ProgressLine::show(const char* phase, double done, std::int64_t total) {
  if (!due(done)) return;
  const double rate = done / last_;
  fmt::print(stderr, "{}{}: {:.0f}% of {} tokens, {:.0f} tokens/s, {:.0f} s left{}", terminal_ ? "\r\x1b[K" : "", phase,
             100 * done / static_cast<double>(total), total, rate, (static_cast<double>(total) - done) / rate,
             terminal_ ? "" : "\n");
  std::fflush(stderr);
}

void ProgressLine::show_share(const char* phase, double done) {
  if (!due(done)) return;
  fmt::print(stderr, "{}{}: {:.0f}%, {:.0f} s left{}", terminal_ ? "\r\x1b[K" : "", phase, 100 * done,
             last_ * (1 - done) / done, terminal_ ? "" : "\n");
  std::fflush(stderr);
}

void ProgressLine::finish() {
  if (shown_ && terminal_) fmt::print(stderr, "\r\x1b[K");
  *this = ProgressLine();
}

}  // namespace tessera::cli
