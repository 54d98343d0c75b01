// Long commands: progress on standard error, and an end by Ctrl-C or SIGTERM.
#pragma once

#include <cstdint>

#include "support/measure.h"

namespace tessera::cli {

/// The first Ctrl-C or SIGTERM from now on is noted for interrupted(); a second one ends the process at once.
void watch_interrupt();
bool interrupted();

/// Lines on standard error for what takes longer than a second: one that renews itself on a terminal, else one every
/// ten seconds.
class ProgressLine {
 public:
  ProgressLine();
  void show(const char* phase, double done, std::int64_t total);
  /// For work that is not counted in tokens: a share of 1.
  void show_share(const char* phase, double done);
  /// Wipes the line and starts the clock for the next phase.
  void finish();

 private:
  /// Whether a line is due after `done` of the work, and notes that it is shown.
  bool due(double done);

  Stopwatch watch_;
  double last_ = 0;
  bool shown_ = false;
  bool terminal_;
};

}  // namespace tessera::cli
