// Times and memory of one process.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <vector>

namespace tessera::cli {

class Stopwatch {
 public:
  double milliseconds() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// What repeated measurements of one quantity came to.
struct Spread {
  double min = 0;
  double median = 0;
  double max = 0;
};
/// Of at least one sample; the median of an even count is the mean of the middle two.
Spread spread_of(std::vector<double> samples);
nlohmann::ordered_json to_json(const Spread& spread);

/// Starts the high-water mark of resident memory anew at the present size, where the system allows it.
void reset_peak_memory();
/// High-water mark of resident memory in MB (10^6 bytes); 0 where the system does not tell.
double peak_memory_mb();

}  // namespace tessera::cli
